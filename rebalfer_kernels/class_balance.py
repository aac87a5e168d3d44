"""Weights and soft targets from the number of training images per class (Eq. 4 and Eq. 8)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MappingView, Set
from typing import Any

import torch
from torch import Tensor

from . import checks

#: A number for each class, in class order: a 1-d tensor or array, any sequence, or a mapping from 0, ..., L - 1.
PerClass = Iterable[float] | Mapping[int, float] | Tensor


def effective_number_weights(class_counts: PerClass, beta: float = 0.9999, *, normalize: bool = True) -> Tensor:
    """Rebalancing weight of each class by its effective number of images, Eq. 4: B_l = (1 - beta) / (1 - beta^n_l).

    Args:
        class_counts: L positive whole numbers n_l, training images per class: a sequence, array or 1-d tensor in
            class order, or a mapping (a Counter, a pandas Series) whose keys are the classes 0, ..., L - 1.
        beta: in [0, 1); 0 weighs all classes alike, towards 1 the weight approaches 1 / n_l.
        normalize: scale to sum to L. The raw values are about 1e-4 to 1e-2, with which Eq. 8 is no
            distribution and the consistency loss is numerically nothing; ``False`` gives Eq. 4 to the letter.

    Returns:
        (L,) float32 on the CPU, computed in float64.

    Raises:
        ValueError: counts empty, not whole, not positive or without an order; beta outside [0, 1).

    >>> effective_number_weights([900, 90, 10])
    tensor([0.0310, 0.2980, 2.6710])
    """
    n = counts(class_counts)
    if not (checks.is_number(beta) and 0 <= beta < 1):
        raise ValueError(f"beta: got {beta!r}, expected a number in [0, 1)")
    beta = float(beta)
    # -(1 - beta) / expm1(n log beta): 1 - beta^n loses all digits for beta near 1.
    b = torch.ones_like(n) if beta == 0 else -(1 - beta) / torch.expm1(n * math.log(beta))
    return (b * (len(b) / b.sum()) if normalize else b).float()


def inverse_frequency_weights(class_counts: PerClass, *, normalize: bool = True) -> Tensor:
    """Rebalancing weight of each class by 1 / n_l, as the program released with the paper weighs.

    Args:
        class_counts: L positive whole numbers n_l, as in :func:`effective_number_weights`.
        normalize: scale to sum to L; ``False`` gives sum(n) / (L n_l), which is 1 for an average class.

    Returns:
        (L,) float32 on the CPU, computed in float64.

    Raises:
        ValueError: counts empty, not whole, not positive or without an order.

    >>> inverse_frequency_weights([60, 30, 10])
    tensor([0.3333, 0.6667, 2.0000])
    """
    n = counts(class_counts)
    b = n.sum() / (len(n) * n)
    return (b * (len(b) / b.sum()) if normalize else b).float()


def target_table(class_weights: PerClass, alpha: float = 0.1, *, spread: str = "all") -> Tensor:
    """Soft label of each class, smoothed towards rare classes, Eq. 8: row y is (1 - alpha) onehot(y) + alpha B / L.

    Args:
        class_weights: (L,) weights B, L >= 2, in class order or by class, as the counts; rows sum to 1 if these
            sum to L (any positive scale is accepted for "non_target").
        alpha: in [0, 1], the mass that leaves the label.
        spread: "all", Eq. 8; "non_target", the released program's variant: 1 - alpha on the label and alpha
            shared among the *other* classes in proportion to their weight.

    Returns:
        (L, L) float32 on the device of ``class_weights``, computed in float64.

    Raises:
        ValueError: fewer than two weights, a weight negative or not finite, weights without an order, alpha outside
        [0, 1], unknown spread.

    >>> target_table([0.5, 1.0, 1.5], alpha=0.3)
    tensor([[0.7500, 0.1000, 0.1500],
            [0.0500, 0.8000, 0.1500],
            [0.0500, 0.1000, 0.8500]])
    """
    b = _vector("class_weights", class_weights, "finite numbers >= 0")
    if len(b) < 2:
        raise ValueError(f"class_weights: got {len(b)} weights, expected L >= 2")
    if not bool(torch.isfinite(b).all()) or bool((b < 0).any()):
        raise ValueError(f"class_weights: got {b.tolist()}, expected finite numbers >= 0")
    if not (checks.is_number(alpha) and 0 <= alpha <= 1):
        raise ValueError(f"alpha: got {alpha!r}, expected a number in [0, 1]")
    alpha = float(alpha)
    eye = torch.eye(len(b), dtype=torch.float64, device=b.device)
    if spread == "all":
        share = (b / len(b)).expand(len(b), -1)
    elif spread == "non_target":
        others = b * (1 - eye)
        if bool((others.sum(1) == 0).any()):
            raise ValueError(f"class_weights: got {b.tolist()}, expected at least two above 0 for spread='non_target'")
        share = others / others.sum(1, keepdim=True)
    else:
        raise ValueError(f"spread: got {spread!r}, expected 'all' or 'non_target'")
    return ((1 - alpha) * eye + alpha * share).float()


def counts(class_counts: PerClass) -> Tensor:
    """(L,) float64 on the CPU: training images per class, in class order."""
    n = _vector("class_counts", class_counts, "whole numbers >= 1").cpu()
    if not len(n) or not bool((torch.isfinite(n) & (n == n.round()) & (n >= 1)).all()):
        raise ValueError(f"class_counts: got {n.tolist()}, expected whole numbers >= 1, at least one")
    return n


def _vector(name: str, values: PerClass, expected: str) -> Tensor:
    """(L,) float64 in class order, whatever the default dtype; on the CPU unless ``values`` is a tensor."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.dtype == torch.bool or values.is_complex():
            raise ValueError(
                f"{name}: got {values.dtype} of shape {tuple(values.shape)}, expected {expected}, of shape (L,)"
            )
        return values.detach().double()
    numbers = [
        x.item() if isinstance(x, Tensor) and not x.dim() else x for x in _in_class_order(name, values, expected)
    ]
    if not all(map(checks.is_number, numbers)):
        raise ValueError(f"{name}: got {numbers!r}, expected {expected}")
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _in_class_order(name: str, values: Any, expected: str) -> Iterable[Any]:
    if hasattr(values, "keys"):  # a mapping, or a pandas Series
        by_class = dict(values)
        if set(by_class) != set(range(len(by_class))):
            raise ValueError(
                f"{name}: got the keys {list(by_class)[:8]}, expected the classes 0, ..., {len(by_class) - 1}; "
                "with other names give a list in class order: [counts[c] for c in classes]"
            )
        return [by_class[label] for label in range(len(by_class))]
    if not isinstance(values, Iterable) or isinstance(values, Set | MappingView):  # a dict's values are in its order
        raise ValueError(f"{name}: got {values!r}, expected {expected}, in class order")
    return values
