"""What measures time and memory on a CPU and on a GPU, behind one protocol."""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

#: Given to what is timed: called between two phases, it ends one and begins the next.
Mark = Callable[[], object]


class Launch(NamedTuple):
    """What ran on the device, and for how many microseconds."""

    name: str
    us: float


class Clock(Protocol):
    """How a device is timed; only :class:`CudaClock` calls CUDA."""

    def l2_bytes(self) -> int:
        """Size of the cache that rotated inputs must exceed."""

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""

    def intervals_ms(self, run: Callable[[Mark], object]) -> tuple[float, ...]:
        """Milliseconds between the start, each call of ``run``'s argument, and the end."""

    def capture(self, run: Callable[[], object], repetitions: int) -> Callable[[], object]:
        """The call that replays ``run`` this many times."""

    def launches(self, run: Callable[[], object]) -> list[Launch]:
        """The kernels, copies and fills that one ``run`` puts on the device."""

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Most bytes held at once beyond those held before, the results among them."""

    def release(self) -> None:
        """Give back memory that nothing refers to any more."""


class WallClock:
    """The CPU, by the host's clock. A graph is a loop, so that a GPU's program can be rehearsed with it."""

    def l2_bytes(self) -> int:
        return 1

    def wait(self) -> None:
        pass

    def intervals_ms(self, run: Callable[[Mark], object]) -> tuple[float, ...]:
        times = [time.perf_counter()]
        run(lambda: times.append(time.perf_counter()))
        times.append(time.perf_counter())
        return tuple(1e3 * (b - a) for a, b in itertools.pairwise(times))

    def capture(self, run: Callable[[], object], repetitions: int) -> Callable[[], object]:
        def replay() -> None:
            for _ in range(repetitions):
                run()

        return replay

    def launches(self, run: Callable[[], object]) -> list[Launch]:
        raise NotImplementedError("a CPU launches no kernels")

    def peak_bytes(self, run: Callable[[], object]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        events = [e for e in _trace(profile) if e["name"] == "[memory]"]
        return max(itertools.accumulate((e["args"]["Bytes"] for e in sorted(events, key=_start)), initial=0))

    def release(self) -> None:
        gc.collect()


class CudaClock:
    """The current CUDA device, by events."""

    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def wait(self) -> None:
        torch.cuda.synchronize()

    def intervals_ms(self, run: Callable[[Mark], object]) -> tuple[float, ...]:
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)

        mark()
        run(mark)
        mark()
        events[-1].synchronize()
        return tuple(a.elapsed_time(b) for a, b in itertools.pairwise(events))

    def capture(self, run: Callable[[], object], repetitions: int) -> Callable[[], object]:
        """One graph of all repetitions, captured after warming ``run`` up on a side stream."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                for _ in range(repetitions):
                    run()
        except Exception:  # a capture that fails may leave its stream the current one
            torch.cuda.set_stream(current)
            raise
        return graph.replay

    def launches(self, run: Callable[[], object]) -> list[Launch]:
        """The profiler stays attached to the process: later calls may take the host a little longer."""
        # As PyTorch's profiler sets for its own CUDA graphs: CUPTI crashes when it comes back beside one.
        os.environ.update(DISABLE_CUPTI_LAZY_REINIT="1", TEARDOWN_CUPTI="0")
        self.wait()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            self.wait()
        found = device_events(_trace(profile))
        if not found:
            raise RuntimeError("the profiler saw nothing on the device")
        return found

    def peak_bytes(self, run: Callable[[], object]) -> int:
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def _trace(profile: torch.profiler.profile) -> list[dict]:
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        profile.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def _start(event: dict) -> float:
    return float(event["ts"])


def device_events(trace: list[dict]) -> list[Launch]:
    """What the events of a profiler's trace show on a device, in the order of time.

    >>> device_events([{"name": "b", "cat": "kernel", "ts": 2, "dur": 1.5}, {"name": "op", "cat": "cpu_op"},
    ...                {"name": "Memset", "cat": "gpu_memset", "ts": 1, "dur": 1}, {"name": "x", "ph": "M"}])
    [Launch(name='Memset', us=1.0), Launch(name='b', us=1.5)]
    """
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    found = sorted((e for e in trace if str(e.get("cat", "")).lower() in kinds), key=_start)
    return [Launch(e["name"], float(e["dur"])) for e in found]
