"""The mathematics in plain PyTorch, equation by equation: the truth the kernels are tested against.

It imports nothing of the package, takes any floating dtype (16-bit features are computed in float32) on any
device, and differentiates by PyTorch's own autograd, to any order.

Notation (N images, C channels, an H x W map, L classes):

    F, F~   features of the images and of their twins, packed as ``features`` (2N, C, H, W)
    A, A~   class activation maps (CAM), Eq. 2: A = sum_c W[l, c] F[:, c], without the bias
    T       the spatial map that undoes the twin's transform
    S       the residual A - T(A~)
    z, z~   logits: z = W P + b with P = mean_hw F, so z = mean_hw(A) + b
    v       ``map_weights`` (L,), B^(1/p) for the class weights B of Eq. 4
    t       target distribution, a row of ``target_table`` (Eq. 8)

Gradients, with g_S and g_z the upstream of the two losses (divided by N under "mean") and G_z that of the logits:

    dS = g_S p v |v S|^(p-1) sign(v S) / (L H W)         dz = g_z (sum_l t_l softmax(z) - t) + G_z
    U  = W^T dS                                          dF = U + W^T dz / (H W),  dF~ = -T^T(U) + W^T dz~ / (H W)
    dW = dz^T P + dz~^T P~ (+ sum dS (F - T F~) unless the CAM's weight is detached)          db = sum dz + sum dz~

dF has rank L in the channels, which is why nothing of its size ever needs to be stored between the passes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What was done to the twin, as torch would do it, and T, which undoes it on a map.
TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (lambda x: x, lambda a: a),
    "hflip": (lambda x: x.flip(-1), lambda a: a.flip(-1)),
    "vflip": (lambda x: x.flip(-2), lambda a: a.flip(-2)),
    "rot90": (lambda x: x.rot90(1, (-2, -1)), lambda a: a.rot90(-1, (-2, -1))),
    "rot180": (lambda x: x.rot90(2, (-2, -1)), lambda a: a.rot90(-2, (-2, -1))),
    "rot270": (lambda x: x.rot90(3, (-2, -1)), lambda a: a.rot90(-3, (-2, -1))),
    "transpose": (lambda x: x.transpose(-2, -1), lambda a: a.transpose(-2, -1)),
}


class HeadLoss(NamedTuple):
    """What ``rebalanced_head_loss`` returns. Losses are scalars under "mean", (N,) under "none"."""

    loss: Tensor  #: classification + consistency_weight * consistency (Eq. 6)
    classification: Tensor  #: Eq. 1
    consistency: Tensor  #: Eq. 5
    logits: Tensor  #: (2N, L)
    maps: Tensor | None  #: (2N, L, H, W) CAM of both views as computed, never differentiable; None unless asked for


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken and losses, logits and maps are returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    kind = tensor.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)  # which has none


def class_activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    """Eq. 2: A[m, l, h, w] = sum_c weight[l, c] features[m, c, h, w]; (M, C, H, W), (L, C) -> (M, L, H, W)."""
    dtype = compute_dtype(features.dtype)
    with _without_autocast(features):
        return torch.nn.functional.linear(features.to(dtype).movedim(1, 3), weight.to(dtype)).movedim(3, 1)


def attention_consistency(
    features: Tensor,  # (2N, C, H, W)
    weight: Tensor,  # (L, C)
    map_weights: Tensor,  # (L,)
    *,
    p: int = 2,
    transform: str = "hflip",
    detach_cam_weight: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Eq. 5: 1 / (N L H W) sum |v_l S|^p with S = A - T(A~); "none" keeps the N samples apart."""
    cams = class_activation_maps(features, weight.detach() if detach_cam_weight else weight)
    n = cams.shape[0] // 2
    residual = cams[:n] - TRANSFORMS[transform][1](cams[n:])
    weighted = map_weights.to(residual.dtype)[:, None, None] * residual
    per_sample = (weighted.abs() if p == 1 else weighted.square()).mean((1, 2, 3))
    return _reduce(per_sample, reduction)


def rebalanced_cross_entropy(
    logits: Tensor,  # (M, L)
    targets: Tensor,  # (M,) classes or (M, L) distributions
    target_table: Tensor,  # (L, L)
    *,
    reduction: str = "mean",
) -> Tensor:
    """-sum_l t_l log softmax(z)_l with t = target_table[y], or targets @ target_table; 0 log 0 = 0."""
    logits = logits.to(compute_dtype(logits.dtype))
    with _without_autocast(logits):
        t = target_distribution(targets, target_table.to(logits.dtype))
    log_softmax = logits.log_softmax(1)
    without_part = (t == 0) & (log_softmax == -torch.inf)  # a class masked by a logit of -inf
    return _reduce(-(t * log_softmax.masked_fill(without_part, 0)).sum(1), reduction)


