"""Activations before the first part of a backbone that trains, computed once and kept on the disk.

A store is a folder with ``rows.f16``, the rows one after the other, and ``index.json``, which says of each image where
its row is. Images are told by their pixels, so that folds, seeds and methods share a store; all that the activations
follow from is in its name. A computation that was killed continues where it stood.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import rebalfer_kernels as rk

from .. import checkpoint
from ..config import Config, UserError, as_dict, expect, logger
from . import Data, cache
from .batches import augmentation
from .views import Activations, views

if TYPE_CHECKING:
    from ..backbones import Backbone


CHUNK = 32  # images at a time
ROWS, INDEX, LOCK = "rows.f16", "index.json", ".lock"


def kept(config: Config, backbone: Backbone, data: Data) -> Data:
    """``data`` with the activations of ``augment.versions`` versions of each image in place of its pixels.

    Version 0 is the image as it is, which is also what is evaluated; the others are augmented by a seed of their own,
    the same in all runs.

    Raises:
        UserError: nowhere to keep the activations, or numbers too large for float16.
    """
    with cache.kept_in(config.output.cache) as directory:
        expect(directory is not None, "output.cache", config.output.cache, "a folder, because of augment.versions")
        assert directory is not None
    store = _Store(directory / "activations" / _name(config, backbone), config, backbone)
    digests = {name: [_digest(image) for image in split.images] for name, split in data.splits.items()}
    with store.held():
        for name, split in data.splits.items():
            store.add(split.images, digests[name], name)
        whole = store.mapped()
        rows = {name: torch.tensor([store.index[d] for d in found]) for name, found in digests.items()}
    return data._replace(
        splits={name: s._replace(images=Activations(whole, rows[name])) for name, s in data.splits.items()}
    )


def _name(config: Config, backbone: Backbone) -> str:
    """Of what the activations follow from."""
    digest = hashlib.sha256()
    model = config.backbone.name, config.backbone.options, backbone.frozen, config.compute.amp
    images = config.image_size, as_dict(config.augment), backbone.mean, backbone.std
    digest.update(json.dumps([*model, *images]).encode())
    for part in backbone.frozen:
        for name, tensor in backbone.model.get_submodule(part).state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"{config.backbone.name}-{digest.hexdigest()[:16]}"


def _digest(image: Tensor) -> str:
    return hashlib.blake2b(image.cpu().contiguous().numpy().tobytes(), digest_size=12).hexdigest()


class _Store:
    def __init__(self, folder: Path, config: Config, backbone: Backbone) -> None:
        self.folder, self.config, self.backbone = folder, config, backbone
        self.augment = augmentation(config)
        self.index: dict[str, int] = {}  #: digest of an image -> its row
        with torch.no_grad():
            size = config.image_size
            sample = backbone.eval().activations(torch.zeros(1, 3, size, size, device=self._device))
        _, channels, height, width = sample.shape
        self.shape = (config.augment.versions, 2, height, width, channels)
        self.row_bytes = 2 * int(np.prod(self.shape))

    @property
    def _device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """By one process at a time, with what the store has."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with cache.turn(self.folder / LOCK, f"computes the activations in {self.folder}"):
                path = self.folder / INDEX
                self.index = {d: row for row, d in enumerate(json.loads(path.read_text()))} if path.exists() else {}
                yield
        except OSError as error:
            raise UserError(f"output.cache: got {self.folder}, which can't be written: {error.strerror}") from error

    def add(self, images: Tensor, digests: list[str], title: str) -> None:
        """The rows of those images that have none."""
        first = {digest: i for i, digest in reversed(list(enumerate(digests))) if digest not in self.index}
        missing = sorted(first.values())
        bar = tqdm(total=len(missing), desc=f"activations of {title}", unit="image", leave=False, disable=None)
        for start in range(0, len(missing), CHUNK):
            chosen = missing[start : start + CHUNK]
            self._append(self._rows(images[chosen], [digests[i] for i in chosen]), [digests[i] for i in chosen])
            bar.update(len(chosen))
        if missing:
            logger.info("activations of %d images of %s kept in %s", len(missing), title, self.folder)

    def _rows(self, images: Tensor, digests: list[str]) -> np.ndarray:
        """(N, versions, 2, h, w, C) float16."""
        images = images.to(self._device)
        samples = torch.tensor([int(d[:15], 16) for d in digests], device=self._device)
        versions = []
        for version in range(self.shape[0]):
            augment = self.augment if version else rk.Augment()
            pair = views(images, self.backbone, both=True, samples=samples, epoch=version, augment=augment)
            x = self.backbone.activations(pair).half()
            if not x.isfinite().all():
                raise UserError("augment.versions: got activations too large for float16, in which they are kept")
            versions.append(torch.stack(x.permute(0, 2, 3, 1).chunk(2), 1))  # (N, 2, h, w, C)
        return torch.stack(versions, 1).cpu().contiguous().numpy()

    def _append(self, rows: np.ndarray, digests: list[str]) -> None:
        """Rows first, then the index that knows them: what a kill leaves after the last known row is written over."""
        path = self.folder / ROWS
        try:
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.seek(len(self.index) * self.row_bytes)
                file.write(rows.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"output.cache: {path} can't be written: {error.strerror}") from error
        self.index |= {digest: len(self.index) + i for i, digest in enumerate(digests)}
        checkpoint.write(self.folder / INDEX, json.dumps(list(self.index)))

    def mapped(self) -> Tensor:
        """(all, versions, 2, h, w, C) float16, read from the disk as needed."""
        file = np.memmap(self.folder / ROWS, np.float16, "c", shape=(len(self.index), *self.shape))
        return torch.from_numpy(file)
