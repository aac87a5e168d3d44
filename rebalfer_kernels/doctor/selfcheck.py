"""Outputs and gradients of one operation on one backend against float64, and the time they take."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional, reference
from ..backend import BACKENDS
from .cases import OPERATIONS, PAPER, Combination, Inputs, Size, random_inputs
from .timing import median_seconds


class Limits(NamedTuple):
    """The largest relative L2 error that is right."""

    outputs: float  #: they are float32, and float64 for float64 features
    gradients: float  #: rounded once to their dtype: half a unit in the last place is 2e-3 (bfloat16), 2.4e-4 (float16)


LIMITS = {
    torch.float32: Limits(1e-5, 1e-5),
    torch.bfloat16: Limits(1e-5, 4e-3),
    torch.float16: Limits(1e-5, 6e-4),
    torch.float64: Limits(1e-12, 1e-12),
}
#: How many times the paper's batch is timed on a GPU, to hide the launches.
BATCHES_ON_GPU = 64


class Truth(NamedTuple):
    """Float64, on the CPU."""

    outputs: dict[str, Tensor]
    upstreams: dict[str, Tensor]  #: gradients of the differentiable outputs, in the dtype that these have
    gradients: dict[str, Tensor]


@functools.lru_cache(maxsize=2)  # a row's two sizes: the next row, of another layout, has the same truth
def truth(op: str, size: Size, dtype: torch.dtype) -> Truth:
    """Outputs and gradients of the reference, with random upstreams of either sign.

    They are of order 1000, as under GradScaler: a float16 gradient would be subnormal otherwise.
    """
    operation, x = OPERATIONS[op], random_inputs(size, dtype)
    exact = Inputs(*(t.detach().double() if t.is_floating_point() else t for t in x))
    leaves = [getattr(exact, leaf).requires_grad_() for leaf in operation.leaves]
    outputs = operation.outputs(reference, exact)
    random, kept = torch.Generator().manual_seed(1), reference.compute_dtype(dtype)
    differentiable = {k: v for k, v in outputs.items() if v.requires_grad}
    upstreams = {k: (1000 * torch.randn(v.shape, generator=random)).to(kept) for k, v in differentiable.items()}
    gradients = torch.autograd.grad(list(differentiable.values()), leaves, [u.double() for u in upstreams.values()])
    return Truth(
        {k: v.detach() for k, v in outputs.items()}, upstreams, dict(zip(operation.leaves, gradients, strict=True))
    )


def errors(case: Combination, x: Inputs, exact: Truth) -> tuple[dict[str, float], dict[str, float]]:
    """Relative L2 errors of each output and of each gradient."""
    operation = OPERATIONS[case.op]
    outputs = operation.outputs(functional, x, backend=case.backend)
    upstreams = [u.to(outputs[k].device, outputs[k].dtype) for k, u in exact.upstreams.items()]
    leaves = [getattr(x, leaf) for leaf in operation.leaves]
    gradients = torch.autograd.grad([outputs[k] for k in exact.upstreams], leaves, upstreams)
    return (
        {k: _relative_error(v, exact.outputs[k]) for k, v in outputs.items()},
        {f"d_{k}": _relative_error(d, e) for d, (k, e) in zip(gradients, exact.gradients.items(), strict=True)},
    )


def _relative_error(got: Tensor, exact: Tensor) -> float:
    if got.shape != exact.shape:
        return math.inf
    error = ((got.detach().cpu().double() - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf


def check(case: Combination, sizes: Iterable[Size]) -> dict:
    """A row of the report: the worst errors over ``sizes``, and whether they keep the limits."""
    row = case._asdict() | {"dtype": str(case.dtype).removeprefix("torch."), "limits": LIMITS[case.dtype]}
    row |= {"outputs": None, "gradients": None}
    try:
        return row | _judged(case, sizes)
    except Exception as error:  # whatever a backend does, the others must still be checked
        return row | {"state": "failed", "note": in_short(error)}


def _judged(case: Combination, sizes: Iterable[Size]) -> dict:
    worst: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for size in sizes:
        x = random_inputs(size, case.dtype, case.layout, case.device)
        served, reason = BACKENDS[case.backend].answer(OPERATIONS[case.op].request(x)._replace(forced=True))
        if not served:
            return {"state": "not served", "note": reason}
        for seen, new in zip(worst, errors(case, x, truth(case.op, size, case.dtype)), strict=True):
            seen |= {k: max(e, seen.get(k, 0.0)) for k, e in new.items()}
    limited = zip(worst, LIMITS[case.dtype], strict=True)
    wrong = {k: e for seen, limit in limited for k, e in seen.items() if e > limit}
    outputs, gradients = (max(seen.values()) for seen in worst)
    return {
        "outputs": _finite(outputs),
        "gradients": _finite(gradients),
        "state": "wrong" if wrong else "right",
        "note": ", ".join(f"{k} {e:.1e}" for k, e in sorted(wrong.items(), key=lambda item: -item[1])),
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def in_short(error: BaseException) -> str:
    """Its type and the first line of its message, for a row of the report."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def time_call(case: Combination) -> tuple[float, int]:
    """Median seconds of one forward and backward, and the bytes that it must at least move."""
    operation, x = OPERATIONS[case.op], random_inputs(PAPER, case.dtype, case.layout, case.device)
    if case.device == "cuda":
        x = _repeated(x, case.layout)
    leaves = [getattr(x, leaf) for leaf in operation.leaves]

    def once() -> None:
        first, *_ = operation.outputs(functional, x, backend=case.backend).values()
        torch.autograd.grad(first, leaves, torch.ones_like(first))

    moved = x.logits if operation.kind == "cross_entropy" else x.features
    return median_seconds(once, case.device), 2 * moved.nbytes


def _repeated(x: Inputs, layout: str) -> Inputs:
    features = x.features.detach().repeat(BATCHES_ON_GPU, 1, 1, 1)
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    logits = x.logits.detach().repeat(BATCHES_ON_GPU, 1).requires_grad_()
    return x._replace(features=features.requires_grad_(), logits=logits, targets=x.targets.repeat(BATCHES_ON_GPU))
