"""The same loss in the ways people write it, each from only the formulas, and the proof that it is the same.

A formulation takes a :class:`bench.cases.Problem` and returns the loss of Eq. 6 (p = 2, horizontal flip,
both views, detached CAM weight). The exception is ``identity``, which reads and writes what any of them must and
computes nothing: the practical floor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import rebalfer_kernels as rk
from rebalfer_kernels.backend import BACKENDS

from .cases import Problem
from .results import reason

Formulation = Callable[[Problem], Tensor]

#: Largest relative L2 error of the loss or a gradient. A 16-bit formulation rounds its maps and logits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def ours(x: Problem, backend: str | None = None) -> Tensor:
    """The library's head, on the backend it chooses or the one that is named."""
    return rk.rebalanced_head_loss(*x[:4], backend=backend, **x.options()).loss


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return features.sum()

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> Tensor:
        return torch.full_like(ctx.saved_tensors[0], 1.0)


def identity(x: Problem) -> Tensor:
    """The identity op: reads 2s and writes 2s."""
    return _Identity.apply(x.features)


def plain_eager(x: Problem) -> Tensor:
    """GAP and FC for the logits, an einsum for the maps: what people write."""
    logits = F.linear(x.features.mean((2, 3)), x.weight, x.bias)
    maps = torch.einsum("lc,mchw->mlhw", x.weight.detach(), x.features)
    cams, twin_cams = maps.chunk(2)
    return _loss(x, logits, cams, twin_cams.flip(-1))


def best_eager(x: Problem) -> Tensor:
    """The features are multiplied once: z = mean(A) + b, and (W - W.detach()) P is zero with the gradient of W P."""
    cam_weight = x.weight.detach()
    if x.features.is_contiguous():
        flat = x.features.flatten(2)
        maps = torch.bmm(cam_weight.expand(len(flat), -1, -1), flat).unflatten(2, x.features.shape[2:])
    else:
        maps = F.linear(x.features.permute(0, 2, 3, 1), cam_weight).permute(0, 3, 1, 2)
    with torch.no_grad():
        pooled = x.features.mean((2, 3))
    logits = maps.mean((2, 3)) + F.linear(pooled, x.weight - cam_weight) + x.bias
    cams, twin_cams = maps.chunk(2)
    return _loss(x, logits, cams, twin_cams.flip(-1))


def released(x: Problem) -> Tensor:
    """As in the programs released with the papers: the 2N x L x C x H x W product, GAP, FC, a sampled flip."""
    logits = F.linear(F.adaptive_avg_pool2d(x.features, 1).flatten(1), x.weight, x.bias)
    maps = (x.features.unsqueeze(1) * x.weight.detach()[None, :, :, None, None]).sum(2)
    cams, twin_cams = maps.chunk(2)
    height, width = cams.shape[2:]
    grid = _flip_grid(height, width, cams.dtype, cams.device).expand(len(cams), -1, -1, -1)
    twin_cams = F.grid_sample(twin_cams, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return _loss(x, logits, cams, twin_cams)


@functools.cache
def _flip_grid(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    y, x = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width))
    y, x = torch.meshgrid(y, -x, indexing="ij")
    return torch.stack((x, y), -1).to(device, dtype)


def _loss(x: Problem, logits: Tensor, cams: Tensor, untransformed_twin_cams: Tensor) -> Tensor:
    soft = x.target_table[x.targets]
    image, twin = logits.to(soft.dtype).chunk(2)
    classification = F.cross_entropy(image, soft) + F.cross_entropy(twin, soft)
    S = cams - untransformed_twin_cams
    return classification + x.consistency_weight * (x.map_weights[:, None, None] * S).square().mean()


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


def fused_backends(device: str) -> list[str]:
    """Names of the backends with kernels for this type of device, available or not."""
    return [backend.name for backend in BACKENDS.values() if backend.fused and device in backend.devices()]


def on_each_backend(names: Iterable[str]) -> dict[str, Formulation]:
    """The library's head on each of these that is available, by its name."""
    return {name: functools.partial(ours, backend=name) for name in names if BACKENDS[name].available().ok}


def truth(name: str, problem: Problem) -> list[Tensor | None]:
    """Loss and gradients to features, weight and bias, in float64, from the library's reference."""
    exact = problem.double()
    if name == "identity":
        return [exact.features.detach().sum(), torch.ones_like(exact.features), None, None]
    loss = rk.reference.rebalanced_head_loss(*exact[:4], **exact.options()).loss
    return [loss.detach(), *torch.autograd.grad(loss, exact[:3])]


def prove(problem: Problem, formulations: dict[str, Formulation]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The errors, by name, of those whose loss and gradients are float64's, and what is wrong with the others."""
    errors, refused = {}, []
    expected = functools.cache(lambda name: truth(name, problem))
    for name, formulation in formulations.items():
        exact = expected("identity" if name == "identity" else "head")
        error, why = math.inf, None
        try:
            error = worst_error(formulation, problem, exact)
        except Exception as failure:  # it cannot be compiled here, say; the others can still be measured
            why = reason(failure)
        if error <= TOLERANCE[problem.features.dtype]:
            errors[name] = error
        else:
            refused.append({"contender": name, "error": error if math.isfinite(error) else None, "reason": why})
            print(f"  {name}: refused, {why or f'relative error {error:.2g}'}", flush=True)
    return errors, refused


def worst_error(formulation: Formulation, problem: Problem, expected: list[Tensor | None]) -> float:
    """The largest relative L2 error of the loss and the gradients; infinite for a missing, surplus or NaN one."""
    loss = formulation(problem)
    got = [loss.detach(), *torch.autograd.grad(loss, problem[:3], allow_unused=True)]
    return max(relative_error(g, e) for g, e in zip(got, expected, strict=True))


def relative_error(got: Tensor | None, expected: Tensor | None) -> float:
    if got is None or expected is None:
        return 0.0 if got is expected else math.inf
    error = ((got.double() - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf
