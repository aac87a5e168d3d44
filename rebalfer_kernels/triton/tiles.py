"""How the Triton kernels cut up their work: one table, by (C, HW, L, layout, dtype, arch), and no autotuning.

The batch size is not part of the key: a sample's results do not depend on the rest of the batch, and another batch size
compiles nothing anew. `python -m bench tune` searches on a GPU and proposes a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """What a kernel is compiled for."""

    channels: int
    pixels: int  #: H W
    classes: int
    channels_last: bool
    dtype: torch.dtype  #: of the features
    arch: str  #: "sm_90", "gfx942", ...


class Shape(NamedTuple):
    """The constants that every kernel on features needs; the last two are the strides of a pixel and of a channel."""

    C: int
    HW: int
    W: int
    L: int
    S_HW: int
    S_C: int


class Tiles(NamedTuple):
    """A kernel's tile (rows are pixels of the map) and how many warps and pipeline stages work on it."""

    rows: int
    channels: int
    classes: int
    warps: int
    stages: int


class Policy(NamedTuple):
    one_tile: bool  #: the maps of a pair fit in one tile: one program does all of a pair's forward
    forward: Tiles  #: of the features, read
    backward: Tiles  #: of their gradient, written
    weight: Tiles  #: of features read again where they meet a gradient of maps; channels and classes of dW
    all_classes: int  #: L padded: a row of logits
    batch: int  #: rows of logits at once, in sums over the batch
    pool_by_mma: bool  #: the means of features over positions are products of tensor cores, in a program of one tile


class Row(NamedTuple):
    """Tiles for the problems that match; None matches every one. The first row that fits is used."""

    arch: str | None
    channels_last: bool | None
    bytes: int | None  #: of a feature
    max_pixels: int | None
    forward: tuple[int, int, int]  #: channels, warps, stages
    backward: tuple[int, int]  #: channels, warps
    pool_by_mma: bool = False


#: Chosen by what ptxas reports (docs/triton.md), but for the two rows of sm_90: `bench tune` measured the backward's
#: tiles and NCHW's on an H200, bfloat16, 7 x 7 maps and 7 classes, at N = 32, C = 512 and at N = 512, C = 2048
#: (bench/results/gpu/tune-nvidia-h200.txt), of earlier kernels; the forward's for channels_last, with its sums on
#: tensor cores, are the fastest by the model of docs/gpu-model.md. Of other tiles, no GPU has shown how fast they are.
#: Under Triton 3.6 such sums keep sm_80 and sm_100 from loading ahead.
TABLE = (
    Row(None, True, 2, 16, forward=(128, 4, 3), backward=(256, 8)),
    Row("sm_90", True, 2, 64, forward=(128, 4, 3), backward=(128, 4), pool_by_mma=True),
    Row("sm_90", False, 2, 64, forward=(64, 8, 2), backward=(64, 2)),
    Row("gfx942", True, 2, 64, forward=(64, 4, 2), backward=(128, 4)),
    Row("gfx942", None, None, 64, forward=(32, 4, 2), backward=(64, 4)),
    Row("sm_100", True, 2, 64, forward=(64, 4, 3), backward=(128, 8)),  # 4 warps spill with 100 classes
    Row(None, True, 2, 64, forward=(64, 4, 3), backward=(128, 4)),
    Row("sm_100", True, 2, 256, forward=(32, 16, 2), backward=(64, 4)),  # Triton 3.6 fails on 8 warps and 16 classes
    Row(None, True, 2, 256, forward=(32, 8, 2), backward=(64, 8)),
    Row(None, True, 4, 64, forward=(32, 8, 3), backward=(64, 4)),
    Row("sm_100", False, None, 64, forward=(32, 4, 3), backward=(64, 8)),
    Row(None, False, None, 64, forward=(32, 4, 3), backward=(32, 4)),
    Row("sm_80", False, 2, None, forward=(16, 8, 1), backward=(32, 4)),
    Row("sm_100", False, 2, None, forward=(16, 16, 2), backward=(64, 8)),  # as above
    Row("sm_100", None, 4, 256, forward=(16, 16, 2), backward=(32, 4)),  # 8 warps spill under Triton 3.9
    Row(None, None, None, None, forward=(16, 8, 2), backward=(32, 4)),
)

#: Numbers of one view that the forward keeps in registers, of 2^16 in a multiprocessor.
_ONE_TILE = 4096


def policy(problem: Problem) -> Policy:
    """The tiles of a problem.

    >>> policy(Problem(512, 49, 7, True, torch.bfloat16, "sm_90")).forward
    Tiles(rows=64, channels=128, classes=8, warps=4, stages=3)
    """
    rows = max(16, _power_of_2(problem.pixels))
    # NVIDIA's tensor cores work on 8 columns, AMD's on 16.
    every = max(16 if problem.arch.startswith("gfx") else 8, _power_of_2(problem.classes))
    one_tile = rows <= 256 and rows * every <= _ONE_TILE
    rows = rows if one_tile else min(rows, 64)
    row = next(r for r in TABLE if _fits(r, problem, rows))
    widest = max(16, _power_of_2(problem.channels))
    channels, warps, stages = row.forward
    channels = min(channels, widest)
    back_channels, back_warps = row.backward
    # Triton 3.6 accepts no sum of fewer than 16 products; for 16-bit features each class has two slots or more.
    classes = min(max(every, 16) if problem.dtype == torch.float32 else every, 32)
    return Policy(
        one_tile,
        Tiles(rows, channels, every if one_tile else min(every, 64), warps, stages),
        Tiles(min(rows, 64), min(back_channels, widest), classes, back_warps, 1),
        Tiles(min(rows, 64), min(64, widest), classes, 4, 2),
        every,
        max(16, min(64, 2048 // every)),
        row.pool_by_mma,
    )


def _fits(row: Row, problem: Problem, rows: int) -> bool:
    arch = "sm_100" if problem.arch == "sm_103" else problem.arch  # compiled alike
    return (
        row.arch in (None, arch)
        and row.channels_last in (None, problem.channels_last)
        and row.bytes in (None, problem.dtype.itemsize)
        and (row.max_pixels is None or rows <= row.max_pixels)
    )


def _power_of_2(x: int) -> int:
    """The least power of 2 that is not below x."""
    return 1 << (x - 1).bit_length()
