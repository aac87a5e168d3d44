"""The same loss in the ways people write it, each from the formulas alone, and the proof that it is the same.

A formulation takes the fields of :class:`bench.cases.Problem` and returns the loss of Eq. 6 (p = 2, horizontal flip,
both views, detached CAM weight). The exception is ``identity``, which reads and writes what any of them must and
computes nothing: the practical floor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import rebalfer_kernels as rk

from .cases import Problem

Formulation = Callable[..., Tensor]

#: Largest relative L2 error of the loss or a gradient. A 16-bit formulation rounds its maps and logits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def ours(features, weight, bias, targets, table, map_weights, consistency_weight, *, backend=None):
    """The library's head, on the backend it chooses or the one that is named."""
    return rk.rebalanced_head_loss(
        features, weight, bias, targets, target_table=table, map_weights=map_weights,
        consistency_weight=consistency_weight, backend=backend,
    ).loss  # fmt: skip


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features):
        ctx.save_for_backward(features)
        return features.sum()

    @staticmethod
    def backward(ctx, d_sum):
        return torch.full_like(ctx.saved_tensors[0], 1.0)


def identity(features, *_):
    """The identity op: reads 2s and writes 2s."""
    return _Identity.apply(features)


def plain_eager(features, weight, bias, targets, table, map_weights, consistency_weight):
    """GAP and FC for the logits, an einsum for the maps: what people write."""
    logits = F.linear(features.mean((2, 3)), weight, bias)
    maps = torch.einsum("lc,mchw->mlhw", weight.detach(), features)
    cams, twin_cams = maps.chunk(2)
    return _loss(logits, cams, twin_cams.flip(-1), targets, table, map_weights, consistency_weight)


def best_eager(features, weight, bias, targets, table, map_weights, consistency_weight):
    """The features are multiplied once: z = mean(A) + b, and (W - W.detach()) P is zero with the gradient of W P."""
    cam_weight = weight.detach()
    if features.is_contiguous():
        flat = features.flatten(2)
        maps = torch.bmm(cam_weight.expand(len(flat), -1, -1), flat).unflatten(2, features.shape[2:])
    else:
        maps = F.linear(features.permute(0, 2, 3, 1), cam_weight).permute(0, 3, 1, 2)
    with torch.no_grad():
        pooled = features.mean((2, 3))
    logits = maps.mean((2, 3)) + F.linear(pooled, weight - cam_weight) + bias
    cams, twin_cams = maps.chunk(2)
    return _loss(logits, cams, twin_cams.flip(-1), targets, table, map_weights, consistency_weight)


def released(features, weight, bias, targets, table, map_weights, consistency_weight):
    """As in the programs released with the papers: the 2N x L x C x H x W product, GAP, FC, a sampled flip."""
    logits = F.linear(F.adaptive_avg_pool2d(features, 1).flatten(1), weight, bias)
    maps = (features.unsqueeze(1) * weight.detach()[None, :, :, None, None]).sum(2)
    cams, twin_cams = maps.chunk(2)
    grid = _flip_grid(*cams.shape[2:], cams.dtype, cams.device).expand(len(cams), -1, -1, -1)
    twin_cams = F.grid_sample(twin_cams, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return _loss(logits, cams, twin_cams, targets, table, map_weights, consistency_weight)


@functools.cache
def _flip_grid(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    y, x = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width))
    y, x = torch.meshgrid(y, -x, indexing="ij")
    return torch.stack((x, y), -1).to(device, dtype)


def _loss(logits, cams, untransformed_twin_cams, targets, table, map_weights, consistency_weight):
    soft = table[targets]
    image, twin = logits.to(table.dtype).chunk(2)
    classification = F.cross_entropy(image, soft) + F.cross_entropy(twin, soft)
    S = cams - untransformed_twin_cams
    return classification + consistency_weight * (map_weights[:, None, None] * S).square().mean()


FORMULATIONS: dict[str, Formulation] = {
    "ours": ours,
    "identity": identity,
    "plain eager": plain_eager,
    "best eager": best_eager,
    "released": released,
}


def contenders() -> dict[str, Formulation]:
    """Every formulation, and plain and best eager under torch.compile (which compiles at the first call)."""
    torch.compiler.reset()  # or the sizes of earlier cases make it compile for sizes in general
    compiled = {
        f"{name}, compiled": torch.compile(FORMULATIONS[name], fullgraph=True) for name in ("plain eager", "best eager")
    }
    return {**FORMULATIONS, **compiled}


def forced(names: tuple[str, ...]) -> dict[str, Formulation]:
    """The library's head on each of these backends that is there, by its name."""
    return {name: functools.partial(ours, backend=name) for name in names if rk.backends()[name] == "available"}


def truth(name: str, problem: Problem) -> list[Tensor | None]:
    """Loss and gradients to features, weight and bias, in float64, from the library's reference."""
    exact = problem.double()
    if name == "identity":
        return [exact.features.detach().sum(), torch.ones_like(exact.features), None, None]
    loss = rk.reference.rebalanced_head_loss(
        *exact[:4], target_table=exact.table, map_weights=exact.map_weights,
        consistency_weight=exact.consistency_weight,
    ).loss  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, exact[:3])]


def worst_error(formulation: Formulation, problem: Problem, expected: list[Tensor | None]) -> float:
    """The largest relative L2 error of the loss and the gradients; infinite for a missing, surplus or NaN one."""
    loss = formulation(*problem)
    got = [loss.detach(), *torch.autograd.grad(loss, problem[:3], allow_unused=True)]
    return max(relative_error(g, e) for g, e in zip(got, expected, strict=True))


def relative_error(got: Tensor | None, expected: Tensor | None) -> float:
    if got is None or expected is None:
        return 0.0 if got is expected else math.inf
    error = ((got.double() - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf
