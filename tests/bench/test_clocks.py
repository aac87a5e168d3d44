"""The clocks of a CPU and of a GPU, the latter tried without one."""

import contextlib
import functools
import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from bench import baselines, measure, sm_clock
from bench.cases import Case, problem
from bench.clocks import CudaClock, WallClock


def test_peak_memory_of_the_identity_is_its_gradient():
    case = Case(4, 64, "nchw", torch.float32)
    run = functools.partial(measure.once, baselines.identity, problem(case))
    assert WallClock().peak_bytes(run) == pytest.approx(case.floor_bytes / 2, abs=100)


def test_the_cuda_clock_calls_what_torch_documents(monkeypatch):
    """No GPU is needed to see that streams, events and the graph are asked for in the right order."""
    did = []

    class Event:
        made = itertools.count()

        def __init__(self, enable_timing):
            assert enable_timing
            self.at = next(self.made)

        def record(self):
            did.append("event")

        def synchronize(self):
            did.append("synchronize")

        def elapsed_time(self, other):
            return float(10 * (other.at - self.at))

    def stream(name):
        return SimpleNamespace(wait_stream=lambda other: did.append(f"{name} waits for {other.name}"), name=name)

    @contextlib.contextmanager
    def within(what):
        did.append(f"into {getattr(what, 'name', 'graph')}")
        yield
        did.append("out")

    fakes = {
        "Event": Event, "Stream": lambda: stream("side"), "current_stream": lambda: stream("main"), "stream": within,
        "graph": within, "CUDAGraph": lambda: SimpleNamespace(replay=lambda: did.append("replay")),
        "synchronize": lambda: did.append("wait"), "current_device": lambda: 0,
        "get_device_properties": lambda i: SimpleNamespace(L2_cache_size=50),
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 100, "max_memory_allocated": lambda: 350,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = CudaClock()
    assert clock.l2_bytes() == 50
    assert clock.intervals_ms(lambda mark: mark()) == (10.0, 10.0)
    assert clock.peak_bytes(lambda: did.append("run")) == 250
    did.clear()
    replay = clock.capture(lambda: did.append("run"), 2)
    warm_up = ["side waits for main", "into side", "run", "run", "run", "out", "main waits for side", "wait"]
    assert did == [*warm_up, "into graph", "run", "run", "out"]
    replay()
    assert did[-1] == "replay"


def test_the_multiprocessors_clock_is_sampled_while_something_is_timed():
    printing = ["sh", "-c", "while :; do echo '1500, 1980'; echo '1400, 1980'; sleep 0.02; done"]
    with sm_clock.sampled(lambda: printing) as seen:
        deadline = time.monotonic() + 10
        while seen() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert seen() == {"low": 1400, "median": pytest.approx(1450, abs=50), "high": 1500, "limit": 1980}


@pytest.mark.parametrize("command", [["/nonexistent"], ["sh", "-c", "echo no devices were found; exit 9"]])
def test_without_a_clock_to_read_the_times_are_still_taken(command):
    with sm_clock.sampled(lambda: command) as seen:
        time.sleep(0.05)
        assert seen() is None
