"""The training images as a step reads them: the order of an epoch, and the views that a method gets."""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rebalfer_kernels as rk

from ..config import Config, UserError
from . import Split, views

if TYPE_CHECKING:
    from ..backbones import Backbone

RESIDENT = 0.5  #: of a GPU's free memory, at most, for the images


class Source:
    """Training images, and how views are made of them.

    The images stay on the device if it has room, else in host memory, from which each step copies its own.
    """

    def __init__(self, split: Split, config: Config, backbone: Backbone, device: torch.device) -> None:
        images = views.coloured(split.images, backbone)
        self.resident = device.type == "cpu" or images.nbytes < RESIDENT * torch.cuda.mem_get_info(device)[0]
        self.images = images.to(device) if self.resident else images
        self.rows_on = device if self.resident else torch.device("cpu")  #: where a batch's rows are wanted
        self.labels = split.labels.to(device)
        self.backbone, self.seed, self.augment, self.device = backbone, config.seed, augmentation(config), device
        if config.compute.cuda_graph and not self.resident:
            raise UserError(f"compute.cuda_graph: got true, but {self.describe()}")

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self) -> str:
        """Where the images are."""
        size = f"{len(self.images):,} training images, {self.images.nbytes / 2**20:,.0f} MiB,"
        if self.resident:
            return f"{size} stay on {self.device}"
        return f"{size} are more than {RESIDENT:.0%} of the free memory of {self.device}: each step copies its own"

    def views(self, rows: Tensor, epoch: int | Tensor, *, both: bool) -> Tensor:
        """(N or 2N, 1 or 3, H, W) channels_last: augmented, mirrored and normalised."""
        images, indices = self.images, rows
        if not self.resident:  # nothing waits for rows that are on the CPU, as a method's own may not be
            images = _copied(images[rows.cpu()], self.device)
            indices = torch.arange(len(rows), device=self.device)
        return views.views(
            images,
            self.backbone,
            both=both,
            indices=indices,
            samples=rows.to(self.device, non_blocking=True),
            seed=self.seed,
            epoch=epoch,
            augment=self.augment,
        )


def _copied(images: Any, device: torch.device) -> Any:
    """On ``device``; nothing waits for a tensor."""
    return images.pin_memory().to(device, non_blocking=True) if isinstance(images, Tensor) else images.to(device)


def augmentation(config: Config) -> rk.Augment:
    """The operator's options for those of the run."""
    options = config.augment
    place = {"crop_scale": (options.crop, 1.0)} if options.crop else {"shift": options.shift}
    return rk.Augment(
        **place,
        flip=options.flip,
        brightness=options.brightness,
        contrast=options.contrast,
        noise=options.noise / 255,
        noise_probability=options.noise_probability if options.noise else 0.0,
        erase_probability=options.erase,
        erase_scale=(0.02, options.erase_largest),
    )


@dataclass(frozen=True)
class Batch:
    """The images of a step, as the views that the method asks for."""

    source: Source  #: all training images
    rows: Tensor  #: (N,) int64, which of them; on the device, or on the CPU if the images are
    epoch: int | Tensor  #: from 0; a CUDA graph reads it from a tensor () int64
    whole: int  #: images of the step, of all its parts in all processes
    progress: float  #: share of the run that is done, in [0, 1)

    @property
    def labels(self) -> Tensor:
        """(N,) int64, or (N, L) float32 distributions, on the device."""
        return self.source.labels[self.rows.to(self.source.device, non_blocking=True)]

    def view(self) -> Tensor:
        """(N, 1 or 3, H, W) augmented and normalised."""
        return self.source.views(self.rows, self.epoch, both=False)

    def pair(self) -> Tensor:
        """(2N, 1 or 3, H, W): each view, then each view's mirror image."""
        return self.source.views(self.rows, self.epoch, both=True)

    def uniform(self, draw: int) -> Tensor:
        """(N, 4) float32 in [0, 1), of each image by (seed, epoch, sample, draw); no view uses the same numbers."""
        key = (self.rows & 0xFFFFFFFF, self.rows >> 32, self.epoch, 2**31 + draw)
        words = torch.stack(torch.broadcast_tensors(*rk.reference.philox(self.source.seed, key)), 1)
        return ((words >> 8).float() * 2.0**-24).to(self.source.device, non_blocking=True)

    def at(self, rows: Tensor) -> Batch:
        """Other training images at the same time, for methods that sample by their own rule."""
        return dataclasses.replace(self, rows=rows)

    def parts(self, number: int) -> list[Batch]:
        """Batches of about the same size that have all images of this one."""
        return [self.at(rows) for rows in self.rows.tensor_split(number)]

    def clone(self) -> Batch:
        """With memory of its own for what changes from step to step."""
        return dataclasses.replace(
            self, rows=self.rows.clone(), epoch=torch.as_tensor(self.epoch, device=self.rows.device).clone()
        )

    def copy_(self, other: Batch) -> None:
        """Takes the place of ``other``, in its own memory."""
        self.rows.copy_(other.rows)
        assert isinstance(self.epoch, Tensor), "a clone"
        self.epoch.fill_(other.epoch)

    def __len__(self) -> int:
        return len(self.rows)


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
