"""What becomes of an image on its way to the network: augmentation, its twin, normalisation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PHILOX_ROUNDS = 10


def philox(key: int, counters: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011): (N, 4) uint32 counters to (N, 4) uint32 random words.

    >>> philox(0, np.zeros((1, 4), np.uint32))[0, 0] == 0x6627E8D5
    True
    """
    c = [counters[:, i].astype(np.uint64) for i in range(4)]
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(PHILOX_ROUNDS):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> half) ^ c[1] ^ np.uint64(k0), b & low, (a >> half) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, 1).astype(np.uint32)


class Draws:
    """Random numbers by (seed, epoch, sample): neither the batch nor what was drawn before changes them.

    Args:
        rows: (N,) int64 indices of the samples, on the CPU.
    """

    def __init__(self, seed: int, epoch: int, rows: Tensor) -> None:
        self.seed, self.epoch, self.rows = seed, epoch, rows

    def uniform(self, draw: int) -> Tensor:
        """(N, 4) float32 in [0, 1) on the CPU; another ``draw`` gives other numbers."""
        counters = np.zeros((len(self.rows), 4), np.uint32)
        counters[:, 0], counters[:, 1], counters[:, 2] = self.epoch, self.rows.numpy(), draw
        return torch.from_numpy((philox(self.seed, counters) >> 8).astype(np.float32) * np.float32(2**-24))


def augment(images: Tensor, random: Draws) -> Tensor:
    """Each image mirrored or not and shifted by up to 1/16 of its side, the border repeated; uint8 in and out."""
    n, height, width, _ = images.shape
    reach = max(height, width) // 16
    u = random.uniform(0)
    shift_y, shift_x = ((u[:, i, None] * (2 * reach + 1)).long() - reach for i in range(2))
    mirrored = u[:, 2, None] < 0.5
    y = (torch.arange(height) + shift_y).clamp(0, height - 1)
    x = (torch.arange(width) + shift_x).clamp(0, width - 1)
    x = torch.where(mirrored, width - 1 - x, x)
    y, x, i = (t.to(images.device) for t in (y[:, :, None], x[:, None, :], torch.arange(n)[:, None, None]))
    return images[i, y, x]


def twin(images: Tensor) -> Tensor:
    """The mirror images of (M, H, W, C)."""
    return images.flip(2)


def normalise(images: Tensor) -> Tensor:
    """uint8 (M, H, W, C) to float32 (M, C, H, W) in [-1, 1]."""
    return images.movedim(-1, 1).float() / 127.5 - 1
