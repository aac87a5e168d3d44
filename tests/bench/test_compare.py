"""Two results are compared as a reader would: what is slower beyond the noise, and what is not there any more."""

import json
import time

import pytest
import torch
from support.benchmark import GPU_ROWS, PAPER, FakeClock, rows

from bench import __main__ as command_line
from bench import baselines, op, results
from bench.__main__ import main
from bench.cases import Case
from bench.clocks import WallClock
from bench.compare import compare
from rebalfer_kernels import ops

TINY = Case(2, 16, "channels_last", torch.float32)


def _result(*rows, **more):
    return {"device": "EPYC", "torch": "2.15", "commit": "a", "rows": [*rows], "rejected": [], **more}


def _row(contender, low, median, high, case="a", phase="both"):
    return {"case": case, "contender": contender, phase: [low, median, high]}


@pytest.mark.parametrize(
    "after, identity, slower, faster",
    [
        ((2.11, 2.2, 2.3), 1.0, True, False),
        ((2.09, 2.2, 2.3), 1.0, False, False),  # the middle halves overlap
        ((2.11, 2.12, 2.2), 1.07, False, False),  # the machine is slower
        ((2.5, 2.6, 2.7), 1.07, True, False),  # slower than the machine is
        ((2.0, 2.0, 2.0), 0.5, False, False),  # a faster machine makes nothing slower
        ((1.8, 1.85, 1.89), 1.0, False, True),
        ((1.8, 1.85, 1.89), 0.9, False, False),
    ],
)
def test_slower_is_beyond_the_noise_and_the_machines_drift(after, identity, slower, faster):
    old = _result(_row("ours", 1.9, 2.0, 2.1), _row("identity", 0.9, 1.0, 1.1))
    new = _result(_row("ours", *after), _row("identity", 0.9 * identity, identity, 1.1 * identity))
    found = compare(old, new)
    assert [c.contender for c in found.slower if c.contender == "ours"] == ["ours"] * slower and found.failed == slower
    assert ("ours" in [c.contender for c in found.faster]) == faster


def test_a_difference_of_less_than_two_percent_is_not_named():
    old, new = _result(_row("ours", 1.999, 2, 2.001)), _result(_row("ours", 2.03, 2.035, 2.04))
    assert not compare(old, new).slower
    assert compare(old, _result(_row("ours", 2.03, 2.041, 2.05))).slower


def test_what_appeared_disappeared_and_changed_is_named():
    old = _result(_row("ours", 1, 1, 1), _row("released", 1, 1, 1), _row("ours", 1, 1, 1, case="b"))
    refusal = {"case": "a", "contender": "released", "reason": None, "error": 0.25}
    new = _result(_row("ours", 1, 1, 1), _row("ours", 1, 1, 1, case="c"), commit="b", rejected=[refusal])
    found = compare(old, new)
    assert str(found).splitlines() == [
        "changed: commit: a -> b",
        "appeared: c, ours",
        "disappeared: a, released (relative error 0.25)",
        "disappeared: b, ours",
        "1 of 1 times differ by no more than the noise",
    ]
    assert not found.failed
    wrong = _result(_row("released", 1, 1, 1), rejected=[{**refusal, "contender": "ours"}])
    assert compare(old, wrong).failed


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"left_out": ["a"]}, "no time was left"),
        ({"errors": [{"case": "a", "error": "MemoryError: "}]}, "MemoryError: "),
        ({"rows": [_row("released", 1, 1, 1)]}, "was not measured"),
    ],
)
def test_ours_gone_from_a_case_that_was_to_be_measured_fails(more, reason):
    old = _result(_row("ours", 1, 1, 1), _row("released", 1, 1, 1))
    new = {**_result(), **more}
    found = compare(old, new)
    assert found.failed and f"disappeared: a, ours ({reason})" in str(found).splitlines()
    assert not compare(old, _result()).failed  # the case is not measured any more


def test_what_others_wrote_may_become_slower():
    found = compare(_result(_row("released", 1, 1, 1)), _result(_row("released", 2, 2, 2)))
    assert found.slower and not found.failed


