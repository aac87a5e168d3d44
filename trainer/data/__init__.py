"""Data sets held in memory as uint8, in one canonical class order: RAF-DB's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..config import Config

EXPRESSIONS = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")


class Split(NamedTuple):
    images: Tensor  #: (K, 1 or 3, H, W) uint8
    labels: Tensor  #: (K,) int64


class Data(NamedTuple):
    classes: tuple[str, ...]
    train: Split
    test: Split
    folders: tuple[str, ...] = ()  #: what each class is called on disk, if it comes from there


def load(config: Config) -> Data:
    """The data set that ``config.data`` names, as KIND or KIND:PATH.

    Raises:
        ValueError: an unknown kind, or a path that does not hold what it should.
    """
    from . import imagefolder, synthetic

    kinds: dict[str, Callable[[str, Config], Data]] = {"synthetic": synthetic.load, "imagefolder": imagefolder.load}
    kind, colon, path = config.data.partition(":")
    if kind not in kinds or bool(colon) != (kind == "imagefolder") or (colon and not path):
        raise ValueError(f"data: got {config.data!r}, expected 'synthetic' or 'imagefolder:PATH'")
    return kinds[kind](path, config)


def describe(sets: Data) -> str:
    """Index, class, folder and image counts, a line for each class."""
    train, test = (torch.bincount(s.labels, minlength=len(sets.classes)).tolist() for s in (sets.train, sets.test))
    folders = sets.folders or sets.classes
    lines = [f"{'index':>5}  {'class':<12}{'folder':<14}{'train':>7}{'test':>7}"]
    for i, name in enumerate(sets.classes):
        lines.append(f"{i:>5}  {name:<12}{folders[i]:<14}{train[i]:>7}{test[i]:>7}")
    return "\n".join(lines)
