"""Overall, mean and per-class accuracy from a confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """(L, L) counts, rows the true class, columns the predicted one."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def accuracies(matrix: Tensor) -> dict:
    """In percent; a class without images is None and takes no part in the mean."""
    total = matrix.sum(1).double()
    per_class = 100 * matrix.diag() / total
    return {
        "overall": (100 * matrix.diag().sum() / total.sum()).item(),
        "mean": per_class[total > 0].mean().item(),
        "per_class": [a if n else None for a, n in zip(per_class.tolist(), total.tolist(), strict=True)],
    }
