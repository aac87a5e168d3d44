"""The proof that a formulation is right: its result and its gradients against float64, before it is timed."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

import rebalfer_kernels as rk

from . import baselines
from .baselines import Formulation
from .cases import Problem
from .results import reason

#: Largest relative L2 error of the result or a gradient. A 16-bit formulation rounds its maps and logits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def tolerance(problem: Problem) -> float:
    """By the dtype of the features, or of the views."""
    return TOLERANCE[problem.features.dtype if problem.features.is_floating_point() else problem.dtype]


def truth(name: str, problem: Problem) -> list[Tensor | None]:
    """The result and the gradients to the leaves, in float64, from the library's reference."""
    if problem.op == "views":
        return [(baselines.identity_of_views if name == "identity" else baselines.plain_views)(problem).double()]
    exact = problem.double()
    if name == "identity":
        others: list[Tensor | None] = [None] * (len(exact.leaves) - 1)
        return [exact.features.detach().sum(), *([torch.ones_like(exact.features), *others] if exact.leaves else [])]
    result = _reference(exact)
    return [result.detach(), *(gradients(result, exact) if exact.leaves else [])]


def _reference(x: Problem) -> Tensor:
    match x.op:
        case "consistency":
            return rk.reference.attention_consistency(x.features, x.weight, x.map_weights)
        case "maps":
            return rk.reference.class_activation_maps(x.features, x.weight)
        case "cross_entropy":
            return rk.reference.rebalanced_cross_entropy(x.features, x.targets, x.target_table)
    return rk.reference.rebalanced_head_loss(
        *x[:4], target_table=x.target_table, map_weights=x.map_weights, consistency_weight=x.consistency_weight,
        detach_cam_weight=x.op != "undetached",
    ).loss  # fmt: skip


def gradients(result: Tensor, problem: Problem) -> tuple[Tensor | None, ...]:
    """To each leaf; the engine casts the seed to the result's dtype."""
    return torch.autograd.grad(result, problem.leaves, problem.seed, allow_unused=True)


def prove(problem: Problem, formulations: dict[str, Formulation]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The errors, by name, of those whose result and gradients are float64's, and what is wrong with the others."""
    errors, refused = {}, []
    expected = functools.cache(lambda name: truth(name, problem))
    for name, formulation in formulations.items():
        exact = expected("identity" if name == "identity" else "ours")
        error, why = math.inf, None
        try:
            error = worst_error(formulation, problem, exact)
        except Exception as failure:  # it cannot be compiled here, say; the others can still be measured
            why = reason(failure)
        if error <= tolerance(problem):
            errors[name] = error
        else:
            refused.append({"contender": name, "error": error if math.isfinite(error) else None, "reason": why})
            print(f"  {name}: refused, {why or f'relative error {error:.2g}'}", flush=True)
    return errors, refused


def worst_error(formulation: Formulation, problem: Problem, expected: list[Tensor | None]) -> float:
    """The largest relative L2 error of the result and the gradients; infinite for a missing, surplus or NaN one."""
    result = formulation(problem)
    got = [result.detach(), *(gradients(result, problem) if problem.leaves else [])]
    return max(relative_error(g, e) for g, e in zip(got, expected, strict=True))


def relative_error(got: Tensor | None, expected: Tensor | None) -> float:
    if got is None or expected is None:
        return 0.0 if got is expected else math.inf
    if got.shape != expected.shape:
        return math.inf
    error = ((got.double() - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf
