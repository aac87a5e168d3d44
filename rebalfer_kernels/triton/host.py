"""The operators of ops.py by the Triton kernels: what is launched, how often, on which device.

Launches of one call:

    forward     1, under "mean" 1 more that sums the N per-sample losses in one order: a counter by which the last
                program detects that it is the last needs memory that is zeroed, which is a launch too, or that is kept
                per device, stream and graph. Maps beyond one tile (tiles.py): 1 more, as no program sees a whole pair.
                The CAM's weight not detached: 1 more, which reads the features again when S is known.
    backward    1. The programs for weight and bias are the first of the launch; they need only what the forward
                saved, not dF. More than 128 samples: 1 more, to add up the sums of those programs, each over
                128 samples or more.
    maps        forward 1; backward 1 for the features and 2 for the weight: sums over chunks of the batch, then over
                the chunks.
    cross-entropy   forward 1, under "mean" 2; backward 1.
    views           1.

C is never split over programs: the sums over C of one pair are one program's, in one order. Nothing waits for the GPU
(no sync, no host read), so all of it can be captured in a CUDA graph; upstream gradients are read on the device.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..reference import ViewPlan, compute_dtype
from ..transforms import TwinMap
from . import backward, common, cross_entropy, forward, views
from .tiles import Policy, Problem, Shape, Tiles, policy

INTERPRETED = common.INTERPRETED

#: A sum over at most _CHUNK samples is one program's; one over more is cut into at most _CHUNKS chunks of the batch.
_CHUNK, _CHUNKS = 128, 64
_VIEW_PIXELS = 256  #: of a program


@functools.cache
def arch(device_index: int | None) -> str:
    """ "sm_90", "gfx942", ... In the interpreter sm_90, whose tiles are thereby tested."""
    if INTERPRETED:
        return "sm_90"
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def probe() -> None:
    """Compile and launch a kernel that does nothing, on the current device; raises whatever prevents it."""
    common.empty_kernel[(1,)]()


def _launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    warps: int = 4,
    stages: int = 1,
    fused: bool = True,
    **arguments: Any,
) -> None:
    """On the device's current stream; ``fused``: a product and its sum are rounded once."""
    if programs == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Triton 3.10 fuses multiply and add only where asked to.
        kernel[(programs,)](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=fused)


def _launch_tiles(kernel: Any, programs: int, device: torch.device, tiles: Tiles, **arguments: Any) -> None:
    _launch(kernel, programs, device, tiles.warps, tiles.stages, **arguments)


def _cut(
    channels: int, height: int, width: int, classes: int, channels_last: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Shape, Policy]:
    pixels = height * width
    # A single pixel is stored alike in both layouts, and loads faster as channels side by side.
    channels_last = channels_last or pixels == 1
    strides = (channels, 1) if channels_last else (1, pixels)
    problem = Problem(channels, pixels, classes, channels_last, dtype, arch(device.index))
    return Shape(channels, pixels, width, classes, *strides), policy(problem)


def _cut_of(features: Tensor, weight: Tensor) -> tuple[Shape, Policy]:
    _, channels, height, width = features.shape
    channels_last = not features.is_contiguous()
    return _cut(channels, height, width, len(weight), channels_last, features.dtype, features.device)


def _lo_scale(features: Tensor, weight: Tensor) -> int:
    """What the lower half of a weight wider than the features is multiplied by: float16 would lose it to underflow."""
    return 0 if features.dtype == weight.dtype else {torch.float16: 2**11, torch.bfloat16: 2**8}[features.dtype]


def _parts(features: torch.dtype, weight: torch.dtype) -> int:
    """See backward.add_feature_gradient."""
    return 1 if features == torch.float32 else 2 if weight == torch.bfloat16 else 4


def _cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def _twin(twin_map: int, height: int, width: int) -> dict[str, int]:
    names = ("twin_offset", "twin_stride_h", "twin_stride_w")
    return dict(zip(names, TwinMap.of(twin_map).on(height, width), strict=True))


def _check_labels(targets: Tensor | None, classes: int) -> None:
    """Raises IndexError for a label outside [0, L) on a CPU; on a GPU the kernels give that sample NaN."""
    if targets is None or targets.device.type != "cpu" or targets.dim() == 2:
        return
    wrong = targets[(targets < 0) | (targets >= classes)]
    if wrong.numel():
        raise IndexError(f"targets: got class {wrong[0].item()}, expected classes in [0, {classes})")