def test_graphs_calls_from_python_and_steps_are_compared_alike():
    slower = [{**r, "eager": {"both": [0.13, 0.14, 0.15]}} if r["case"] == PAPER else r for r in GPU_ROWS]
    found = compare(_result(*GPU_ROWS), _result(*slower)).slower
    assert {(c.case, c.phase) for c in found} == {(PAPER, "launched both")}
    assert compare(_result(*rows("x", ours=10.0)), _result(*rows("x", ours=20.0))).changes[0].ratio == 2
    config = {"backbone": {"name": "resnet18"}, "image_size": 112, "batch_size": 16}
    steps = [_result({"contender": "ours", "ms": [t] * 3}, config=config) for t in (10.0, 11.0)]
    (change,) = compare(*steps).slower
    assert str(change) == "resnet18-112-N16, ours, ms: 10 ms (10 to 10) -> 11 ms (11 to 11), 1.10×"


def _measure(path, monkeypatch):
    two = {name: baselines.FORMULATIONS[name] for name in ("ours", "identity")}
    monkeypatch.setattr(baselines, "contenders", lambda case, more: two)
    monkeypatch.setattr(op, "copy_gb_per_s", lambda device: 10.0)
    return op.run([TINY], 0.0, 1000.0, path, kind="cpu", clock=WallClock(), memory="fresh")[1]


def _kernel(monkeypatch, name, instead):
    """Replace a kernel of the backend that serves; the wrapper gets the kernel and its arguments."""
    backend = next((b for b in baselines.fused_backends("cpu") if baselines.BACKENDS[b].available().ok), None)
    if backend is None:
        pytest.skip("no fused backend is available on this CPU")
    real = ops.OPERATORS[backend][name]
    monkeypatch.setitem(ops.OPERATORS[backend], name, lambda *arguments: instead(real, *arguments))


def test_a_slowed_kernel_is_caught(tmp_path, monkeypatch, capsys, python_autograd):
    before = _measure(tmp_path / "before", monkeypatch)
    _kernel(monkeypatch, "head_backward", lambda real, *arguments: time.sleep(0.05) or real(*arguments))
    after = _measure(tmp_path / "after", monkeypatch)
    capsys.readouterr()
    assert main(["compare", str(before), str(after)]) == 1
    slower = [line for line in capsys.readouterr().out.splitlines() if line.startswith("slower: ")]
    assert [line.split(": ")[1] for line in slower if ", ours, " in line] == [
        f"{TINY.name}, ours, {phase}" for phase in ("backward", "both")
    ]
    assert main(["compare", str(before), str(before)]) == 0


def test_a_wrong_kernel_has_no_row_and_fails_the_run(tmp_path, monkeypatch, capsys, python_autograd):
    def wrong(real, *arguments):
        d_features, *others = real(*arguments)
        return 1.01 * d_features, *others

    monkeypatch.setattr(op, "copy_gb_per_s", lambda device: 10.0)
    monkeypatch.setattr(results, "environment", lambda kind: {"kind": kind, "device": "EPYC"})
    monkeypatch.setattr(command_line, "_clock", lambda kind: FakeClock())
    assert main(["op", "--rehearse", "--seconds", "0", "--out", str(tmp_path / "right")]) == 0
    _kernel(monkeypatch, "head_backward", wrong)
    assert main(["op", "--rehearse", "--seconds", "0", "--out", str(tmp_path / "wrong")]) == 1
    (path,) = (tmp_path / "wrong").iterdir()
    assert "ours" not in {row["contender"] for row in json.loads(path.read_text())["rows"]}
    assert main(["compare", str(tmp_path / "right"), str(tmp_path / "wrong")]) == 1
    assert "ours (relative error 0.0" in capsys.readouterr().out


def test_files_that_are_missing_or_have_no_other_are_refused(tmp_path, capsys):
    (tmp_path / "op-a.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "op-b.json"), str(tmp_path)]) == 2
    assert main(["compare", str(tmp_path), str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.splitlines()[0].endswith("expected files of results or folders of them")
