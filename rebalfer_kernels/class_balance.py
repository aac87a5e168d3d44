"""Weights and soft targets from the number of training images per class (Eq. 4 and Eq. 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def effective_number_weights(
    class_counts: Sequence[int] | Tensor, beta: float = 0.9999, *, normalize: bool = True
) -> Tensor:
    """Rebalancing weight of each class by its effective number of images, Eq. 4: B_l = (1 - beta) / (1 - beta^n_l).

    Args:
        class_counts: L positive whole numbers n_l, training images per class (a sequence or a 1-d tensor).
        beta: in [0, 1); 0 weighs all classes alike, towards 1 the weight approaches 1 / n_l.
        normalize: scale to sum to L. The raw values are about 1e-4 to 1e-2, with which Eq. 8 is no
            distribution and the consistency loss is numerically nothing; ``False`` gives Eq. 4 to the letter.

    Returns:
        (L,) float32 on the CPU, computed in float64.

    Raises:
        ValueError: counts empty, not whole or not positive; beta outside [0, 1).

    >>> effective_number_weights([900, 90, 10])
    tensor([0.0310, 0.2980, 2.6710])
    """
    n = _counts(class_counts)
    if not (isinstance(beta, int | float) and 0 <= beta < 1):
        raise ValueError(f"beta: got {beta!r}, expected a number in [0, 1)")
    # -(1 - beta) / expm1(n log beta): 1 - beta^n loses all digits for beta near 1.
    b = torch.ones_like(n) if beta == 0 else -(1 - beta) / torch.expm1(n * math.log(beta))
    return (b * (len(b) / b.sum()) if normalize else b).float()


def inverse_frequency_weights(class_counts: Sequence[int] | Tensor, *, normalize: bool = True) -> Tensor:
    """Rebalancing weight of each class by 1 / n_l, as the program released with the paper weighs.

    Args:
        class_counts: L positive whole numbers n_l, training images per class.
        normalize: scale to sum to L; ``False`` gives sum(n) / (L n_l), which is 1 for an average class.

    Returns:
        (L,) float32 on the CPU, computed in float64.

    Raises:
        ValueError: counts empty, not whole or not positive.

    >>> inverse_frequency_weights([60, 30, 10])
    tensor([0.3333, 0.6667, 2.0000])
    """
    n = _counts(class_counts)
    b = n.sum() / (len(n) * n)
    return (b * (len(b) / b.sum()) if normalize else b).float()


def target_table(class_weights: Sequence[float] | Tensor, alpha: float = 0.1, *, spread: str = "all") -> Tensor:
    """Soft label of each class, smoothed towards rare classes, Eq. 8: row y is (1 - alpha) onehot(y) + alpha B / L.

    Args:
        class_weights: (L,) weights B, L >= 2; rows sum to 1 if these sum to L (any positive scale is accepted
            for "non_target").
        alpha: in [0, 1], the mass that leaves the label.
        spread: "all", Eq. 8; "non_target", the released program's variant: 1 - alpha on the label and alpha
            shared among the *other* classes in proportion to their weight.

    Returns:
        (L, L) float32 on the device of ``class_weights``, computed in float64.

    Raises:
        ValueError: fewer than two weights, a weight negative or not finite, alpha outside [0, 1], unknown spread.

    >>> target_table([0.5, 1.0, 1.5], alpha=0.3)
    tensor([[0.7500, 0.1000, 0.1500],
            [0.0500, 0.8000, 0.1500],
            [0.0500, 0.1000, 0.8500]])
    """
    b = _vector("class_weights", class_weights, "finite numbers >= 0").detach().double()
    if b.dim() != 1 or len(b) < 2:
        raise ValueError(f"class_weights: got shape {tuple(b.shape)}, expected (L,) with L >= 2")
    if not bool(torch.isfinite(b).all()) or bool((b < 0).any()):
        raise ValueError(f"class_weights: got {b.tolist()}, expected finite numbers >= 0")
    if not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        raise ValueError(f"alpha: got {alpha!r}, expected a number in [0, 1]")
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


def _counts(class_counts: Sequence[int] | Tensor) -> Tensor:
    n = _vector("class_counts", class_counts, "whole numbers >= 1")
    if n.dim() != 1 or n.numel() == 0:
        raise ValueError(f"class_counts: got shape {tuple(n.shape)}, expected (L,) with L >= 1")
    if n.dtype == torch.bool:
        raise ValueError(f"class_counts: got dtype {n.dtype}, expected whole numbers >= 1")
    n = n.detach().cpu().double()
    if not bool((torch.isfinite(n) & (n == n.round()) & (n >= 1)).all()):
        raise ValueError(f"class_counts: got {n.tolist()}, expected whole numbers >= 1")
    return n


def _vector(name: str, values: object, expected: str) -> Tensor:
    """A tensor of a tensor, a NumPy array of any strides or a sequence; on the CPU unless it is a tensor."""
    try:
        if not isinstance(values, Tensor):
            values = torch.as_tensor(values.tolist() if hasattr(values, "tolist") else values, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: got {values!r}, expected {expected}") from error
    if values.is_complex():
        raise ValueError(f"{name}: got dtype {values.dtype}, expected {expected}")
    return values
