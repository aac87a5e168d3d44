"""Float64 truth of ``paired_views``, one pixel at a time, written from docs/design.md, section 10.

Shares no code with the package; whole numbers are Python's own. Slow and small.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .oracle import READS

#: The augmentation that changes nothing, by the names of ``Augment``.
NONE = dict(
    flip=0.0, shift=0.0, crop_scale=(1.0, 1.0), crop_ratio=4 / 3, brightness=0.0, contrast=0.0, noise=0.0,
    noise_probability=1.0, erase_probability=0.0, erase_scale=(0.02, 0.25), erase_ratio=10 / 3,
)  # fmt: skip


def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", section 3.3."""
    left, right = [counter[0], counter[2]], [counter[1], counter[3]]
    keys = [key % 2**32, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        high0, low0 = divmod(left[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(left[1] * 0xCD9E8D57, 2**32)
        left, right = [high1 ^ right[0] ^ keys[0], high0 ^ right[1] ^ keys[1]], [low1, low0]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return left[0], right[0], left[1], right[1]


def uniform(word: int) -> float:
    return (word // 256) / 2**24


def ratio_of(word: int, largest: float) -> float:
    ratio = 1 + (largest - 1) * uniform(word * 2 % 2**32)
    return 1 / ratio if word >= 2**31 else ratio


def box(area: float, ratio: float) -> tuple[float, float]:
    """Height and width of that area and that ratio, or of the nearest with which it fits in the unit square."""
    width = min(max(math.sqrt(area * ratio), area), 1.0)
    return area / width, width


class View:
    """The augmented view of one image (h, w, C), before its twin is made."""

    def __init__(
        self, image: np.ndarray, sample: int, size: tuple[int, int], seed: int, epoch: int, augment: dict[str, Any]
    ) -> None:
        self.image, self.size, self.a = image.astype(np.float64) / 255, size, NONE | augment
        self.words = lambda draw: philox(seed, (sample % 2**32, sample >> 32 & 0xFFFFFFFF, epoch, draw))
        self.place, self.tone, self.rectangle, self.corner = (self.words(draw) for draw in range(4))
        (self.top, self.left), (self.high, self.wide) = self._source()
        self.mirrored = self.place[2] < self.a["flip"] * 2**32
        self.noisy = self.a["noise"] > 0 and self.rectangle[3] < self.a["noise_probability"] * 2**32
        self.erased = self._rectangle() if self.rectangle[0] < self.a["erase_probability"] * 2**32 else (0, 0, 0, 0)

    def _source(self):
        """Where the box begins, and its sides, in pixels of the image."""
        h, w, _ = self.image.shape
        if self.a["shift"]:
            reach = int(self.a["shift"] * h), int(self.a["shift"] * w)
            moves = (word * (2 * r + 1) // 2**32 - r for word, r in zip(self.place, reach))  # noqa: B905
            return tuple(moves), (h, w)
        smallest, largest = self.a["crop_scale"]
        spread = self.a["crop_ratio"] if smallest < 1 else 1
        area = smallest + (largest - smallest) * uniform(self.place[0])
        high, wide = box(area, ratio_of(self.place[1], spread))
        high, wide = high * h, wide * w
        return (uniform(self.tone[0]) * (h - high), uniform(self.tone[1]) * (w - wide)), (high, wide)

    def _rectangle(self):
        """Rows from, to, columns from, to."""
        height, width = self.size
        smallest, largest = self.a["erase_scale"]
        area = (smallest + (largest - smallest) * uniform(self.rectangle[1])) * height * width
        ratio = ratio_of(self.rectangle[2], self.a["erase_ratio"]) * height / width  # of the shares of the sides
        tall, wide = box(area / (height * width), ratio)
        tall = min(max(math.floor(tall * height + 0.5), 1), height)
        wide = min(max(math.floor(wide * width + 0.5), 1), width)
        top = self.corner[0] * (height - tall + 1) // 2**32
        left = self.corner[1] * (width - wide + 1) // 2**32
        return top, top + tall, left, left + wide

    def _read(self, y: float, x: float) -> np.ndarray:
        """Between the four pixels around a place; the border is repeated."""
        h, w, channels = self.image.shape
        value = np.zeros(channels)
        for row, share_y in ((math.floor(y), 1 - (y - math.floor(y))), (math.floor(y) + 1, y - math.floor(y))):
            for column, share_x in ((math.floor(x), 1 - (x - math.floor(x))), (math.floor(x) + 1, x - math.floor(x))):
                value += share_y * share_x * self.image[min(max(row, 0), h - 1), min(max(column, 0), w - 1)]
        return value

    def pixel(self, y: int, x: int, mean: float, std: float) -> np.ndarray:
        """(C,) normalised values."""
        height, width = self.size
        top, bottom, left, right = self.erased
        if top <= y < bottom and left <= x < right:
            return np.zeros(self.image.shape[2])
        across = width - 1 - x if self.mirrored else x
        value = self._read(
            self.top + (y + 0.5) * self.high / height - 0.5, self.left + (across + 0.5) * self.wide / width - 0.5
        )
        value = value * (1 + self.a["brightness"] * (2 * uniform(self.tone[2]) - 1))
        value = 0.5 + (value - 0.5) * (1 + self.a["contrast"] * (2 * uniform(self.tone[3]) - 1))
        if self.noisy:
            words = self.words(4 + y * width + x)
            near, far = (math.sqrt(-2 * math.log(uniform(words[i]) + 2**-24)) for i in (0, 2))
            turn, other = 2 * math.pi * uniform(words[1]), 2 * math.pi * uniform(words[3])
            normal = np.array([near * math.cos(turn), near * math.sin(turn), far * math.cos(other)])
            value = value + self.a["noise"] * normal[: len(value)]
        return (np.clip(value, 0, 1) - mean) / std


def paired_views(images, indices, samples, size, mean, std, seed, epoch, augment, transform) -> np.ndarray:
    """(2N, C, H, W) float64: the views, then their twins."""
    (height, width), n, channels = size, len(indices), images.shape[3]
    out = np.full((2 * n, channels, height, width), np.nan)
    for i, (index, sample) in enumerate(zip(indices, samples, strict=True)):
        view = View(images[index], sample, size, seed, epoch, augment)
        for y in range(height):
            for x in range(width):
                out[(i, slice(None), y, x)] = view.pixel(y, x, np.asarray(mean), np.asarray(std))
        for y in range(height):
            for x in range(width):
                row, column = READS[transform](y, x, height, width)  # where the twin has the view's pixel
                out[n + i, :, row, column] = out[i, :, y, x]
    return out
