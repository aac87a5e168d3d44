"""The median time of a call, on a CPU or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

CALLS_ON_GPU = 10  #: between two events, so that the launches overlap


def median_seconds(call: Callable[[], object], device: str, *, least: int = 3, seconds: float = 0.1) -> float:
    """Median seconds of ``call()``, after two calls to warm up.

    It is measured at least ``least`` times, and again until ``seconds`` have passed, at most 100 times; on a GPU
    ("cuda") between two events around ten calls.
    """
    measure = _seconds_on_gpu if device == "cuda" else _seconds_on_cpu
    for _ in range(2):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < 100):
        times.append(measure(call))
    return statistics.median(times)


def _seconds_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_gpu(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS_ON_GPU):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS_ON_GPU
