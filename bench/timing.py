"""Clocks and counters: interleaved timing, foreign load, copy bandwidth, bytes moved, peak memory."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .baselines import Formulation
from .cases import Problem

PHASES = ("forward", "backward", "both")
WARM_UP, MINIMUM = 3, 5  # rounds


def once(formulation: Formulation, problem: Problem) -> tuple[float, ...]:
    """Seconds of forward, backward and both, with fresh gradients that are dropped within the time."""
    start = time.perf_counter()
    loss = formulation(*problem)
    middle = time.perf_counter()
    torch.autograd.grad(loss, problem[:3], allow_unused=True)
    end = time.perf_counter()
    return middle - start, end - middle, end - start


def interleave(runs: dict[str, Callable[[], tuple[float, ...]]], seconds: float) -> dict[str, list[tuple[float, ...]]]:
    """Call each run once a round for about ``seconds``; the results of each.

    Every round has an order of its own: what ran before decides what is in the caches, so it must not be always the
    same contender.
    """
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
    shuffle = random.Random(0).sample
    gc.collect()
    gc.disable()
    try:
        done, end = 0, math.inf
        while done < WARM_UP + MINIMUM or time.perf_counter() < end:
            if done == WARM_UP:
                end = time.perf_counter() + seconds
            for name in shuffle(list(runs), len(runs)):
                results[name].append(runs[name]())
            done += 1
    finally:
        gc.enable()
    return {name: r[WARM_UP:] for name, r in results.items()}


def quartiles_ms(samples: list[tuple[float, ...]]) -> dict[str, list[float]]:
    """Phase -> lower quartile, median and upper quartile in ms."""
    phases = zip(PHASES, zip(*samples, strict=True), strict=True)
    return {phase: [1e3 * q for q in statistics.quantiles(s, n=4, method="inclusive")] for phase, s in phases}


class LoadMeter:
    """How many of our cores others kept busy since the meter was made (Linux; stolen time counts as busy)."""

    def __init__(self) -> None:
        self._start = self._read()

    def foreign_cores(self) -> float:
        seconds, busy, own = (b - a for a, b in zip(self._start, self._read(), strict=True))
        return max(0.0, (busy - own) / seconds)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        ours, ticks = {f"cpu{i}" for i in os.sched_getaffinity(0)}, 0
        with open("/proc/stat") as file:
            for name, *numbers in map(str.split, file):
                if name in ours:
                    user, nice, system, _, _, irq, softirq, steal = map(int, numbers[:8])
                    ticks += user + nice + system + irq + softirq + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def copy_gb_per_s(seconds: float = 1.0, megabytes: int = 256) -> float:
    """``Tensor.copy_`` between two large buffers: bytes read and written over the median time."""
    source, target = (torch.full((megabytes * 2**18,), float(i)) for i in range(2))

    def run() -> tuple[float]:
        start = time.perf_counter()
        target.copy_(source)
        return (time.perf_counter() - start,)

    times = interleave({"copy": run}, seconds)["copy"]
    return 2 * source.nbytes / statistics.median(t for (t,) in times) / 1e9


class ByteCounter(TorchDispatchMode):
    """Bytes the operators called within read and wrote, each its inputs once and its outputs once.

    Views move nothing, and an expanded dimension is read once. What torch.compile made is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if not func._schema.is_mutable:
            memory = {t.untyped_storage().data_ptr() for t in inputs}
            outputs = [t for t in outputs if t.untyped_storage().data_ptr() not in memory]
        name = func._schema.name
        if "empty" not in name and any(t.numel() for t in outputs):
            from_shape_alone = name.endswith("_like") or "::new_" in name
            self.bytes += _bytes(outputs) + (0 if from_shape_alone else _bytes(inputs))
        return out


def _tensors(tree: object) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(
        t.element_size() * math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step) for t in tensors
    )


def bytes_moved(formulation: Formulation, problem: Problem) -> int:
    """Bytes of one forward and backward, counted operator by operator."""
    with ByteCounter() as counter:
        once(formulation, problem)
    return counter.bytes


def peak_bytes(formulation: Formulation, problem: Problem) -> int:
    """Most bytes that one forward and backward hold at once beyond the problem, the gradients among them."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        once(formulation, problem)
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