def head_forward(features, weight, bias, targets, target_table, map_weights, consistency_weight, *flags):
    options, wanted = ops.HeadOptions(*flags[:4]), ops.Wanted(*flags[4:])
    n, (height, width) = len(features) // 2, features.shape[2:]
    _check_labels(targets, len(weight))
    classified = targets is not None
    shapes = ops.Saved.shapes(
        n, features.shape[1], height, width, len(weight), classified, wanted.pooled, wanted.cam_grad
    )
    losses, logits, maps, saved = _forward_outputs(features, len(weight), shapes.size(), classified, wanted)
    pieces = shapes.of(saved) if wanted.gradients else ops.Saved(None, None, None, None)
    shape, cut = _cut_of(features, weight)
    of_pairs = dict(N=n, SHAPE=shape, **_twin(options.twin_map, height, width))
    launch_forward = _forward_of_one_tile if cut.one_tile else _forward_by_tiles
    launch_forward(
        features,
        weight,
        cut,
        bias=bias,
        targets=targets,
        target_table=target_table,
        map_weights=map_weights,
        consistency_weight=consistency_weight,
        P=options.p,
        BOTH_VIEWS=options.both_views,
        **losses,
        logits=logits,
        maps=maps,
        map_grad=pieces.map_grad,
        logit_grad=pieces.logit_grad,
        pooled=pieces.pooled,
        **of_pairs,
    )
    if wanted.cam_grad:
        _launch_tiles(
            forward.cam_grad_kernel,
            n * _cdiv(shape.C, cut.weight.channels) * _cdiv(shape.L, cut.weight.classes),
            features.device,
            cut.weight,
            features=features,
            map_grad=pieces.map_grad,
            cam_grad=pieces.cam_grad,
            TILE=cut.weight,
            SPLIT=features.dtype != torch.float32,
            **of_pairs,
        )
    if options.mean:
        losses = _means(**losses)
    return *losses.values(), logits, maps, saved


def _forward_outputs(features: Tensor, classes: int, saved_size: int, classified: bool, wanted: ops.Wanted):
    """Per-sample losses, and the other outputs in the schema's order."""
    m, _, height, width = features.shape
    n = m // 2

    def output(*shape: int, wanted: bool = True) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=features.device) if wanted else None

    losses = dict(loss=output(n, wanted=classified), classification=output(n, wanted=classified), consistency=output(n))
    logits = output(m, classes, wanted=classified)
    maps = output(m, classes, height, width, wanted=wanted.maps)
    return losses, logits, maps, output(saved_size, wanted=wanted.gradients)


def _forward_of_one_tile(features: Tensor, weight: Tensor, cut: Policy, **head: Any) -> None:
    _launch_tiles(
        forward.head_forward_kernel,
        head["N"],
        features.device,
        cut.forward,
        features=features,
        weight=weight,
        TILE=cut.forward,
        POOL_BY_MMA=cut.pool_by_mma,
        LO_SCALE=_lo_scale(features, weight),
        **head,
    )


