"""What the frozen parts of a backbone made of images, in place of the images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Activations:
    """Of K images, some augmented versions each, each with its mirror image.

    Args:
        kept: (all, versions, 2, h, w, C) float16, perhaps mapped from a file; its version 0 is the image as it is.
        rows: (K,) int64, where the images are in it.
    """

    def __init__(self, kept: Tensor, rows: Tensor) -> None:
        self.kept, self.rows = kept, rows

    def views(self, indices: Tensor | None, epoch: int | Tensor, *, both: bool) -> Tensor:
        """(N or 2N, C, h, w) float32 of the images ``indices`` (N,), all if None; each epoch has the next version."""
        rows = self.rows if indices is None else self.rows[indices]
        versions = self.kept.shape[1]
        sides = [self.kept[rows, epoch % versions, side] for side in range(1 + both)]
        return torch.cat(sides).permute(0, 3, 1, 2).float()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice) -> Activations:
        return Activations(self.kept, self.rows[rows])

    def split(self, size: int) -> Iterator[Activations]:
        """Parts of at most ``size`` images, as those of a tensor."""
        return (Activations(self.kept, rows) for rows in self.rows.split(size))

    def to(self, device: torch.device) -> Activations:
        """In memory of ``device``; on the CPU they stay where they are."""
        if device.type == self.kept.device.type:
            return self
        return Activations(self.kept[self.rows].to(device), torch.arange(len(self), device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of the versions of these images."""
        return len(self) * self.kept[0].nbytes
