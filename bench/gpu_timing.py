"""The clock and the counters of a GPU: rotated inputs, events, graphs, launches, memory.

``CudaClock`` alone calls CUDA. ``WallClock`` has its methods and no GPU: with it the program around the clock can be
tried anywhere (``--rehearse``), and its times mean nothing.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .baselines import Formulation
from .cases import Problem
from .timing import interleave

#: Calls captured in one graph, at least.
REPETITIONS = 20
#: Inputs are rotated until this many times the L2 cache was read.
TIMES_L2 = 3


def rotated(problem: Problem, l2_bytes: int) -> list[Problem]:
    """The problem, and copies of its features, so many that one comes round when the L2 cache holds nothing of it."""
    count = max(2, math.ceil(TIMES_L2 * l2_bytes / problem.features.nbytes))
    copies = (problem.features.detach().clone().requires_grad_() for _ in range(count - 1))
    return [problem, *(problem._replace(features=features) for features in copies)]


class Rotation:
    """A formulation over rotated problems, its results kept until their turn comes again: written cold, too."""

    def __init__(self, formulation: Formulation, problems: Sequence[Problem]) -> None:
        self.formulation, self.problems = formulation, problems
        self.kept: list[object] = [None] * len(problems)
        self.turns = itertools.cycle(range(len(problems)))
        self.seed = torch.ones_like(formulation(*problems[0]).detach())

    def forward(self) -> Tensor:
        """The loss with all that it saves for a backward."""
        i = next(self.turns)
        self.kept[i] = None
        self.kept[i] = loss = self.formulation(*self.problems[i])
        return loss

    def both(self, mark: Callable[[], object] = lambda: None) -> None:
        """Loss and gradients, by a seed gradient that is there already; ``mark`` is called between the two."""
        i = next(self.turns)
        self.kept[i] = None
        loss = self.formulation(*self.problems[i])
        mark()
        self.kept[i] = torch.autograd.grad(loss, self.problems[i][:3], self.seed, allow_unused=True)

    def clear(self) -> None:
        self.kept = [None] * len(self.problems)


class CudaClock:
    """The current CUDA device."""

    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def wait(self) -> None:
        torch.cuda.synchronize()

    def intervals_ms(self, run: Callable[[Callable[[], object]], object]) -> tuple[float, ...]:
        """Device milliseconds between the start, each call of ``run``'s argument, and the end."""
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
        """Warm ``run`` up on a side stream, capture it so many times in one graph; the call that replays it."""
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

    def launches(self, run: Callable[[], object]) -> list[str]:
        """Names of the kernels, copies and fills that one ``run`` puts on the device.

        The profiler stays attached to the process: later calls may take the host a little longer.
        """
        # As PyTorch's profiler sets for its own CUDA graphs: CUPTI crashes when it comes back beside one.
        os.environ.update(DISABLE_CUPTI_LAZY_REINIT="1", TEARDOWN_CUPTI="0")
        self.wait()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            self.wait()
        with tempfile.TemporaryDirectory() as directory:
            trace = Path(directory, "trace.json")
            profile.export_chrome_trace(str(trace))
            names = device_events(json.loads(trace.read_text()))
        if not names:
            raise RuntimeError("the profiler saw nothing on the device")
        return names

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Most bytes held at once beyond those held before, the results among them."""
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class WallClock:
    """The host's clock in place of a device's; a graph is a loop, and nothing is counted."""

    def l2_bytes(self) -> int:
        return 1

    def wait(self) -> None:
        pass

    def intervals_ms(self, run: Callable[[Callable[[], object]], object]) -> tuple[float, ...]:
        times = [time.perf_counter()]
        run(lambda: times.append(time.perf_counter()))
        times.append(time.perf_counter())
        return tuple(1e3 * (b - a) for a, b in itertools.pairwise(times))

    def capture(self, run: Callable[[], object], repetitions: int) -> Callable[[], object]:
        def replay() -> None:
            for _ in range(repetitions):
                run()

        return replay

    def launches(self, run: Callable[[], object]) -> list[str]:
        raise NotImplementedError("there is no device to launch on")

    def peak_bytes(self, run: Callable[[], object]) -> int:
        raise NotImplementedError("there is no device memory")

    def release(self) -> None:
        gc.collect()


Clock = CudaClock | WallClock


def device_events(trace: dict) -> list[str]:
    """Names of what a profiler's trace shows on a device, in the order of time.

    >>> device_events({"traceEvents": [{"name": "b", "cat": "kernel", "ts": 2}, {"name": "op", "cat": "cpu_op"},
    ...                                {"name": "Memset", "cat": "gpu_memset", "ts": 1}, {"name": "x", "ph": "M"}]})
    ['Memset', 'b']
    """
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [e for e in trace["traceEvents"] if str(e.get("cat", "")).lower() in kinds]
    return [e["name"] for e in sorted(found, key=lambda e: float(e["ts"]))]


def quartiles(samples: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(samples, n=4, method="inclusive")


def graph_ms(clock: Clock, runs: dict[str, Callable[[], object]], repetitions: int, seconds: float) -> dict:
    """Quartiles of ms per call, each in a graph of ``repetitions`` calls, replayed in rounds; or why there is none."""
    replays, failures = {}, {}
    for name, run in runs.items():
        try:
            replays[name] = clock.capture(run, repetitions)
        except Exception as error:  # this one cannot be captured; the others can still be timed
            failures[name] = f"{type(error).__name__}: {error}"[:300]
            with contextlib.suppress(Exception):
                clock.release()
    timed = interleave({name: lambda r=replay: (replay_ms(clock, r),) for name, replay in replays.items()}, seconds)
    return {
        **{name: quartiles([total / repetitions for (total,) in samples]) for name, samples in timed.items()},
        **{name: {"error": reason} for name, reason in failures.items()},
    }


def replay_ms(clock: Clock, replay: Callable[[], object]) -> float:
    """Of the second of two replays: the first keeps the device busy while the host launches what is timed."""

    def run(mark: Callable[[], object]) -> None:
        replay()
        mark()
        replay()

    return clock.intervals_ms(run)[1]


def eager_ms(clock: Clock, rotations: dict[str, Rotation], seconds: float) -> dict[str, dict[str, list[float]]]:
    """Quartiles of forward, backward and both between events, launched from Python call by call."""
    timed = interleave({n: lambda r=r: clock.intervals_ms(r.both) for n, r in rotations.items()}, seconds)
    return {
        name: {
            "forward": quartiles([f for f, _ in samples]),
            "backward": quartiles([b for _, b in samples]),
            "both": quartiles([f + b for f, b in samples]),
        }
        for name, samples in timed.items()
    }


def host_ms(clock: Clock, run: Callable[[], object], calls: int = 20, rounds: int = 5) -> float:
    """Milliseconds of a call that Python takes to launch it: the median of rounds that do not wait for the device."""
    times = []
    for _ in range(rounds):
        clock.wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append(time.perf_counter() - start)
    clock.wait()
    return 1e3 * statistics.median(times) / calls


def copy_gb_per_s(clock: Clock, device: str, elements: int, seconds: float = 1.0) -> float:
    """``Tensor.copy_`` between two large float32 buffers: bytes read and written over the median time."""
    source, target = (torch.full((elements,), float(i), device=device) for i in range(2))
    timed = interleave({"copy": lambda: clock.intervals_ms(lambda _: target.copy_(source))}, seconds)["copy"]
    return 2 * source.nbytes / statistics.median(t for (t,) in timed) / 1e6
