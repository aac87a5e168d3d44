"""The order of an epoch, and what a method gets of each step."""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import Split, views


@dataclass(frozen=True)
class Batch:
    """The images of a step, as the views that the method asks for."""

    split: Split  #: all training images, on the device
    rows: Tensor  #: (N,) int64 on the CPU: which of them
    whole: int  #: images of the step, of all its parts in all processes
    progress: float  #: share of the run that is done, in [0, 1)
    seed: int
    epoch: int

    @property
    def labels(self) -> Tensor:
        """(N,) int64, or (N, L) float32 distributions, on the device."""
        return self.split.labels[self.rows.to(self.split.labels.device)]

    @property
    def random(self) -> views.Draws:
        """Random numbers keyed by (seed, epoch, sample); draw 0 is the augmentation's."""
        return views.Draws(self.seed, self.epoch, self.rows)

    def at(self, rows: Tensor) -> Batch:
        """Other training images at the same time, for methods that sample by their own rule."""
        return dataclasses.replace(self, rows=rows)

    def parts(self, number: int) -> list[Batch]:
        """Batches of about the same size that have all images of this one."""
        return [self.at(rows) for rows in self.rows.tensor_split(number)]

    def clone(self) -> Batch:
        """With memory of its own for what changes from step to step."""
        return self.at(self.rows.clone())

    def copy_(self, other: Batch) -> None:
        """Takes the place of ``other``, in its own memory."""
        self.rows.copy_(other.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def view(self) -> Tensor:
        """(N, 1 or 3, H, W) float32, augmented and normalised."""
        return views.normalise(self._augmented())

    def pair(self) -> Tensor:
        """(2N, 1 or 3, H, W) float32: each view, then each view's mirror image."""
        images = self._augmented()
        return views.normalise(torch.cat([images, views.twin(images)]))

    def _augmented(self) -> Tensor:
        return views.augment(self.split.images[self.rows.to(self.split.images.device)], self.random)


def order(n: int, batch_size: int, seed: int, epoch: int, *, least: int = 1) -> tuple[Tensor, ...]:
    """The rows of each step of an epoch, which differ by at most one in number, none with fewer than ``least``.

    >>> [len(rows) for rows in order(5, 2, seed=0, epoch=0)]
    [2, 2, 1]
    >>> [len(rows) for rows in order(5, 2, seed=0, epoch=0, least=2)]
    [3, 2]
    """
    random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
    steps = max(1, min(math.ceil(n / batch_size), n // least))
    return torch.randperm(n, generator=random).tensor_split(steps)
