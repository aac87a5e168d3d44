"""Data sets that live in memory as uint8, in one canonical class order (RAF-DB's)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

EXPRESSIONS = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")


class Split(NamedTuple):
    images: Tensor  #: (K, 3 or 1, H, W) uint8
    labels: Tensor  #: (K,) int64


class Data(NamedTuple):
    classes: tuple[str, ...]
    train: Split
    test: Split


def load(name: str, *, image_size: int, seed: int, train_size: int) -> Data:
    """``synthetic``, or ``imagefolder:PATH``."""
    from . import imagefolder, synthetic

    if name == "synthetic":
        return synthetic.load(image_size=image_size, seed=seed, train_size=train_size)
    if name.startswith("imagefolder:"):
        return imagefolder.load(name.partition(":")[2], image_size=image_size)
    raise ValueError(f"data: got {name!r}, expected 'synthetic' or 'imagefolder:PATH'")
