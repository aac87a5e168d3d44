"""The benchmark's own numbers: what it times is right, what it counts is counted, what it reports is what it found."""

import doctest
import json
import math
import subprocess
import sys

import pytest
import torch

import rebalfer_kernels as rk
from bench import baselines, cases, gpu_timing, op, report, timing
from bench.__main__ import main
from bench.cases import Case, problem

SMALL = {
    (layout, dtype): Case(3, 20, layout, dtype)
    for layout in ("nchw", "channels_last")
    for dtype in (torch.float32, torch.bfloat16)
}


@pytest.mark.parametrize("case", SMALL.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("name", baselines.FORMULATIONS)
def test_formulations_equal_float64(name, case):
    formulation, data = baselines.FORMULATIONS[name], problem(case)
    expected = baselines.truth(name, data)
    assert baselines.worst_error(formulation, data, expected) < baselines.TOLERANCE[case.dtype]
    assert baselines.worst_error(formulation, data.double(), expected) < 1e-12


@pytest.mark.parametrize("name", ["plain eager", "best eager"])
def test_formulations_compile(name):
    data = problem(SMALL["channels_last", torch.float32])
    compiled = torch.compile(baselines.FORMULATIONS[name], fullgraph=True, backend="aot_eager")
    assert baselines.worst_error(compiled, data, baselines.truth(name, data)) < 1e-5


def _lambda_off_by_a_tenth(*arguments):
    return baselines.best_eager(*arguments[:-1], 1.1 * arguments[-1])


def _flip_left_out(features, *rest):
    image, twin = features.chunk(2)
    return baselines.plain_eager(torch.cat([image, twin.flip(-1)]), *rest)


def _gradient_doubled(features, *rest):
    return baselines.plain_eager(2 * features - features.detach(), *rest)


def _bias_forgotten(features, weight, bias, *rest):
    return baselines.plain_eager(features, weight, bias.detach(), *rest)


def _not_a_number(*arguments):
    return baselines.plain_eager(*arguments) * math.nan


@pytest.mark.parametrize("case", SMALL.values(), ids=lambda c: c.name)
def test_wrong_formulations_are_refused(case):
    wrong = (_lambda_off_by_a_tenth, _flip_left_out, _gradient_doubled, _bias_forgotten, _not_a_number)
    passed, rejected = op.prove(case, {"ours": baselines.ours, **{f.__name__: f for f in wrong}})
    assert list(passed) == ["ours"]
    assert [r["contender"] for r in rejected] == [f.__name__ for f in wrong]
    assert [r["error"] is None for r in rejected] == [False, False, False, True, True]
    assert all(r["error"] > 2 * baselines.TOLERANCE[case.dtype] for r in rejected[:3])


def test_bytes_are_counted_by_operator():
    x, row = torch.ones(10, 20), torch.ones(20)
    with timing.ByteCounter() as counter:
        y = x.view(200).relu()  # reads 800, writes 800; the view moves nothing
        y.view(10, 20).add_(row.expand(10, 20))  # reads 800 and, once, 80; writes 800
        torch.empty_like(x)  # nothing
        torch.zeros_like(x)  # writes 800
    assert counter.bytes == 1600 + 1680 + 800


def test_bytes_of_the_formulations_are_those_of_the_design():
    case = Case(16, 256, "channels_last", torch.float32)
    data, s = problem(case), case.floor_bytes / 4
    counted = {name: timing.bytes_moved(f, data) for name, f in baselines.FORMULATIONS.items()}
    assert 4 * s <= counted["identity"] < 4 * s + 100
    assert 6 * s < counted["best eager"] < 8 * s
    assert 14 * s < counted["plain eager"] < 20 * s
    assert 65 * s < counted["released"] < 80 * s
    told = rk.explain(data.features, data.weight, data.targets)
    if told.bytes_moved is not None:  # the reference counts nothing; explain leaves out the weight and its gradient
        assert counted["ours"] == pytest.approx(told.bytes_moved, rel=0.03)


def test_peak_memory_of_the_identity_is_its_gradient():
    case = Case(4, 64, "nchw", torch.float32)
    assert timing.peak_bytes(baselines.identity, problem(case)) == pytest.approx(case.floor_bytes / 2, abs=100)


def test_rounds_are_interleaved_in_changing_orders():
    called = []
    runs = {name: lambda name=name: called.append(name) or (len(called), 1.0, 2.0) for name in "abc"}
    results = timing.interleave(runs, seconds=0)
    rounds = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(rounds) == timing.WARM_UP + timing.MINIMUM
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3
    assert [len(r) for r in results.values()] == [timing.MINIMUM] * 3
    quartiles = timing.quartiles_ms([(1.0, 10.0, 0.1), (2.0, 20.0, 0.2), (4.0, 40.0, 0.4)])
    assert quartiles["forward"] == pytest.approx([1500, 2000, 3000])
    assert quartiles["both"] == pytest.approx([150, 200, 300])


def test_foreign_load_is_what_others_use(monkeypatch):
    readings = iter([(0.0, 100.0, 7.0), (10.0, 115.0, 19.0)])  # seconds, busy core-seconds, our own
    monkeypatch.setattr(timing.LoadMeter, "_read", staticmethod(lambda: next(readings)))
    assert timing.LoadMeter().foreign_cores() == pytest.approx(0.3)


def test_foreign_load_is_seen():
    spin = "import time; end = time.time() + 5\nwhile time.time() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", spin])
    try:
        meter = timing.LoadMeter()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        assert meter.foreign_cores() > 0.3
    finally:
        child.kill()
        child.wait()


