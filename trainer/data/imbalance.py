"""An artificial imbalance, as in Tables 3 and 4 of the paper: images of a class are left out until the factor holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sizes(counts: Sequence[int], factor: float) -> tuple[list[int], str]:
    """How many images of each class stay for largest / smallest = ``factor``, and the rule in words.

    With the classes sorted by size, class k keeps n_k mu^k. A set that is more imbalanced than ``factor`` would need
    mu > 1: there the large classes are capped instead.

    >>> sizes([800, 400, 200], 16)
    ([800, 200, 50], 'n_k * 0.5^k by descending size')
    >>> sizes([800, 400, 50], 4)
    ([200, 200, 50], 'at most 200 images of a class')
    """
    largest, smallest = max(counts), min(counts)
    if factor < largest / smallest:
        cap = max(1, round(factor * smallest))
        return [min(n, cap) for n in counts], f"at most {cap} images of a class"
    mu = (largest / smallest / factor) ** (1 / (len(counts) - 1))
    rank = {label: k for k, label in enumerate(sorted(range(len(counts)), key=lambda i: -counts[i]))}
    return [max(1, round(n * mu ** rank[i])) for i, n in enumerate(counts)], f"n_k * {mu:.4g}^k by descending size"


def thin(labels: Tensor, counts: Sequence[int], factor: float, seed: int) -> tuple[Tensor, str]:
    """The rows that stay, drawn by ``seed`` and in their order, and a note of the rule."""
    keep, rule = sizes(counts, factor)
    random = torch.Generator().manual_seed(seed)
    rows = []
    for label, n in enumerate(keep):
        of_class = (labels == label).nonzero()[:, 0]
        rows.append(of_class[torch.randperm(len(of_class), generator=random)[:n]])
    note = f"imbalance {factor:g}: {rule}; train keeps {sum(keep)} of {len(labels)} images"
    if f"{(reached := max(keep) / min(keep)):.3g}" != f"{factor:.3g}":
        note += f", whose largest class has {reached:.3g} times the images of the smallest"
    return torch.cat(rows).sort().values, note
