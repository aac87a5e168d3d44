"""The operators of ops.py by the Triton kernels: what is launched, how often, on which device.

Launches of one call:

    forward     1, under "mean" 1 more that sums the N per-sample losses in one order: a counter by which the last
                program finds itself needs memory that is zeroed, which is a launch too, or that is kept per device,
                stream and graph. Maps beyond one tile (triton_tiles): 1 more, as no program sees a whole pair.
                The CAM's weight not detached: 1 more, which reads the features again when S is known.
    backward    1. The programs for weight and bias are the first of the launch; they need only S, z and P, not dF.
                More than 128 samples: 1 more, to add up what such programs summed over 128 samples and more each.
    maps        forward 1; backward 1 for the features and 2 for the weight, sums over chunks of the batch, and theirs.
    cross-entropy   forward 1, under "mean" 2; backward 1.

C is never split over programs: the sums over C of one pair are one program's, in one order. Nothing waits for the GPU
(no sync, no host read), so all of it can be captured in a CUDA graph; upstream gradients are read on the device.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import ops
from . import triton_kernels as kernels
from .reference import compute_dtype
from .transforms import TwinMap
from .triton_tiles import Policy, Problem, Tiles, policy

INTERPRETED = kernels.INTERPRETED

#: A sum over the batch is one program's up to so many samples; beyond, that of at most so many chunks of the batch.
_CHUNK, _CHUNKS = 128, 64


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
    """Compile and launch a kernel that does nothing, on the current device; whatever stands in the way is raised."""
    kernels.empty_kernel[(1,)]()


def _launch(kernel: Any, programs: int, tensor: Tensor, *arguments: Any, warps: int, stages: int = 1, **constants: Any):
    """On the current stream of the device of ``tensor``."""
    if programs == 0:
        return
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        # Triton 3.10 no longer fuses multiply and add unless told to.
        kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants)


def _problem(channels: int, height: int, width: int, classes: int, channels_last: bool, dtype, device) -> Problem:
    pixels = height * width  # a single one lies alike in both layouts, and channels side by side load faster
    return Problem(channels, pixels, classes, channels_last or pixels == 1, dtype, arch(device.index))


def _geometry(problem: Problem, height: int, width: int) -> dict[str, Any]:
    """The constants that every kernel on features takes."""
    row, channel = (problem.channels, 1) if problem.channels_last else (1, problem.pixels)
    return dict(C=problem.channels, H=height, W=width, L=problem.classes, S_HW=row, S_C=channel)


def _tile(tiles: Tiles) -> dict[str, Any]:
    return dict(
        B_ROWS=tiles.rows, B_C=tiles.channels, B_L=tiles.classes, warps=tiles.warps, stages=tiles.stages
    )  # fmt: skip


def _lo_scale(features: torch.dtype, weight: torch.dtype) -> int:
    """What the lower half of a weight wider than the features is multiplied by: float16 would lose it to underflow."""
    return 0 if features == weight else {torch.float16: 2**11, torch.bfloat16: 2**8}[features]


def _parts(features: torch.dtype, weight: torch.dtype) -> int:
    """See triton_kernels.spread."""
    return 1 if features == torch.float32 else 2 if weight == torch.bfloat16 else 4


def _cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def _is_channels_last(features: Tensor) -> bool:
    return not features.is_contiguous()


def _soft(targets: Tensor | None) -> bool:
    return targets is not None and targets.dim() == 2


def _check_labels(targets: Tensor | None, classes: int) -> None:
    """Raises IndexError for a label outside [0, L) on a CPU; on a GPU the kernels give that sample NaN."""
    if targets is None or targets.device.type != "cpu" or targets.dim() == 2:
        return
    wrong = targets[(targets < 0) | (targets >= classes)]
    if wrong.numel():
        raise IndexError(f"targets: got class {wrong[0].item()}, expected classes in [0, {classes})")


def _or_none(tensor: Tensor | None) -> Tensor | None:
    """Outputs and saved tensors that are not wanted are empty in the operators' schemas, None in the kernels."""
    return None if tensor is None or tensor.dim() == 1 and tensor.shape[0] == 0 else tensor


