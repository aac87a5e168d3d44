"""Search the Triton tiles of one size on the present GPU, and propose a row for triton_tiles.TABLE."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from unittest import mock

import torch

from rebalfer_kernels.triton import tiles as triton_tiles
from rebalfer_kernels.triton.tiles import Row

from . import baselines, proof
from .cases import Case, problem, rotated
from .clocks import Clock
from .measure import Rotation, replay_ms
from .op import REPETITIONS

#: (channels, warps, stages) of the forward and (channels, warps) of the backward.
FORWARD = list(itertools.product((16, 32, 64, 128, 256), (2, 4, 8), (1, 2, 3, 4)))
BACKWARD = list(itertools.product((32, 64, 128, 256), (2, 4, 8)))


def rows(of: triton_tiles.Problem) -> Iterator[tuple[str, Row]]:
    """What is tried: the other pass keeps its tiles."""
    now = triton_tiles.policy(of)
    forward = (now.forward.channels, now.forward.warps, now.forward.stages)
    backward = (now.backward.channels, now.backward.warps)
    key = (of.arch, of.channels_last, of.dtype.itemsize, now.forward.rows)
    by_mma = [now.pool_by_mma, not now.pool_by_mma] if of.dtype.itemsize == 2 else [False]
    yield from (("forward", Row(*key, f, backward, mma)) for mma in by_mma for f in [forward, *FORWARD])
    yield from (("backward", Row(*key, forward, b, now.pool_by_mma)) for b in [backward, *BACKWARD])


def first(row: Row) -> AbstractContextManager[object]:
    """The table with ``row`` before all others."""
    return mock.patch.object(triton_tiles, "TABLE", (row, *triton_tiles.TABLE))


def search(
    of: triton_tiles.Problem, milliseconds: Callable[[str, Row], float], end: float = math.inf
) -> tuple[Row, dict[str, list[float]]]:
    """The best row, and for each pass the milliseconds of the present and of the best tiles; inf if they failed.

    After ``end`` on the monotonic clock only the present tiles are measured, if they were not before. The forward,
    which has more to try, may use three quarters of the time.
    """
    now = time.monotonic()
    until = {"forward": now + 0.75 * (end - now), "backward": end}
    times: dict[str, list[tuple[float, Row]]] = {"forward": [], "backward": []}
    for kind, row in rows(of):
        if times[kind] and time.monotonic() > until[kind]:
            continue
        times[kind].append((milliseconds(kind, row), row))
        print(f"{kind} {times[kind][-1][0]:.4f} ms: {row}", flush=True)
    best = {kind: min(tried, key=lambda t: t[0]) for kind, tried in times.items()}
    row = best["forward"][1]._replace(backward=best["backward"][1].backward)
    return row, {kind: [times[kind][0][0], best[kind][0]] for kind in times}


def compile_ahead(case: Case, candidates: Sequence[Row]) -> None:
    """Fills Triton's cache in as many processes as there are cores: what a kernel is compiled for has no batch size."""
    count = max(1, min(os.cpu_count() or 1, len(candidates)))
    parts = [candidates[i::count] for i in range(count)]
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, [case._replace(N=2)] * count, parts))


def _compile(case: Case, candidates: Sequence[Row]) -> None:
    tensors = problem(case)
    for row in candidates:
        with first(row), contextlib.suppress(Exception):  # said when it is measured
            torch.autograd.grad(baselines.ours(tensors, backend="triton"), tensors[:3])


def main(case: Case, clock: Clock, end: float = math.inf) -> str:
    """What to write into the table for ``case``, as far as is known at ``end`` on the monotonic clock."""
    from rebalfer_kernels.triton import host

    tensors = problem(case)
    arch = host.arch(torch.cuda.current_device())
    of = triton_tiles.Problem(case.C, case.side**2, case.L, case.layout == "channels_last", case.dtype, arch)
    loss = functools.partial(baselines.ours, backend="triton")

    def results() -> tuple[torch.Tensor, ...]:
        value = loss(tensors)
        # Without its graph: a leaf that is part of one made on another stream can't be differentiated in a capture.
        return value.detach(), *torch.autograd.grad(value, tensors[:3])

    compile_ahead(case, [row for _, row in rows(of)])
    expected = results()

    def milliseconds(kind: str, row: Row) -> float:
        with first(row):
            try:
                pairs = zip(results(), expected, strict=True)
                close = all(proof.relative_error(a, b.double()) < 1e-2 for a, b in pairs)
                rotation = Rotation(loss, rotated(tensors, clock.l2_bytes()))
                run = rotation.forward if kind == "forward" else rotation.both
                replay = clock.capture(run, REPETITIONS)
            except Exception as error:  # too much shared memory, mostly
                print(f"{row}: {type(error).__name__}")
                return float("inf")
            times = [replay_ms(clock, replay) / REPETITIONS for _ in range(20)]
        return statistics.median(times) if close else float("inf")

    row, times = search(of, milliseconds, end)
    times_ms = ", ".join(f"{kind} {now:.4f} -> {best:.4f} ms" for kind, (now, best) in times.items())
    return f"# {case.name} on {torch.cuda.get_device_name()}: {times_ms} (the backward's with a forward)\n{row!r},"
