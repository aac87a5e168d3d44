"""What is counted is counted, and rounds, rotations and graphs are timed as they say."""

import subprocess
import sys

import pytest
import torch
from support.benchmark import FakeClock

from bench import baselines, measure, proof
from bench.cases import Case, problem, rotated

TINY = Case(2, 8, "channels_last", torch.float32)


def test_bytes_are_counted_by_operator():
    x, row = torch.ones(10, 20), torch.ones(20)
    with measure.ByteCounter() as counter:
        y = x.view(200).relu()  # reads 800, writes 800; the view moves nothing
        y.view(10, 20).add_(row.expand(10, 20))  # reads 800 and, once, 80; writes 800
        torch.empty_like(x)  # nothing
        torch.zeros_like(x)  # writes 800
    assert counter.bytes == 1600 + 1680 + 800


def test_rounds_are_interleaved_in_changing_orders():
    called = []
    runs = {name: lambda name=name: called.append(name) or (len(called), 1.0, 2.0) for name in "abc"}
    before = []
    results = measure.interleave(runs, seconds=0, before=lambda: before.append(len(called)))
    assert before == [3 * i for i in range(measure.WARM_UP, measure.WARM_UP + measure.MINIMUM)]
    rounds = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(rounds) == measure.WARM_UP + measure.MINIMUM
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3
    assert [len(r) for r in results.values()] == [measure.MINIMUM] * 3


def test_quartiles():
    assert measure.quartiles([4.0, 1.0, 2.0]) == [1.5, 2.0, 3.0]


def test_far_caches_are_seen_by_what_another_thread_has_read(monkeypatch):
    """A thread reads the parts of the others, and only these, in pieces that PyTorch does not divide among threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(measure.FarCaches, "PART", 4 * measure.FarCaches.PIECE)
    far, read, ms = measure.FarCaches(), [], iter([1.0, 1.2, 1.0, 30.0, 1.0, 4.9, 1.0, 5.1])
    assert far.share() == 0
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "sum", lambda x: read.append((x.data_ptr(), x.numel())))
        far.sample()
    part = far._memory.nbytes // 6
    places = [part * thread + i * part // 4 for thread in (1, 3, 5) for i in range(4)]  # of every second thread
    assert [place - far._memory.data_ptr() for place, _ in read] == places
    assert {count for _, count in read} == {2**14}  # PyTorch divides from 2**15 elements on
    far._samples.clear()
    monkeypatch.setattr(far, "_write_ms", lambda read_by_one: next(ms))
    for _ in range(4):
        far.sample()
    assert far.share() == 0.5


def test_foreign_load_is_what_others_use(monkeypatch):
    readings = iter([(0.0, 100.0, 7.0), (10.0, 115.0, 19.0)])  # seconds, busy core-seconds, our own
    monkeypatch.setattr(measure.LoadMeter, "_read", staticmethod(lambda: next(readings)))
    assert measure.LoadMeter().foreign_cores() == pytest.approx(0.3)


def test_foreign_load_is_seen():
    spin = "import time; end = time.time() + 5\nwhile time.time() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", spin])
    try:
        meter = measure.LoadMeter()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        assert meter.foreign_cores() > 0.3
    finally:
        child.kill()
        child.wait()


def test_inputs_are_rotated_beyond_three_times_the_cache():
    data = problem(TINY)
    size = data.features.nbytes
    for l2, count in ((size, 3), (10 * size, 30), (10 * size + 1, 31), (1, 2)):
        problems = rotated(data, l2)
        assert len(problems) == count
        assert len({p.features.data_ptr() for p in problems}) == count
        assert all(torch.equal(p.features, data.features) and p.features.requires_grad for p in problems)
        assert all(p.features.is_contiguous(memory_format=torch.channels_last) for p in problems)
        assert all(p.weight is data.weight for p in problems)


def test_a_rotation_takes_turns_and_keeps_results_until_their_turn():
    data = problem(TINY)
    problems = rotated(data, data.features.nbytes)
    seen = []

    def formulation(x):
        seen.append(next(i for i, p in enumerate(problems) if p is x))
        return baselines.plain_eager(x)

    rotation = measure.Rotation(formulation, problems)
    marks = []
    for _ in range(4):
        rotation.both(lambda: marks.append(len(seen)))
    assert seen == [0, 0, 1, 2, 0] and marks == [2, 3, 4, 5]
    expected = proof.truth("ours", data)[1:]
    for kept in rotation.kept:
        for got, exact in zip(kept, expected, strict=True):
            assert (got - exact).norm() < 1e-5 * exact.norm()
    assert len({kept[0].data_ptr() for kept in rotation.kept}) == 3
    assert rotation.forward().item() == pytest.approx(proof.truth("ours", data)[0].item(), rel=1e-5)
    assert rotation.kept[1] is not None and rotation.kept[1].requires_grad
    rotation.clear()
    assert rotation.kept == [None] * 3


def test_graph_times_are_per_call_and_a_failed_capture_is_reported():
    class Refusing(FakeClock):
        def capture(self, run, repetitions):
            if run is bad:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().capture(run, repetitions)

    def bad():
        pass

    calls = []
    timed, failures = measure.graph_ms(Refusing(), {"good": lambda: calls.append(1), "bad": bad}, 25, 0.0)
    assert timed == {"good": pytest.approx([(2 + 100) / 25] * 3)}  # 100: the fake counts both replays
    assert failures == {"bad": "RuntimeError: operation not permitted when stream is capturing"}
    assert len(calls) >= 5


def test_times_have_phases_and_the_host_is_timed_unwaited(monkeypatch):
    clock = FakeClock()
    rotation = measure.Rotation(baselines.plain_eager, rotated(problem(TINY), 1))
    timed = measure.phases_ms(clock, {"plain": rotation.both}, 0.0)["plain"]
    assert timed == {"rounds": measure.MINIMUM, "forward": [1.0] * 3, "backward": [2.0] * 3, "both": [3.0] * 3}
    assert clock.waits == 0
    now = iter([0.0, 0.010, 1.0, 1.015, 2.0, 2.090])  # 2, 3 and 18 ms a call
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    assert measure.host_ms(clock, lambda: None, calls=5, rounds=3) == pytest.approx(3)
    assert clock.waits == 4