def head_forward(
    features, weight, bias, targets, target_table, map_weights, consistency_weight, p, twin_map, both_views, mean,
    with_maps, save_residual, save_pooled, save_cam_grad,
):  # fmt: skip
    m, channels, height, width = features.shape
    n, classes, classified = m // 2, weight.shape[0], targets is not None
    _check_labels(targets, classes)
    problem = _problem(
        channels, height, width, classes, _is_channels_last(features), features.dtype, features.device
    )  # fmt: skip
    cut = policy(problem)
    geometry = _geometry(problem, height, width)
    twin = TwinMap(*twin_map).on(height, width)

    def output(shape: tuple[int, ...], wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=torch.float32, device=features.device)

    losses = [output((n,), classified), output((n,), classified), output((n,))]
    logits = output((m, classes), classified)
    maps = output((m, classes, height, width), with_maps)
    # The gradient K of the CAM's weight is taken from the residual.
    residual = output((n, classes, height, width), save_residual or save_cam_grad)
    pooled = output((m, channels), save_pooled)
    cam_grad = output((n, classes, channels), save_cam_grad)

    loss, classification, consistency = losses
    of_losses = (_or_none_if(loss, classified), _or_none_if(classification, classified), consistency)
    tail = (bias, targets, target_table, map_weights, *of_losses, _or_none_if(logits, classified))
    options = dict(P=p, BOTH_VIEWS=both_views, SOFT=_soft(targets))
    lo_scale = _lo_scale(features.dtype, weight.dtype)
    kept_residual = _or_none_if(residual, save_residual or save_cam_grad)
    kept_pooled = _or_none_if(pooled, save_pooled)
    if cut.one_tile:
        _launch(
            kernels.head_forward_kernel, n, features, features, weight, *tail, _or_none_if(maps, with_maps),
            kept_residual, kept_pooled, n, consistency_weight, *twin, **geometry, **options, LO_SCALE=lo_scale,
            **_tile(cut.forward),
        )  # fmt: skip
    else:
        tiles = cut.forward
        row_tiles = _cdiv(height * width, tiles.rows)
        whole = maps if with_maps else output((m, classes, height, width))
        partial = pooled if row_tiles == 1 else output((m, row_tiles, channels), save_pooled)
        _launch(
            kernels.maps_kernel, m * row_tiles * _cdiv(classes, tiles.classes), features, features, weight, whole,
            _or_none_if(partial, save_pooled), **geometry, LO_SCALE=lo_scale, **_tile(tiles),
        )  # fmt: skip
        _launch(
            kernels.head_finish_kernel, n, features, whole, _or_none_if(partial, save_pooled and row_tiles > 1), *tail,
            kept_residual, kept_pooled, n, consistency_weight, *twin, C=channels, H=height, W=width, L=classes,
            **options, ROW_TILES=row_tiles, B_ROWS=_at_once(cut), B_C=256, B_ALL=cut.all_classes, warps=4,
        )  # fmt: skip
    if save_cam_grad:
        tiles = cut.weight
        _launch(
            kernels.cam_grad_kernel, n * _cdiv(channels, tiles.channels) * _cdiv(classes, tiles.classes), features,
            features, residual, map_weights, cam_grad, n, *twin, **geometry, P=p,
            SPLIT=features.dtype != torch.float32, **_tile(tiles),
        )  # fmt: skip
    if mean:
        losses = _means(losses if classified else [None, None, consistency])
        loss, classification, consistency = (output((), False) if x is None else x for x in losses)
    if not save_residual:
        residual = output((), False)
    return loss, classification, consistency, logits, maps, residual, pooled, cam_grad


def _at_once(cut: Policy) -> int:
    """Pixels of all classes' maps that fit in a tile."""
    return max(1, min(64, 4096 // cut.all_classes))


def _or_none_if(tensor: Tensor, wanted: bool) -> Tensor | None:
    return tensor if wanted else None


def _means(losses: list[Tensor | None]) -> list[Tensor | None]:
    last = losses[-1]
    assert last is not None
    out = [None if x is None else torch.empty((), dtype=torch.float32, device=last.device) for x in losses]
    _launch(kernels.mean_kernel, 1, last, *losses, *out, len(last), B=1024, warps=4)
    return out


def _stride(upstream: Tensor | None) -> int:
    return upstream.stride(0) if upstream is not None and upstream.dim() else 0


def head_backward(
    d_loss, d_classification, d_consistency, d_logits, weight, targets, target_table, map_weights, logits, residual,
    pooled, cam_grad, consistency_weight, p, twin_map, both_views, mean, dtype, channels_last, need_features,
    need_weight, need_bias,
):  # fmt: skip
    n, classes, height, width = residual.shape
    channels = weight.shape[1]
    problem = _problem(channels, height, width, classes, channels_last, dtype, weight.device)
    cut = policy(problem)
    tiles = cut.backward
    d_features = ops.empty_features(weight, (2 * n, channels, height, width), dtype, channels_last, need_features)
    d_weight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=weight.device)
    d_bias = torch.empty((classes,) if need_bias else (0,), dtype=weight.dtype, device=weight.device)
    chunk_size = max(_CHUNK, _cdiv(n, _CHUNKS))
    chunks = max(1, _cdiv(n, chunk_size)) if need_weight or need_bias else 0
    size = channels * classes
    partial = torch.empty((chunks if chunks > 1 else 0, size + classes), dtype=torch.float32, device=weight.device)
    w_programs = chunks * _cdiv(classes, tiles.classes) * (_cdiv(channels, cut.weight.channels) if need_weight else 1)
    f_programs = n * _cdiv(channels, tiles.channels) * _cdiv(height * width, tiles.rows) if need_features else 0
    outputs = (
        _or_none_if(d_features, need_features), _or_none_if(d_weight, need_weight), _or_none_if(d_bias, need_bias),
    )  # fmt: skip
    _launch(
        kernels.head_backward_kernel, w_programs + f_programs, weight, d_loss, d_classification, d_consistency,
        d_logits, weight, targets, target_table, map_weights, _or_none_if(logits, targets is not None), residual,
        _or_none(pooled), _or_none(cam_grad), *outputs, partial, n, chunk_size, _stride(d_loss),
        _stride(d_classification), _stride(d_consistency), consistency_weight, 1.0 / max(n, 1) if mean else 1.0,
        *TwinMap(*twin_map).on(height, width), w_programs, **_geometry(problem, height, width), P=p,
        BOTH_VIEWS=both_views, SOFT=_soft(targets),
        PARTS=_parts(dtype, weight.dtype), **_tile(tiles), B_ALL=cut.all_classes, B_C_WEIGHT=cut.weight.channels,
        B_BATCH=cut.batch,
    )  # fmt: skip
    if chunks > 1:
        _launch(
            kernels.sum_chunks_kernel, _cdiv(size + classes, 256), weight, partial, *outputs[1:], chunks, SIZE=size,
            SIZE_MORE=classes, B=256, warps=2,
        )  # fmt: skip
    return d_features, d_weight, d_bias


def cam_forward(features, weight):
    m, channels, height, width = features.shape
    classes = weight.shape[0]
    maps = torch.empty((m, classes, height, width), dtype=torch.float32, device=features.device)
    problem = _problem(channels, height, width, classes, _is_channels_last(features), features.dtype, features.device)
    tiles = policy(problem).forward
    _launch(
        kernels.maps_kernel, m * _cdiv(height * width, tiles.rows) * _cdiv(classes, tiles.classes), features, features,
        weight, maps, None, **_geometry(problem, height, width), LO_SCALE=_lo_scale(features.dtype, weight.dtype),
        **_tile(tiles),
    )  # fmt: skip
    return maps


def cam_backward(d_maps, features, weight, dtype, channels_last, need_features, need_weight):
    m, classes, height, width = d_maps.shape
    channels = weight.shape[1]
    problem = _problem(channels, height, width, classes, channels_last, dtype, weight.device)
    cut = policy(problem)
    geometry = _geometry(problem, height, width)
    d_features = ops.empty_features(weight, (m, channels, height, width), dtype, channels_last, need_features)
    d_weight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=weight.device)
    if need_features:
        tiles = cut.backward
        _launch(
            kernels.cam_backward_kernel, m * _cdiv(channels, tiles.channels) * _cdiv(height * width, tiles.rows),
            weight, d_maps, weight, d_features, **geometry, PARTS=_parts(dtype, weight.dtype), **_tile(tiles),
        )  # fmt: skip
    if need_weight:
        tiles = cut.weight
        chunks = min(m, _CHUNKS)
        partial = torch.empty((chunks, classes, channels), dtype=torch.float32, device=weight.device)
        _launch(
            kernels.cam_weight_kernel, chunks * _cdiv(channels, tiles.channels) * _cdiv(classes, tiles.classes),
            weight, d_maps, features, partial, m, chunks, **geometry, SPLIT=dtype != torch.float32, **_tile(tiles),
        )  # fmt: skip
        size = classes * channels
        _launch(
            kernels.sum_chunks_kernel, _cdiv(size, 256), weight, partial, d_weight, None, chunks, SIZE=size,
            SIZE_MORE=0, B=256, warps=2,
        )  # fmt: skip
    return d_features, d_weight


def _rows(logits: Tensor) -> tuple[int, int, dict[str, int]]:
    """Programs and constants of the kernels on rows of logits."""
    m, classes = logits.shape
    cut = policy(_problem(1, 1, 1, classes, True, torch.float32, logits.device))
    return _cdiv(m, cut.batch), m, dict(L=classes, B_BATCH=cut.batch, B_ALL=cut.all_classes, warps=4)


def cross_entropy_forward(logits, targets, target_table, mean):
    _check_labels(targets, logits.shape[1])
    programs, m, constants = _rows(logits)
    losses = torch.empty(m, dtype=compute_dtype(logits.dtype), device=logits.device)
    _launch(
        kernels.cross_entropy_forward_kernel, programs, logits, logits, targets, target_table, losses, m,
        SOFT=_soft(targets), **constants,
    )  # fmt: skip
    if not mean:
        return losses
    (_, _, result) = _means([None, None, losses])
    return result


def cross_entropy_backward(d_loss, logits, targets, target_table, mean):
    programs, m, constants = _rows(logits)
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch(
        kernels.cross_entropy_backward_kernel, programs, logits, d_loss, logits, targets, target_table, d_logits, m,
        _stride(d_loss), 1.0 / max(m, 1) if mean else 1.0, SOFT=_soft(targets), **constants,
    )  # fmt: skip
    return d_logits


#: Compiled kernels serve CUDA (and ROCm) tensors, Triton's interpreter CPU tensors.
for _function in (
    head_forward, head_backward, cam_forward, cam_backward, cross_entropy_forward, cross_entropy_backward,
):  # fmt: skip
    ops.register("triton", _function.__name__, _function, "CPU" if INTERPRETED else "CUDA")