def _forward_by_tiles(features: Tensor, weight: Tensor, cut: Policy, **head: Any) -> None:
    shape, pooled = head["SHAPE"], head["pooled"]
    row_tiles = _cdiv(shape.HW, cut.forward.rows)
    if head["maps"] is None:
        head["maps"] = features.new_empty(len(features), shape.L, shape.HW, dtype=torch.float32)
    by_tiles = pooled is not None and row_tiles > 1
    pooled_tiles = pooled.new_empty(len(features), row_tiles, shape.C) if by_tiles else None
    _launch_maps(features, weight, head["maps"], pooled_tiles if by_tiles else pooled, shape, cut.forward)
    _launch(
        forward.head_finish_kernel,
        head["N"],
        features.device,
        pooled_tiles=pooled_tiles,
        ROW_TILES=row_tiles,
        B_ROWS=max(1, min(64, 4096 // cut.all_classes)),  # pixels of all classes' maps that fit in a tile
        B_C=256,
        B_ALL=cut.all_classes,
        **head,
    )


def _launch_maps(
    features: Tensor, weight: Tensor, maps: Tensor, pooled_tiles: Tensor | None, shape: Shape, tiles: Tiles
) -> None:
    _launch_tiles(
        forward.maps_kernel,
        len(features) * _cdiv(shape.HW, tiles.rows) * _cdiv(shape.L, tiles.classes),
        features.device,
        tiles,
        features=features,
        weight=weight,
        maps=maps,
        pooled_tiles=pooled_tiles,
        SHAPE=shape,
        TILE=tiles,
        LO_SCALE=_lo_scale(features, weight),
    )


def _means(**losses: Any) -> dict[str, Any]:
    """Those of the losses that are not None, by the names of mean_kernel."""
    per_sample = next(x for x in losses.values() if x is not None)
    means: dict[str, Any] = {name: None if x is None else x.new_empty(()) for name, x in losses.items()}
    outputs: dict[str, Any] = {f"mean_{name}": x for name, x in means.items()}
    _launch(cross_entropy.mean_kernel, 3, per_sample.device, N=len(per_sample), B=1024, **losses, **outputs)
    return means


def _stride(upstream: Tensor | None) -> int:
    return upstream.stride(0) if upstream is not None and upstream.dim() else 0


def head_backward(
    d_loss,  # () or (N,), like the next two, or None
    d_classification,
    d_consistency,
    d_logits,  # (2N, L) or None
    weight,
    saved,
    n,
    height,
    width,
    with_logit_grad,
    with_pooled,
    with_cam_grad,
    consistency_weight,
    twin_map,
    mean,
    dtype,
    channels_last,
    need_features,
    need_weight,
    need_bias,
):
    classes, channels = weight.shape
    shapes = ops.Saved.shapes(n, channels, height, width, classes, with_logit_grad, with_pooled, with_cam_grad)
    pieces = shapes.of(saved)
    d_logits = d_logits if d_logits is None else d_logits.contiguous()
    shape, cut = _cut(channels, height, width, classes, channels_last, dtype, weight.device)
    tiles = cut.backward
    size = (2 * n, channels, height, width)
    d_features = ops.empty_features(weight, size, dtype, channels_last, need_features)
    d_weight = weight.new_empty(weight.shape) if need_weight else None
    d_bias = weight.new_empty(classes) if need_bias else None
    chunk_size = max(_CHUNK, _cdiv(n, _CHUNKS))
    chunks = max(1, _cdiv(n, chunk_size)) if need_weight or need_bias else 0
    partial = weight.new_empty(chunks if chunks > 1 else 0, weight.numel() + classes, dtype=torch.float32)
    w_programs = chunks * _cdiv(classes, tiles.classes) * (_cdiv(channels, cut.weight.channels) if need_weight else 1)
    f_programs = n * _cdiv(channels, tiles.channels) * _cdiv(shape.HW, tiles.rows) if need_features else 0
    _launch_tiles(
        backward.head_backward_kernel,
        w_programs + f_programs,
        weight.device,
        tiles,
        d_loss=d_loss,
        d_classification=d_classification,
        d_consistency=d_consistency,
        d_logits=d_logits,
        weight=weight,
        map_grad=pieces.map_grad,
        logit_grad=pieces.logit_grad,
        pooled=pieces.pooled,
        cam_grad=pieces.cam_grad,
        d_features=d_features,
        d_weight=d_weight,
        d_bias=d_bias,
        partial=partial,
        N=n,
        chunk_size=chunk_size,
        d_loss_stride=_stride(d_loss),
        d_classification_stride=_stride(d_classification),
        d_consistency_stride=_stride(d_consistency),
        consistency_weight=consistency_weight,
        share=1.0 / max(n, 1) if mean else 1.0,
        w_programs=w_programs,
        SHAPE=shape,
        CUT=cut,
        PARTS=_parts(dtype, weight.dtype),
        **_twin(twin_map, height, width),
    )
    if chunks > 1:
        _sum_chunks(partial, d_weight, d_bias, weight.numel(), classes)
    return d_features, d_weight, d_bias


def _sum_chunks(partial: Tensor, out: Tensor | None, more: Tensor | None, size: int, size_more: int) -> None:
    _launch(
        backward.sum_chunks_kernel,
        _cdiv(size + size_more, 256),
        partial.device,
        warps=2,
        partial=partial,
        out=out,
        more=more,
        chunks=len(partial),
        SIZE=size,
        SIZE_MORE=size_more,
        B=256,
    )


def cam_forward(features, weight):
    m, _, height, width = features.shape
    maps = features.new_empty(m, len(weight), height, width, dtype=torch.float32)
    shape, cut = _cut_of(features, weight)
    _launch_maps(features, weight, maps, None, shape, cut.forward)
    return maps


def cam_backward(d_maps, features, weight, dtype, channels_last, need_features, need_weight):
    m, classes, height, width = d_maps.shape
    channels = weight.shape[1]
    d_maps = d_maps.contiguous()
    shape, cut = _cut(channels, height, width, classes, channels_last, dtype, weight.device)
    d_features = d_weight = None
    if need_features:
        d_features = ops.empty_features(weight, (m, channels, height, width), dtype, channels_last, True)
        tiles = cut.backward
        _launch_tiles(
            backward.cam_backward_kernel,
            m * _cdiv(channels, tiles.channels) * _cdiv(shape.HW, tiles.rows),
            weight.device,
            tiles,
            d_maps=d_maps,
            weight=weight,
            d_features=d_features,
            SHAPE=shape,
            TILE=tiles,
            PARTS=_parts(dtype, weight.dtype),
        )
    if need_weight:
        d_weight = weight.new_empty(weight.shape)
        tiles = cut.weight
        chunks = min(m, _CHUNKS)
        partial = weight.new_empty(chunks, classes, channels, dtype=torch.float32)
        _launch_tiles(
            backward.cam_weight_kernel,
            chunks * _cdiv(channels, tiles.channels) * _cdiv(classes, tiles.classes),
            weight.device,
            tiles,
            d_maps=d_maps,
            features=features,
            partial=partial,
            M=m,
            chunks=chunks,
            SHAPE=shape,
            TILE=tiles,
            SPLIT=dtype != torch.float32,
        )
        _sum_chunks(partial, d_weight, None, weight.numel(), 0)
    return d_features, d_weight


def _rows(logits: Tensor) -> tuple[int, dict[str, int]]:
    """Programs, and the arguments that the kernels on rows of logits share."""
    m, classes = logits.shape
    _, cut = _cut(1, 1, 1, classes, True, torch.float32, logits.device)
    return _cdiv(m, cut.batch), dict(M=m, L=classes, B_BATCH=cut.batch, B_ALL=cut.all_classes)


def cross_entropy_forward(logits, targets, target_table, mean):
    _check_labels(targets, logits.shape[1])
    losses = logits.new_empty(len(logits), dtype=compute_dtype(logits.dtype))
    programs, rows = _rows(logits)
    _launch(
        cross_entropy.cross_entropy_forward_kernel,
        programs,
        logits.device,
        logits=logits,
        targets=targets,
        target_table=target_table,
        losses=losses,
        **rows,
    )
    return _means(loss=losses, classification=None, consistency=None)["loss"] if mean else losses


def cross_entropy_backward(d_loss, logits, targets, target_table, mean):
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    programs, rows = _rows(logits)
    _launch(
        cross_entropy.cross_entropy_backward_kernel,
        programs,
        logits.device,
        d_loss=d_loss,
        logits=logits,
        targets=targets,
        target_table=target_table,
        d_logits=d_logits,
        d_loss_stride=_stride(d_loss),
        share=1.0 / max(len(logits), 1) if mean else 1.0,
        **rows,
    )
    return d_logits


def paired_views(images, indices, samples, epoch_tensor, epoch, seed, *rest):
    *plan, twin_map, both, dtype = rest
    plan = ViewPlan(*plan)
    n, (k, h, w, channels), (height, width) = len(indices), images.shape, plan.size
    shape = (n * (1 + both), channels, height, width)
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    offset, stride_h, stride_w = TwinMap.of(twin_map).on(height, width)
    flip, noise, erase = plan.chances
    _launch(
        views.paired_views_kernel,
        n * _cdiv(height * width, _VIEW_PIXELS),
        images.device,
        fused=False,
        images=images,
        indices=indices,
        samples=samples,
        epoch_tensor=epoch_tensor,
        out=out,
        K=k,
        N=n,
        seed=seed,
        epoch=epoch,
        mean=views.Colours(*(plan.mean * 3)[:3]),
        std=views.Colours(*(plan.std * 3)[:3]),
        flip_chance=flip,
        noise_chance=noise,
        erase_chance=erase,
        reach_y=plan.reach[0],
        reach_x=plan.reach[1],
        crop=views.Rectangle(*plan.crop),
        brightness=plan.brightness,
        contrast=plan.contrast,
        noise=plan.noise,
        erase=views.Rectangle(*plan.erase),
        twin_offset=offset,
        twin_stride_h=stride_h,
        twin_stride_w=stride_w,
        SHAPE=views.Shape(h, w, channels, height, width),
        SHIFTED=any(plan.reach),
        NOISE=noise > 0,
        ERASE=erase > 0,
        BOTH=both,
        B=_VIEW_PIXELS,
    )
    return out


#: Compiled kernels serve CUDA (and ROCm) tensors, Triton's interpreter CPU tensors.
_DISPATCH_KEY = "CPU" if INTERPRETED else "CUDA"
_OPERATORS = (
    head_forward,
    head_backward,
    cam_forward,
    cam_backward,
    cross_entropy_forward,
    cross_entropy_backward,
    paired_views,
)
for _operator in _OPERATORS:
    ops.register("triton", _operator.__name__, _operator, _DISPATCH_KEY)
