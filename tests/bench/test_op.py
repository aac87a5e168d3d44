"""A run measures what passed the proof, survives what fails, and writes what it measured."""

import itertools
import json
import types

import pytest
import torch
from support import child
from support.benchmark import FakeClock

import rebalfer_kernels as rk
from bench import __main__ as command_line
from bench import baselines, measure, op, results
from bench.cases import CASES, DTYPES, LAYOUTS, SETS, Case, problem
from bench.clocks import Launch, WallClock
from rebalfer_kernels.backend import Verdict

TINY = Case(2, 8, "channels_last", torch.float32)
GPU_CASES = [c for c in CASES if c.device == "cuda"]


def test_the_gpus_cases_are_those_of_the_design():
    groups = {group: [c for c in GPU_CASES if c.group == group] for group in ("paper's batch", "large and wide")}
    for dtype, (n, layout) in itertools.product(
        (torch.bfloat16, torch.float32), itertools.product((32, 64), ("nchw", "channels_last"))
    ):
        assert Case(n, 512, layout, dtype, "cuda") in groups["paper's batch"]
        assert Case(512, 2048, layout, dtype, "cuda") in groups["large and wide"]
        assert Case(64, 2048, layout, dtype, "cuda") in GPU_CASES
    assert len(groups["paper's batch"]) == 8
    assert all(c.dtype == torch.bfloat16 for c in GPU_CASES[: len(GPU_CASES) // 2])  # the goals' dtype comes first
    assert GPU_CASES[0].group == "paper's batch" and GPU_CASES[1].group == "large and wide"
    growing = {c.N for c in GPU_CASES if (c.C, c.dtype, c.layout) == (512, torch.bfloat16, "channels_last")}
    assert growing == {32, 64, 256, 512, 1024, 4096}


def _has(cases, **wanted):
    return any(all(getattr(case, key) == value for key, value in wanted.items()) for case in cases)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_cases_are_those_that_people_have(device):
    cases = SETS["all"](device)
    assert len(set(cases)) == len(cases) and all(Case.named(case.name, device) == case for case in cases)
    for C, layouts in ((512, LAYOUTS), (768, LAYOUTS[1:]), (1024, LAYOUTS), (2048, LAYOUTS)):
        for layout, dtype in itertools.product(layouts, DTYPES):
            assert _has(cases, C=C, layout=layout, dtype=dtype, side=7, L=7)
    wanted = [{"side": side} for side in (4, 7, 14)] + [{"L": L} for L in (7, 8, 11, 100, 1000)]
    wanted += [{"N": N} for N in (32, 64, 128, 256, 512, 1024, 2048, 4096)]
    wanted += [{"op": op} for op in baselines.OPERATIONS]
    assert [w for w in wanted if not _has(cases, **w)] == []
    assert set(SETS["curves"](device)) <= set(cases) and len(SETS["short"](device)) < len(cases) / 3


def test_the_floor_of_each_operation():
    case = Case(4, 64, "nchw", torch.bfloat16, side=5, L=3)
    features = 2 * 4 * 64 * 25 * 2
    assert {op: case._replace(op=op).floor_bytes for op in baselines.OPERATIONS} == {
        "head": 2 * features, "undetached": 2 * features, "consistency": 2 * features,
        "maps": features + 2 * 4 * 3 * 25 * 4, "cross_entropy": 2 * 4 * 3 * 2,
        "views": 4 * 64 * 25 + features,
    }  # fmt: skip


@pytest.mark.parametrize("name", baselines.OPERATIONS)
def test_every_operation_is_measured(name, monkeypatch, tmp_path):
    monkeypatch.setattr(baselines, "contenders", lambda case, more: baselines.OPERATIONS[case.op])
    monkeypatch.setattr(op, "copy_gb_per_s", lambda device: 10.0)
    monkeypatch.setattr(results, "environment", lambda kind: {"kind": kind, "device": "EPYC", "capability": "AVX2"})
    size = (3, 3, "channels_last") if name == "views" else (3, 20, "nchw")
    case = Case(*size, torch.float32, op=name)
    result, path = op.run([case], 0.0, 1000.0, tmp_path, kind="cpu", clock=WallClock(), memory="reused", of="all")
    assert path.name == "op-cpu-epyc-avx2-reused-all.json" and result["rejected"] == result["errors"] == []
    assert result["served_by"][case.name] in rk.backends()
    assert [row["contender"] for row in result["rows"]] == list(baselines.OPERATIONS[name])
    forward_only = name in ("maps", "views")
    for row in result["rows"]:
        assert (row["backward"] is None) == forward_only and row["both"][1] > 0 < row["host_ms"]
        assert 0 <= row["far_caches"] <= 1
    captured, _ = op.run([case], 0.0, 1000.0, tmp_path, kind="rehearsal", clock=FakeClock())
    assert captured["errors"] == [] and all(row["both"] and row["errors"] == {} for row in captured["rows"])


def test_longer_sets_of_cases_are_results_of_their_own(tmp_path):
    for date, of in enumerate(("short", "curves", "all", "curves"), 2020):
        result = {"kind": "cpu", "memory": "reused", "device": "E", "quiet": True, "date": str(date), "set": of}
        result["capability"] = "AVX2"
        (tmp_path / f"op-{date}.json").write_text(json.dumps(result))
    (tmp_path / "op-x.json").write_text(json.dumps({**result, "date": "2030", "quiet": False}))
    (tmp_path / "op-old.json").write_text(json.dumps({**result, "date": "2019", "memory": "fresh", "set": "short"}))
    assert [r["date"] for r in results.newest_cpu(tmp_path)] == ["2019", "2020"]
    assert [r["date"] for r in results.newest_more(tmp_path)] == ["2022", "2023"]


def test_all_runs_every_measurement_and_the_report_even_if_one_fails(monkeypatch, capsys):
    ran = []

    def run(command, check):
        ran.append(" ".join(command[3:]))
        return types.SimpleNamespace(returncode=int("memory" in command))

    monkeypatch.setattr(command_line.subprocess, "run", run)
    assert command_line.main(["all", "--list"]) == 0 and ran == []
    assert command_line.main(["all"]) == 1
    assert ran == list(command_line.ALL) and ran[-1] == "report"
    assert {command.split()[0] for command in ran} == {"op", "memory", "step", "methods", "report"}


def test_the_dtypes_take_turns_at_each_size_that_has_both(monkeypatch):
    turns = []
    monkeypatch.setattr(baselines, "ours", lambda x: turns.append(x.features.dtype) or baselines.plain_eager(x))
    cases = [*(TINY._replace(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)), TINY._replace(C=9)]
    assert op.bfloat16_over_float32(cases, 0.0, FakeClock()) == {TINY.name: 1.0}
    assert {turns[0], turns[1]} == {torch.float32, torch.bfloat16}
    assert len(turns) == 2 * (measure.WARM_UP + measure.MINIMUM)


def test_the_identity_op_takes_turns_with_ours_alone_at_the_fixed_cost(monkeypatch):
    times = {"ours": (20.0, 13.0), "identity": (10.0, 8.0)}

    def phases_ms(clock, runs, seconds):
        assert set(runs) == set(times)
        return {name: {"forward": [0, times[name][0], 0], "backward": [0, times[name][1], 0]} for name in runs}

    monkeypatch.setattr(measure, "phases_ms", phases_ms)
    smallest = Case(1, 16, "nchw", torch.float32)
    ratios = op.fixed_cost([smallest, smallest._replace(C=17)], 0.0, FakeClock())
    assert ratios == {smallest.name: {"forward": 2.0, "backward": 1.625}}


def test_a_cpus_run_writes_what_it_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(baselines, "contenders", lambda case, more: baselines.FORMULATIONS)  # without the compiler
    monkeypatch.setattr(op, "copy_gb_per_s", lambda device: 10.0)
    case = Case(3, 20, "nchw", torch.float32)
    _, path = op.run([case], 0.0, 1000.0, tmp_path, kind="cpu", clock=WallClock(), memory="fresh")
    assert [path] == list(tmp_path.iterdir()) and path.name.startswith("op-cpu-") and path.name.endswith("-fresh.json")
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


def _half_the_loss(x):
    return 0.5 * baselines.plain_eager(x)


def _run(tmp_path, cases, limit=1000.0, clock=None, **more):
    def contenders(kind, case):
        assert kind == "rehearsal"
        return {**baselines.FORMULATIONS, "wrong": _half_the_loss}

    clock = clock or FakeClock()
    return op.run(cases, 0.0, limit, tmp_path, clock=clock, contenders=contenders, kind="rehearsal", **more)


def test_a_run_has_rows_of_proven_contenders_only(tmp_path, monkeypatch):
    monkeypatch.setattr(op, "copy_gb_per_s", lambda device: 50.0)
    said = []
    cases = [TINY, TINY._replace(C=9, layout="nchw")]
    result, path = _run(tmp_path, cases, say=lambda *words: said.append(words))
    assert [words[:2] for words in said[1::2]] == [(case.name, "failed") for case in cases]
    assert said[1][2].startswith("wrong was refused: relative error 0.")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert list(tmp_path.iterdir()) == [path] and path.name.startswith("op-rehearsal-")
    refused = {(r["contender"], r["reason"]) for r in result["rejected"]}
    assert refused == {("wrong", None)}
    assert {row["contender"] for row in result["rows"]} == set(baselines.FORMULATIONS)
    assert len(result["rows"]) == 2 * len(baselines.FORMULATIONS)
    ours = result["rows"][0]
    assert ours["repetitions"] == 20 and ours["buffers"] == 2 and ours["errors"] == {}
    assert ours["both"] == pytest.approx([(2 + 80) / 20] * 3) == ours["forward"]
    assert ours["eager"]["both"] == [3.0] * 3
    assert (ours["launches"], ours["peak_extra_bytes"], ours["ratio_to_identity"]) == (2, 1234, 1.0)
    kernels = [{"name": "forward kernel", "us": 3.0}, {"name": "backward kernel", "us": 5.0}]
    assert ours["kernels"] == kernels and "kernels" not in result["rows"][1]
    assert ours["gb_per_s"] == pytest.approx(TINY.floor_bytes / 4.1 / 1e6)
    assert ours["share_of_copy"] == pytest.approx(ours["gb_per_s"] / 50)
    assert result["served_by"][TINY.name] == rk.explain(problem(TINY).features, problem(TINY).weight).backend
    for field in ("device", "driver", "torch", "triton", "cuda", "commit", "date", "goals"):
        assert field in result


def test_the_durations_of_kernels_are_medians_and_only_of_calls_that_are_alike(tmp_path):
    class Profiled(FakeClock):
        calls = 0

        def launches(self, run):
            self.calls += 1
            us = 1000.0 if self.calls % op.PROFILED == 1 else 10.0 + self.calls  # the first call of each run is cold
            return [Launch("k" * 200, us), *([Launch("more", 1.0)] if self.calls == 2 * op.PROFILED else [])]

    first, second = (
        r for r in _run(tmp_path, [TINY, TINY._replace(C=9)], clock=Profiled())[0]["rows"] if "kernels" in r
    )
    assert first["kernels"] == [{"name": "k" * 100, "us": 14.0}] and first["launches"] == 1
    assert second["kernels"] is None and second["launches"] is None
    assert second["errors"]["kernels"].endswith("differ in their number of launches: [1, 1, 1, 1, 2]")


def test_a_case_that_fails_is_recorded_and_the_next_one_measured(tmp_path, monkeypatch):
    real = op.problem
    monkeypatch.setattr(op, "problem", lambda case: 1 / 0 if case.C == 9 else real(case))
    result, path = _run(tmp_path, [TINY._replace(C=9), TINY])
    assert result["errors"] == [{"case": "N2-C9-channels_last-float32", "error": "ZeroDivisionError: division by zero"}]
    assert {row["case"] for row in result["rows"]} == {TINY.name}
    assert json.loads(path.read_text())["errors"] == result["errors"]


def _unusable(*_):
    raise torch.AcceleratorError("an illegal memory access was encountered")


@pytest.mark.parametrize("where", ["in a case", "unnoticed until the device is waited for"])
def test_after_an_error_of_the_device_nothing_is_measured(tmp_path, monkeypatch, where):
    if where == "in a case":
        monkeypatch.setattr(op, "problem", _unusable)
    else:
        monkeypatch.setattr(FakeClock, "wait", _unusable)
        monkeypatch.setattr(op, "_add", lambda *a: {})
    result, path = _run(tmp_path, [TINY._replace(C=9), TINY])
    assert [error["case"] for error in result["errors"]] == ["N2-C9-channels_last-float32"]
    assert result["left_out"] == json.loads(path.read_text())["left_out"] == [TINY.name] and result["rows"] == []


def test_a_process_that_resumes_adds_to_what_the_one_before_it_left(tmp_path, monkeypatch):
    said = []

    def run(*cases, **more):
        options = {"kind": "rehearsal", "clock": FakeClock(), "say": lambda *words: said.append(words), **more}
        return op.run(cases, 0.0, 1000.0, tmp_path, chosen=["ours", "identity"], **options)

    other = TINY._replace(C=9)
    first, path = run(TINY, other, contenders=lambda kind, case: op.contenders(kind, case, ["ours", "identity"]))
    monkeypatch.setattr(op, "copy_gb_per_s", _unusable)
    second, again = run(TINY._replace(C=10), contenders=lambda kind, case: 1 / 0, resume=True)
    assert path == again and path.name.endswith("-ours.json")
    assert second["rows"] == json.loads(json.dumps(first["rows"])) and len(first["rows"]) == 4
    assert second["copy_gb_per_s"] == first["copy_gb_per_s"] and [e["case"] for e in second["errors"]] == [
        "N2-C10-channels_last-float32"
    ]
    failure = "ZeroDivisionError: division by zero"
    assert said == [
        *((case.name, *words) for case in (TINY, other) for words in (("begun", ""), ("passed", ""))),
        ("N2-C10-channels_last-float32", "begun", ""), ("N2-C10-channels_last-float32", "failed", failure),
    ]  # fmt: skip


def test_only_the_chosen_contenders_are_made(monkeypatch):
    monkeypatch.setattr(baselines, "contenders", lambda case, more: baselines.FORMULATIONS)
    asked = []
    cuda = baselines.BACKENDS["cuda"]
    monkeypatch.setattr(cuda, "available", lambda: asked.append("cuda") or Verdict(True, ""))
    monkeypatch.setattr(
        baselines.BACKENDS["triton"], "available", lambda: asked.append("triton") or Verdict(False, "no")
    )
    assert list(op.contenders("cuda", TINY, ["cuda", "identity"])) == ["cuda", "identity"] and asked == ["cuda"]
    with pytest.raises(ValueError, match="got triton is not available: no, expected some of ours"):
        op.contenders("cuda", TINY, ["triton"])
    assert list(op.contenders("cuda", TINY)) == [*baselines.FORMULATIONS, "cuda"]


def test_a_gpus_contenders_measured_apart_become_one_result(tmp_path):
    def save(name, date, chosen, rows, **more):
        rows = [{"case": case, "contender": contender, "both": [ms] * 3} for case, contender, ms in rows]
        result = {"kind": "cuda", "device": "H", "commit": "new", "date": date, "chosen": chosen, "rows": rows}
        lists = {"served_by": {}, "rejected": [], "errors": [], "left_out": []}
        (tmp_path / f"op-{name}.json").write_text(json.dumps({**result, **lists, **more}))

    save("old", "1", ["triton", "identity"], [("a", "triton", 9)], commit="old", left_out=["b", "c"])
    save("cuda", "2", ["cuda", "identity"], [("a", "cuda", 1), ("a", "identity", 2), ("b", "cuda", 3)],
         served_by={"a": "cuda", "b": "triton"}, errors=[1])  # fmt: skip
    save("eager", "3", ["best eager", "identity"], [("a", "best eager", 5), ("a", "identity", 6)], errors=[2])
    (merged,) = results.newest_gpu(tmp_path)
    rows = {(row["case"], row["contender"]): row["both"][0] for row in merged["rows"]}
    assert len(rows) == len(merged["rows"]) and rows == {
        ("a", "ours"): 1, ("a", "cuda"): 1, ("a", "identity"): 2, ("b", "cuda"): 3, ("a", "best eager"): 5,
        ("a", "triton"): 9,
    }  # fmt: skip
    assert (merged["errors"], merged["left_out"], merged["date"]) == ([1, 2], ["c"], "3")  # b has a row
    assert merged["commits"] == {"triton": "old", "cuda": "new", "best eager": "new"}
    save("whole", "4", None, [("a", "ours", 7)])
    assert results.newest_gpu(tmp_path)[0]["rows"] == [{"case": "a", "contender": "ours", "both": [7] * 3}]


def test_the_first_case_does_not_decide_how_long_the_others_take(tmp_path, monkeypatch):
    now = iter([0.0, 0.0, 90.0, 91.0, 95.0, 96.0, *[200.0] * 99])  # the first compiles for 90 s, the second takes 4
    monkeypatch.setattr(op.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(op, "_add", lambda *a: {})
    cases = [TINY._replace(C=c) for c in (9, 10, 11)]
    result, _ = op.run(
        cases, 0.0, 130.0, tmp_path, clock=FakeClock(), contenders=lambda kind, case: {}, kind="rehearsal"
    )
    assert result["left_out"] == []


def test_cases_there_is_no_time_for_are_left_out_and_named(tmp_path):
    said = []
    result, path = _run(tmp_path, [TINY, TINY._replace(C=9)], limit=-1.0, say=lambda *words: said.append(words))
    assert said == [(name, "not run", "no time left") for name in result["left_out"]]
    assert result["left_out"] == json.loads(path.read_text())["left_out"] == [TINY.name, "N2-C9-channels_last-float32"]
    assert result["rows"] == []


def test_an_unknown_case_is_an_error():
    done = child.run("-m", "bench", "op", "--cases", "N31")
    assert (done.returncode, done.stderr) == (2, "error: no case of 'cpu' has 'N31' in its name\n")


def test_the_commit_comes_from_the_environment_where_there_is_no_checkout(monkeypatch):
    monkeypatch.setattr(results, "_git", lambda *_: None)
    monkeypatch.setenv("REBALFER_COMMIT", "abc")
    assert (results.version()["commit"], results.version()["dirty"]) == ("abc", None)
    monkeypatch.delenv("REBALFER_COMMIT")
    assert results.version()["commit"] is None
