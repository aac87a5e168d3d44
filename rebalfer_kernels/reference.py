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
from collections.abc import Callable
from typing import NamedTuple

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
