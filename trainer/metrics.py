"""Overall, mean and per-class accuracy and macro-F1, from the confusion matrix of a whole split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import data


def confusion(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """(L, L) counts, rows the true class, columns the predicted one."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def accuracies(matrix: Tensor) -> dict:
    """In percent, as scikit-learn defines them; a class without images is None and takes no part in the mean accuracy.

    In macro-F1, the F1 of such a class is 0 if an image was taken for it.
    """
    matrix = matrix.double().cpu()
    total, right, predicted = matrix.sum(1), matrix.diag(), matrix.sum(0)
    seen = total > 0
    per_class, f1 = 100 * right / total, 100 * 2 * right / (total + predicted)
    return {
        "overall": (100 * right.sum() / total.sum()).item(),
        "mean": per_class[seen].mean().item(),
        "f1": f1[total + predicted > 0].mean().item(),
        "per_class": [a if n else None for a, n in zip(per_class.tolist(), seen.tolist(), strict=True)],
    }


def table(classes: tuple[str, ...], images: Sequence[object] | None, columns: dict[str, dict]) -> str:
    """Accuracies in percent as text, a column for each of ``columns``: title -> what :func:`accuracies` returns."""
    rows = [[name, str(n)] for name, n in zip(classes, images or [""] * len(classes), strict=True)]
    rows += [["mean", ""], ["overall", ""], ["macro-F1", ""]]
    for scores in columns.values():
        values = [*scores["per_class"], scores["mean"], scores["overall"], scores["f1"]]
        for row, value in zip(rows, values, strict=True):
            row.append("-" if value is None else f"{value:.2f}")
    return data.table([["accuracy in %", "images", *columns], *rows])
