"""Normalised views of images and of their mirror images, and what replaces images whose activations are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

import rebalfer_kernels as rk

if TYPE_CHECKING:
    from ..backbones import Backbone


class Activations:
    """What the frozen parts of a backbone made of K images: some augmented versions each, each with its mirror image.

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


Images = TypeVar("Images", Tensor, Activations)


def coloured(images: Images, backbone: Backbone) -> Images:
    """Grey images (K, h, w, 1) with three channels if ``backbone`` has its colours normalised differently."""
    if isinstance(images, Activations):
        return images
    differ = len(set(backbone.mean)) > 1 or len(set(backbone.std)) > 1
    return images.expand(-1, -1, -1, 3).contiguous() if images.shape[-1] == 1 and differ else images


def views(
    images: Tensor | Activations,
    backbone: Backbone,
    *,
    both: bool,
    indices: Tensor | None = None,
    seed: int = 0,
    epoch: int | Tensor = 0,
    **options: Any,
) -> Tensor:
    """(N or 2N, C, H, W) normalised for ``backbone``: the images ``indices`` (N,), all if None, and their twins.

    Args:
        images: uint8 (K, h, w, 1 or 3). both: the mirror images too, after the others.
        options: for ``rk.paired_views``, such as ``augment``; left out, the images are only resized.
    """
    if isinstance(images, Activations):
        return images.views(indices, epoch, both=both)
    return rk.paired_views(
        coloured(images, backbone),
        torch.arange(len(images), device=images.device) if indices is None else indices,
        out_size=backbone.image_size,
        mean=backbone.mean,
        std=backbone.std,
        seed=seed,
        epoch=epoch,
        views="both" if both else "original",
        dtype=backbone.amp or torch.float32,
        **options,
    )
