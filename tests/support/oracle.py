"""Float64 truth written from the formulas, gradients by hand: shares no code with the package.

Index loops and explicit permutations on purpose; slow and small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: transform -> where T(A~)[h, w] reads A~, for an H x W map
READS = {
    "identity": lambda h, w, H, W: (h, w),
    "hflip": lambda h, w, H, W: (h, W - 1 - w),
    "vflip": lambda h, w, H, W: (H - 1 - h, w),
    "rot90": lambda h, w, H, W: (H - 1 - w, h),
    "rot180": lambda h, w, H, W: (H - 1 - h, W - 1 - w),
    "rot270": lambda h, w, H, W: (w, W - 1 - h),
    "transpose": lambda h, w, H, W: (w, h),
}


def head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    table: Tensor,
    v: Tensor,
    *,
    lam: float = 2.0,
    p: int = 2,
    transform: str = "hflip",
    views: str = "both",
    detach: bool = True,
    g_loss: Tensor | float = 1.0,
    g_cls: Tensor | float = 0.0,
    g_cons: Tensor | float = 0.0,
    g_logits: Tensor | None = None,
    mean: bool = True,
) -> dict[str, Tensor]:
    """Losses (per sample, and their mean under ``mean``), logits, maps and gradients of sum(g * output)."""
    F, Wt, table, v = features.double(), weight.double(), table.double(), v.double()
    n2, C, H, W = F.shape
    n, L = n2 // 2, len(Wt)
    hw = H * W
    flat = F.reshape(n2, C, hw)
    read = torch.tensor([a * W + b for h in range(H) for w in range(W) for a, b in [READS[transform](h, w, H, W)]])
    A = torch.stack([Wt @ f for f in flat]) if n2 else flat.new_zeros(0, L, hw)
    S = A[:n] - A[n:][:, :, read]
    P = flat.sum(2) / hw
    z = P @ Wt.T + (0 if bias is None else bias.double())
    t = targets.double() @ table if targets.is_floating_point() else table[targets]
    e = (z - z.max(1, keepdim=True).values).exp() if n2 else z
    soft = e / e.sum(1, keepdim=True)
    ce = -(torch.cat([t, t]) * soft.log()).sum(1)
    cls = ce[:n] + (ce[n:] if views == "both" else 0)
    x = v[None, :, None] * S
    cons = (x.abs() if p == 1 else x * x).sum((1, 2)) / (L * hw)

    ones = torch.ones(n, dtype=torch.float64) / (n if mean else 1)
    g_s = (lam * torch.as_tensor(g_loss).double() + torch.as_tensor(g_cons).double()) * ones
    g_z = (torch.as_tensor(g_loss).double() + torch.as_tensor(g_cls).double()) * ones
    map_grad = p * v[None, :, None] * x.abs() ** (p - 1) * x.sign() / (L * hw)
    dS = g_s[:, None, None] * map_grad
    of_image, of_twin = (t.sum(1, keepdim=True) * s - t for s in (soft[:n], soft[n:]))
    logit_grad = torch.cat([of_image, of_twin * (views == "both")])
    dz = g_z.repeat(2)[:, None] * logit_grad + (0 if g_logits is None else g_logits.double())
    dA = torch.zeros_like(A)
    dA[:n] = dS
    dA[n:][:, :, read] = -dS
    dF = torch.einsum("lc,mlx->mcx", Wt, dA) + (dz @ Wt)[:, :, None] / hw
    dW = dz.T @ P
    if not detach:
        dW = dW + torch.einsum("mlx,mcx->lc", dA, flat)
    reduce = (lambda a: a.mean()) if mean else (lambda a: a)
    return {
        "loss": reduce(cls + lam * cons),
        "classification": reduce(cls),
        "consistency": reduce(cons),
        "logits": z,
        "maps": A.reshape(n2, L, H, W),
        "residual": S,
        "map_grad": map_grad.reshape(n, L, H, W),
        "logit_grad": logit_grad,
        "d_features": dF.reshape(F.shape),
        "d_weight": dW,
        "d_bias": dz.sum(0),
    }


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||; NaN never passes a comparison."""
    difference = (got.double() - truth.double()).norm().item()
    scale = truth.double().norm().item()
    return difference / scale if scale > 0 else difference


def assert_close(got: Tensor, truth: Tensor, tolerance: float, name: str = "") -> None:
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    error = relative_error(got, truth)
    assert error <= tolerance, f"{name}: relative L2 error {error:.3g} > {tolerance:.3g}"


class Errors(NamedTuple):
    """How far a vector is from the truth; 0 where it is right, NaN where it holds one."""

    l2: float  #: ||e|| / ||t|| of the error e and the truth t
    angle: float  #: sine of the angle between them: 0 for a vector that is merely too long
    factor: float  #: <e, t> / <t, t>, signed: 0.01 for a vector that is 1 % too long, where rounding averages out
    offset: float  #: mean(e) / rms(t), signed: what all elements are too large by
    worst: float  #: max |e| / max |t|: one wrong element among many


def errors(got: Tensor, truth: Tensor) -> Errors:
    t = truth.double().flatten()
    e = got.double().flatten() - t
    if not t.any():  # all errors are absolute then
        t = torch.ones_like(t)
    factor = (e @ t / (t @ t)).item()
    across = (e - factor * t).norm() / (t + e).norm()
    return Errors(
        (e.norm() / t.norm()).item(),
        across.item(),
        factor,
        (e.mean() / t.square().mean().sqrt()).item(),
        (e.abs().max() / t.abs().max()).item(),
    )


def assert_error_rule(got: Tensor, eager: Tensor, truth: Tensor, name: str = "", ulps: float = 4) -> None:
    """error(got) <= 2 error(eager) + a few ulp, in each of :class:`Errors`.

    A few ulp of what ``got`` is stored as; where the signed errors of n elements average out, of what it is computed
    in (float32, float64 for float64), and of what it is stored as by the square root of n.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return
    stored = torch.finfo(got.dtype).eps
    computed = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    averaged = computed + stored / truth.numel() ** 0.5
    slack = Errors(stored, stored, averaged, averaged, stored)
    ours, theirs = errors(got, truth), errors(eager, truth)
    for what, mine, other, ulp in zip(Errors._fields, ours, theirs, slack, strict=True):
        bound = 2 * abs(other) + ulps * ulp
        assert abs(mine) <= bound, f"{name}: {what} error {mine:.3g} > {bound:.3g} (eager {other:.3g})"


def settled(residual: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, H W) where the sign of S is beyond doubt for every class, from the true residual (N, L, H W).

    For p = 1 the gradient jumps where S changes its sign. Within a band of 4 ulp of ``dtype`` (of the residual's rms)
    around 0, rounding may choose the other side; nothing can be said there about an element of the gradient.
    """
    band = 4 * torch.finfo(dtype).eps * residual.square().mean().sqrt()
    return (residual.abs() > band).all(1)