def rebalanced_head_loss(
    features: Tensor,  # (2N, C, H, W)
    weight: Tensor,  # (L, C)
    bias: Tensor | None,  # (L,)
    targets: Tensor,  # (N,) or (N, L)
    *,
    target_table: Tensor,  # (L, L)
    map_weights: Tensor,  # (L,)
    consistency_weight: float | Tensor = 2.0,
    p: int = 2,
    transform: str = "hflip",
    views: str = "both",
    detach_cam_weight: bool = True,
    reduction: str = "mean",
    return_maps: bool = False,
) -> HeadLoss:
    """Eq. 6: l = l_cls + lambda l_cons, with l_cls summed over both views (Eq. 1) or of the original view only."""
    logits = logits_of(features, weight, bias)
    n = features.shape[0] // 2
    classification = rebalanced_cross_entropy(logits[:n], targets, target_table, reduction=reduction)
    if views == "both":
        twin = rebalanced_cross_entropy(logits[n:], targets, target_table, reduction=reduction)
        classification = classification + twin
    consistency = attention_consistency(
        features,
        weight,
        map_weights,
        p=p,
        transform=transform,
        detach_cam_weight=detach_cam_weight,
        reduction=reduction,
    )
    loss = combine(classification, consistency, consistency_weight)
    maps = class_activation_maps(features.detach(), weight.detach()) if return_maps else None
    return HeadLoss(loss, classification, consistency, logits, maps)


def logits_of(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """z = W P + b with the mean P over the map: (M, C, H, W), (L, C), (L,) -> (M, L)."""
    dtype = compute_dtype(features.dtype)
    with _without_autocast(features):
        pooled = features.mean((2, 3), dtype=dtype)
        return torch.nn.functional.linear(pooled, weight.to(dtype), None if bias is None else bias.to(dtype))


def combine(classification: Tensor, consistency: Tensor, consistency_weight: float | Tensor) -> Tensor:
    """Eq. 6, in the dtype of the losses whatever that of a lambda."""
    if isinstance(consistency_weight, Tensor):
        consistency_weight = consistency_weight.to(consistency.dtype).reshape(())
    return classification + consistency_weight * consistency


def target_distribution(targets: Tensor, table: Tensor) -> Tensor:
    """(M, L) target distributions t. A class outside [0, L) is NaN, and an IndexError on a CPU where it can be read."""
    if targets.is_floating_point():
        return targets.to(table.dtype) @ table
    classes = targets.long()  # uint64 from 2^63 on becomes negative, which is outside too
    valid = (classes >= 0) & (classes < table.shape[0])
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    readable = not traced and not torch._C._are_functorch_transforms_active()
    if targets.device.type == "cpu" and readable and not bool(valid.all()):
        wrong = targets.tolist()[int(valid.logical_not().nonzero()[0])]
        raise IndexError(f"targets: got class {wrong}, expected classes in [0, {len(table)})")
    rows = table[torch.where(valid, classes, 0)]
    return rows.masked_fill(~valid[:, None], float("nan"))


def _reduce(per_sample: Tensor, reduction: str) -> Tensor:
    return per_sample.mean() if reduction == "mean" else per_sample


_LOW = 0xFFFFFFFF
_FIRST_NOISE = 4  #: draws 0 to 3 are the image's own numbers, each later one is a pixel's noise


class ViewPlan(NamedTuple):
    """What is done to every image alike, in the numbers that the kernels read."""

    size: tuple[int, int]  #: H, W of the views
    mean: tuple[float, ...]  #: of each channel
    std: tuple[float, ...]
    chances: tuple[int, int, int]  #: an image is flipped, noisy, erased if a random 32-bit word is below
    reach: tuple[int, int]  #: largest shift in pixels of the image, down and right
    crop: tuple[float, float, float]  #: smallest area, its range, the range of the ratio
    brightness: float
    contrast: float
    noise: float
    erase: tuple[float, float, float]  #: as of the crop


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """H and W."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def numbers(values: float | Sequence[float]) -> list[float]:
    """One number or several, as a list."""
    return list(values) if isinstance(values, Sequence) else [values]


def view_plan(
    augment: Any, shape: tuple[int, ...], size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> ViewPlan:
    """For images of ``shape`` (h, w, channels); ``augment`` is an ``Augment`` or None."""
    h, w, channels = shape
    centre, spread = (tuple(map(float, values)) * (channels // len(values)) for values in (mean, std))
    if augment is None:
        return ViewPlan(size, centre, spread, (0, 0, 0), (0, 0), (1.0, 0.0, 0.0), 0.0, 0.0, 0.0, (0.0, 0.0, 0.0))
    (smallest, largest), (erase_smallest, erase_largest) = augment.crop_scale, augment.erase_scale
    noisy = augment.noise_probability if augment.noise else 0.0
    return ViewPlan(
        size,
        centre,
        spread,
        chances=(round(augment.flip * 2**32), round(noisy * 2**32), round(augment.erase_probability * 2**32)),
        reach=(int(augment.shift * h), int(augment.shift * w)),
        crop=(smallest, largest - smallest, augment.crop_ratio - 1 if smallest < 1 else 0.0),
        brightness=augment.brightness,
        contrast=augment.contrast,
        noise=augment.noise,
        erase=(erase_smallest, erase_largest - erase_smallest, augment.erase_ratio - 1),
    )


def philox(seed: int, counter: tuple[Any, Any, Any, Any]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011): four random words in [0, 2^32) of a 64-bit seed and four counter words.

    Counters are int64 tensors that broadcast, or numbers, in [0, 2^32); words are int64.

    >>> [hex(word) for word in philox(0, (0, 0, 0, torch.tensor(0)))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        # Signed 64-bit products wrap, which leaves their bits as they are; the shift's copies of the sign are masked.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 & _LOW ^ c1 ^ k0, b & _LOW, a >> 32 & _LOW ^ c3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """[0, 1) in float32, by the upper 24 bits."""
    return (word >> 8).float() * 2.0**-24


def _ratio(word: Tensor, spread: float) -> Tensor:
    """From [1, 1 + spread), or the inverse of such a number, by the uppermost bit."""
    ratio = 1 + spread * _uniform(word * 2 & _LOW)
    return torch.where(word >> 31 == 1, 1 / ratio, ratio)


def _root(x: Tensor) -> Tensor:
    """Square root in float32, rounded correctly, which PyTorch's own on a CPU is not; by float64 it always is."""
    return x.double().sqrt().float()


def paired_views(
    images: Tensor,
    indices: Tensor,
    *,
    out_size: int | tuple[int, int],
    mean: float | Sequence[float],
    std: float | Sequence[float],
    seed: int,
    epoch: int | Tensor,
    samples: Tensor | None = None,
    augment: Any = None,
    transform: str = "hflip",
    views: str = "both",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Views of images and their twins, (2N, C, H, W), or (N, C, H, W) for "original"; see the public function.

    Float32 arithmetic. What decides which pixels are read or erased is computed in single operations, each rounded
    correctly, in the order that is written here, so that no backend decides otherwise; the rest agrees to rounding.
    """
    size = sides(out_size)
    plan = view_plan(augment, images.shape[1:], size, numbers(mean), numbers(std))
    samples = indices if samples is None else samples
    key = (samples & _LOW, samples >> 32 & _LOW, epoch)
    draws = [philox(seed, (*key, draw)) for draw in range(_FIRST_NOISE)]
    value = _cropped(images, indices, plan, draws)
    _, (_, _, bright, contrasting), (_, _, _, noisy), _ = draws
    contrast = 1 + plan.contrast * (2 * _uniform(contrasting) - 1)
    gain = (1 + plan.brightness * (2 * _uniform(bright) - 1)) * contrast
    value = value * gain[:, None, None, None] + (0.5 - 0.5 * contrast)[:, None, None, None]
    if plan.noise:
        noise = plan.noise * _noise(seed, key, size)[..., : images.shape[3]]
        value = torch.where((noisy < plan.chances[1])[:, None, None, None], value + noise, value)
    centre, spread = (torch.tensor(x, dtype=torch.float32, device=images.device) for x in (plan.mean, plan.std))
    view = (value.clamp(0, 1) - centre) / spread
    view = torch.where(_erased(plan, draws)[..., None], 0.0, view)
    known = (indices >= 0) & (indices < len(images))
    view = torch.where(known[:, None, None, None], view, math.nan).to(dtype).permute(0, 3, 1, 2)
    pair = [view, TRANSFORMS[transform][0](view)] if views == "both" else [view]
    return torch.cat(pair).contiguous(memory_format=torch.channels_last)


def _cropped(images: Tensor, indices: Tensor, plan: ViewPlan, draws: list[tuple[Tensor, ...]]) -> Tensor:
    """(N, H, W, C) in [0, 1]: of each image the box that its numbers choose, mirrored or not."""
    (area_or_down, ratio_or_right, flip, _), (down, right, _, _) = draws[:2]
    (h, w), (height, width), device = images.shape[1:3], plan.size, images.device
    box_h: Any = float(h)
    box_w: Any = float(w)
    if plan.reach != (0, 0):
        top = (area_or_down * (2 * plan.reach[0] + 1) >> 32).float() - plan.reach[0]
        left = (ratio_or_right * (2 * plan.reach[1] + 1) >> 32).float() - plan.reach[1]
    else:
        area, ratio = plan.crop[0] + plan.crop[1] * _uniform(area_or_down), _ratio(ratio_or_right, plan.crop[2])
        wide = _root(area * ratio).clamp(max=1).maximum(area)  # the nearest ratio with which the box fits
        box_h, box_w = area / wide * h, wide * w
        top, left = _uniform(down) * (h - box_h), _uniform(right) * (w - box_w)

    def taps(place: Tensor, start: Tensor, scale: Any, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The two pixels between whose centres that of an output pixel is, and the second's share."""
        at = (place + 0.5) * torch.as_tensor(scale).view(-1, 1).to(device) + (start - 0.5)[:, None]
        first = at.floor()
        return first.clamp(0, count - 1).long(), (first + 1).clamp(0, count - 1).long(), at - first

    y, x = torch.arange(height, device=device)[None], torch.arange(width, device=device)[None]
    x = torch.where((flip < plan.chances[0])[:, None], width - 1 - x, x)
    (y0, y1, dy), (x0, x1, dx) = taps(y, top, box_h / height, h), taps(x, left, box_w / width, w)
    dy, dx = dy[:, :, None, None], dx[:, None, :, None]
    # An index that is none reads the first image; without images there is nothing to read.
    row = torch.where((indices >= 0) & (indices < len(images)), indices, 0)[:, None, None]
    images = images if len(images) else images.new_zeros(1, *images.shape[1:])

    def between(y: Tensor) -> Tensor:
        first, second = (images[row, y[:, :, None], x[:, None, :]].float() for x in (x0, x1))
        return first + dx * (second - first)

    upper = between(y0)
    return (upper + dy * (between(y1) - upper)) * (1 / 255)


def _noise(seed: int, key: tuple[Any, ...], size: tuple[int, int]) -> Tensor:
    """(N, H, W, 3) standard normal numbers of each pixel, by Box and Muller's method."""
    samples = key[0]
    pixel = torch.arange(size[0] * size[1], device=samples.device)[None] + _FIRST_NOISE
    low, high, epoch = (x[:, None] if isinstance(x, Tensor) and x.dim() else x for x in key)
    a, b, c, d = philox(seed, (low, high, epoch, pixel))
    near, far = ((-2 * (_uniform(word) + 2.0**-24).log()).sqrt() for word in (a, c))
    turn, other = (2 * math.pi * _uniform(word) for word in (b, d))
    return torch.stack([near * turn.cos(), near * turn.sin(), far * other.cos()], -1).unflatten(1, size)


def _erased(plan: ViewPlan, draws: list[tuple[Tensor, ...]]) -> Tensor:
    """(N, H, W) which pixels are in the rectangle of an image that has one."""
    (erases, area_word, ratio_word, _), (down, right, _, _) = draws[2:4]
    (height, width), device = plan.size, erases.device
    area = (plan.erase[0] + plan.erase[1] * _uniform(area_word)) * (height * width)
    ratio = _ratio(ratio_word, plan.erase[2])
    across = _root(area * ratio).clamp(max=width).maximum(area / height)  # as of the crop
    tall, wide = (
        (side + 0.5).floor().clamp(1, most).long() for side, most in ((area / across, height), (across, width))
    )
    top, left = down * (height - tall + 1) >> 32, right * (width - wide + 1) >> 32
    y, x = torch.arange(height, device=device)[None], torch.arange(width, device=device)[None]
    inside_y = (y >= top[:, None]) & (y < (top + tall)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + wide)[:, None])
    return (erases < plan.chances[2])[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