def _rows(case, **both):
    return [{"case": case, "contender": name.replace("_", " "), "both": [0, ms, 0]} for name, ms in both.items()]


def test_goals_take_the_worst_case_and_count_a_missing_row_as_not_met():
    rows = _rows("a-float32", ours=10, identity=8, released=150, best=12)
    rows += _rows("b-float32", ours=10, identity=5, released=130, best=27)
    for row in rows:
        row["contender"] = row["contender"].replace("best", "best eager, compiled")
    judged = {
        g["goal"]: (g["figure"] and round(g["figure"], 6), g["met"])
        for g in op.goals(rows, {"a-float32": 0.9, "b-float32": 1.0})
    }
    assert judged == {
        "time against the identity op": (2.0, False),
        "speed-up over plain eager, compiled": (None, False),
        "speed-up over best eager, compiled": (1.2, True),
        "speed-up over best eager, compiled, geometric mean": (1.8, True),
        "speed-up over the released formulation": (13.0, True),
        "time of bfloat16 against float32, by turns": (1.0, True),
    }
    assert op.goals(rows, {})[0]["cases"] == {"a-float32": 1.25, "b-float32": 2.0}
    assert not op.goals(rows, {"a-float32": 0.9, "b-float32": 1.01})[-1]["met"]
    assert not op.goals(rows, {})[-1]["met"]


def test_the_dtypes_take_turns_at_each_size_that_has_both(monkeypatch):
    turns = []
    monkeypatch.setattr(timing, "once", lambda f, data: turns.append(data.features.dtype) or (1, 1, 2))
    cases = [*SMALL.values(), Case(2, 8, "nchw", torch.float32)]
    ratios = op.bfloat16_over_float32(cases, 0.0)
    assert ratios == {c.name: 1.0 for c in SMALL.values() if c.dtype == torch.float32}
    assert {turns[i] for i in (0, 1)} == {torch.float32, torch.bfloat16}


@pytest.fixture
def result(monkeypatch):
    """A run of the real thing at a small size, without the compiler."""
    monkeypatch.setattr(baselines, "contenders", lambda: baselines.FORMULATIONS)
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda: 10.0)
    return op.run([SMALL["nchw", torch.float32]], 0.0, "fresh")


def test_run_writes_what_it_measured(result, tmp_path):
    path = op.write(result, tmp_path)
    assert [path] == list(tmp_path.iterdir())
    read = json.loads(path.read_text())
    assert {"device", "torch", "triton", "python", "threads", "commit", "date", "dirty", "goals", "rows"} <= read.keys()
    assert [row["contender"] for row in read["rows"]] == list(baselines.FORMULATIONS)
    identity = read["rows"][1]
    for row in read["rows"]:
        low, median, high = row["both"]
        assert 0 < low <= median <= high
        assert row["ratio_to_identity"] == pytest.approx(median / identity["both"][1])
        assert row["gb_per_s"] == pytest.approx(4 * (3 * 20 * 49 * 4) / (median / 1e3) / 1e9)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / 10.0)
        assert row["error"] < 1e-5


def test_report_shows_the_newest_quiet_result(result, tmp_path):
    def save(name, **changes):
        (tmp_path / f"op-{name}.json").write_text(json.dumps({**result, "quiet": True, **changes}))

    save("old", date="2020-01-01", device="Old")
    save("new", date="2021-01-01", device="New")
    save("disturbed", date="2022-01-01", device="Disturbed", quiet=False)
    save("reused", date="2020-01-01", device="Other", memory="reused")
    assert [r["device"] for r in report.newest(tmp_path)] == ["New", "Other"]

    rows = _rows("N1", ours=2.0, identity=1.6, released=30.0)
    for row in rows:
        row["both"][1] = float(row["both"][1])
    judged = op.goals(_rows("N1-float32", ours=2.0, identity=1.6), {})
    text = report.render([{**result, "rows": rows, "goals": judged}], [])
    assert "| N1 | 2.00 | 1.60 (0.80×) | refused | refused | 30.00 (15.00×) |" in text
    assert "| time against the identity op | at most 1.3× | 1.25× | yes |" in text
    assert "| speed-up over the released formulation | at least 12× | not measured | **no** |" in text
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter"
    once = report.insert(readme, text)
    assert once == report.insert(once, text) == f"before\n{report.BEGIN}\n{text}\n{report.END}\nafter"
    with pytest.raises(ValueError, match="markers"):
        report.insert("no markers", text)


def test_readme_is_generated():
    assert main(["report", "--check"]) == 0, "run: python -m bench report"


def test_report_check_fails_on_a_changed_readme(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"{report.BEGIN} stale {report.END}")
    assert main(["report", "--check"]) == 1
    assert main(["report"]) == 0
    assert main(["report", "--check"]) == 0


def test_a_case_that_is_not_there_is_an_error():
    command = [sys.executable, "-m", "bench", "op", "--cases", "N31"]
    done = subprocess.run(command, cwd=op.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no case of 'cpu' has 'N31' in its name\n")


@pytest.mark.parametrize("module", [cases, gpu_timing, op, report])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
