"""How times become figures: interleaved rounds, quartiles, rotated inputs, foreign load, bytes moved."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .baselines import Formulation
from .cases import Problem
from .clocks import Clock, Mark
from .results import reason

WARM_UP, MINIMUM = 3, 5  # rounds
#: Cores that others may keep busy before a time is no longer worth reporting.
FOREIGN_LIMIT = 0.1

T = TypeVar("T")


def interleave(
    runs: Mapping[str, Callable[[], T]], seconds: float, before: Callable[[], object] = lambda: None
) -> dict[str, list[T]]:
    """Call each run once a round for about ``seconds``; the results of each. ``before`` comes before each round.

    Every round has an order of its own: what ran before decides what is in the caches, so it must not always be the
    same contender.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    shuffle = random.Random(0).sample
    gc.collect()
    gc.disable()
    try:
        done, end = 0, math.inf
        while done < WARM_UP + MINIMUM or time.perf_counter() < end:
            if done == WARM_UP:
                end = time.perf_counter() + seconds
            if done >= WARM_UP:
                before()
            for name in shuffle(list(runs), len(runs)):
                results[name].append(runs[name]())
            done += 1
    finally:
        gc.enable()
    return {name: r[WARM_UP:] for name, r in results.items()}


def quartiles(samples: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(samples, n=4, method="inclusive")


def phases_ms(
    clock: Clock,
    runs: Mapping[str, Callable[[Mark], object]],
    seconds: float,
    before: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Quartiles of forward, backward and both, in ms, and the number of rounds; runs mark where backward begins.

    What has no backward takes its end there: some nanoseconds. ``before`` comes before each round.
    """
    intervals = {name: functools.partial(clock.intervals_ms, run) for name, run in runs.items()}
    timed = interleave(intervals, seconds, before)
    figures: dict[str, dict[str, Any]] = {}
    for name, samples in timed.items():
        forward, backward = (quartiles(phase) for phase in zip(*samples, strict=True))
        both = quartiles([sum(sample) for sample in samples])
        figures[name] = {"rounds": len(samples), "forward": forward, "backward": backward, "both": both}
    return figures


def once(
    formulation: Formulation, problem: Problem, mark: Mark = lambda: None, leaves: tuple[Tensor, ...] | None = None
) -> None:
    """Forward and backward with fresh gradients that are dropped at once; ``mark`` is called between the two.

    ``leaves`` are the problem's, found before where that would be timed.
    """
    result = formulation(problem)
    mark()
    if leaves := problem.leaves if leaves is None else leaves:
        torch.autograd.grad(result, leaves, problem.seed, allow_unused=True)


class Rotation:
    """A formulation over rotated problems, its results kept until their turn comes again: written cold, too."""

    def __init__(self, formulation: Formulation, problems: Sequence[Problem]) -> None:
        self.formulation, self.problems = formulation, problems
        self.kept: list[object] = [None] * len(problems)
        self.turns = itertools.cycle(range(len(problems)))
        self.leaves = [problem.leaves for problem in problems]
        result = formulation(problems[0]).detach()
        self.seed = torch.ones_like(result) if problems[0].seed is None else problems[0].seed.to(result.dtype)

    def forward(self) -> Tensor:
        """The result with all that it saves for a backward."""
        i = next(self.turns)
        self.kept[i] = None
        self.kept[i] = result = self.formulation(self.problems[i])
        return result

    def both(self, mark: Mark = lambda: None) -> None:
        """Result and gradients, by a seed gradient made before; ``mark`` is called between the two."""
        i = next(self.turns)
        self.kept[i] = None
        result = self.formulation(self.problems[i])
        mark()
        self.kept[i] = result
        if self.leaves[i]:
            self.kept[i] = torch.autograd.grad(result, self.leaves[i], self.seed, allow_unused=True)

    def clear(self) -> None:
        self.kept = [None] * len(self.problems)


def graph_ms(
    clock: Clock, runs: Mapping[str, Callable[[], object]], repetitions: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Quartiles of ms per call, each in a graph of ``repetitions`` calls, and why a run has none."""
    replays, failures = {}, {}
    for name, run in runs.items():
        try:
            replays[name] = functools.partial(replay_ms, clock, clock.capture(run, repetitions))
        except Exception as error:  # this one cannot be captured; the others can still be timed
            failures[name] = reason(error)
            with contextlib.suppress(Exception):
                clock.release()
    timed = interleave(replays, seconds)
    return {name: quartiles([total / repetitions for total in samples]) for name, samples in timed.items()}, failures


def replay_ms(clock: Clock, replay: Callable[[], object]) -> float:
    """Milliseconds of the second of two replays: the first keeps the device busy while the host launches the second."""

    def run(mark: Mark) -> None:
        replay()
        mark()
        replay()

    return clock.intervals_ms(run)[1]


def host_ms(clock: Clock, run: Callable[[], object], calls: int = 20, rounds: int = 5) -> float:
    """Milliseconds of a call that Python needs to launch it: the median of rounds that do not wait for the device."""
    times = []
    for _ in range(rounds):
        clock.wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append(time.perf_counter() - start)
    clock.wait()
    return 1e3 * statistics.median(times) / calls


class LoadMeter:
    """How many of our cores others kept busy since the meter was made (Linux; stolen time counts as busy)."""

    def __init__(self) -> None:
        self._start = self._read()

    def verdict(self) -> dict[str, Any]:
        """What a result says of it."""
        foreign = self.foreign_cores()
        return {"foreign_cores": [foreign], "quiet": foreign <= FOREIGN_LIMIT}

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


class FarCaches:
    """Whether PyTorch's threads run on cores that share no cache, as on two L3 caches of one processor.

    A write to memory that another thread's caches hold then takes many times as long, whatever the program. A virtual
    machine's cores move about, so the samples of a minute differ.
    """

    #: Elements of each thread's part, more than an L2 cache holds, and of what PyTorch never divides among threads.
    PART, PIECE = 2**20, 2**14
    #: How many times as long a write must take for caches to count as far.
    SLOW = 5.0
    #: Threads whose caches are tried.
    MOST = 4

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        self._memory = torch.zeros(threads, self.PART)
        self._others = list(self._memory[1 :: math.ceil(threads / self.MOST)])
        self._samples: list[bool] = []

    def sample(self) -> None:
        """Some milliseconds."""
        own, others = self._write_ms(read_by_one=False), self._write_ms(read_by_one=True)
        self._samples.append(others > self.SLOW * own)

    def share(self) -> float:
        """Of the samples so far."""
        return statistics.fmean(self._samples) if self._samples else 0.0

    def _write_ms(self, *, read_by_one: bool) -> float:
        self._memory.fill_(0)  # each thread its part
        for part in self._others if read_by_one else ():
            for piece in part.split(self.PIECE):
                piece.sum()
        start = time.perf_counter()
        self._memory.fill_(1)
        return 1e3 * (time.perf_counter() - start)


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
