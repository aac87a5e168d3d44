"""The bounded check of a GPU, tried without one."""

import json
import sys

import pytest
import torch

import rebalfer_kernels as rk
from bench.__main__ import main
from bench.verify import every_op, gpu_check
from bench.verify.gpu_check import Step
from rebalfer_kernels import ops
from rebalfer_kernels.doctor.cases import OPERATIONS

CPU = pytest.mark.skipif(rk.backends()["cpu"] != "available", reason=rk.backends()["cpu"])


@CPU
def test_every_op_runs_all_and_fails_on_a_wrong_one(monkeypatch, capsys):
    assert every_op.main(["cpu"], "cpu", small=True) == 0
    out = capsys.readouterr().out
    assert all(f"cpu, {name}, bfloat16" in out for name in OPERATIONS)
    assert every_op.main(["cpu"], "cpu", small=False, processes=2) == 0
    assert capsys.readouterr().out == out
    backward = ops.OPERATORS["cpu"]["cam_backward"]
    monkeypatch.setitem(ops.OPERATORS["cpu"], "cam_backward", lambda *a: [g * 1.1 for g in backward(*a)])
    assert every_op.main(["cpu"], "cpu", small=True) == 1


def _python(code, **options):
    return {"command": lambda _: [sys.executable, "-c", code], **options}


def test_the_check_continues_past_what_fails_hangs_or_is_missing(tmp_path, capsys):
    saved = json.dumps(
        {"goals": [{"goal": "g", "figure": 1.0, "bound": 2.0, "sense": "at most", "met": True, "unit": ""}]}
    )
    seen = tmp_path / "op-cuda-x.json"
    todo = [
        Step("good", 0.9, **_python(f"open({str(seen)!r}, 'w').write({saved!r})")),
        Step("hangs", 0.2, **_python("print('begun', flush=True); import time; time.sleep(99)"), log="doctor.txt"),
        Step("dies", 0.9, **_python("import os; os.abort()")),
        Step("errors", 0.9, **_python("print('why'); raise SystemExit(9)"), statuses={9: "errors found"}),
        Step("absent", 0.9, lambda _: ["/nonexistent/program"]),
        Step("left out", 0.9, lambda _: ["true"], skip="needs a GPU"),
        Step("environment", 0.9, **_python("import os; assert os.environ['A'] == 'b'"), environment={"A": "b"}),
    ]
    summary = gpu_check.run(tmp_path, "cpu", 12.0, todo)
    assert [(s["step"], s["state"]) for s in summary["steps"]] == [
        ("good", "passed"), ("hangs", "stopped"), ("dies", "failed"), ("errors", "failed"), ("absent", "failed"),
        ("left out", "skipped"), ("environment", "passed"),
    ]  # fmt: skip
    reasons = {s["step"]: s["reason"] for s in summary["steps"]}
    assert reasons["dies"] == "died of SIGABRT" and reasons["errors"] == "errors found"
    assert reasons["left out"] == "needs a GPU"
    assert summary["steps"][3]["output"] == "why\n"
    assert (tmp_path / "doctor.txt").read_text() == "begun\n"
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["goals"][0]["goal"] == "g" and len(summary["goals"]) == 2  # the op's, and the whole run's
    for field in ("device", "driver", "torch", "triton", "cuda", "commit", "date", "goals"):
        assert field in summary
    assert "met g: 1 (at most 2)" in gpu_check.table(summary)


def test_the_check_writes_its_summary_after_every_step(tmp_path):
    names = f"import json; print([s['step'] for s in json.load(open({str(tmp_path / 'summary.json')!r}))['steps']])"
    todo = [Step("a", 0.5, **_python("")), Step("b", 0.9, **_python(names))]
    summary = gpu_check.run(tmp_path, "cpu", 20.0, todo)
    assert summary["steps"][1]["output"] == "['a']\n"


def test_the_check_stops_when_its_time_is_up(tmp_path):
    summary = gpu_check.run(tmp_path, "cpu", 0.0, [Step("a", 1.0, **_python(""))])
    assert [(s["state"], s["reason"]) for s in summary["steps"]] == [("skipped", "no time left")]


def test_the_steps_of_the_check(tmp_path):
    on_gpu, rehearsed = gpu_check.steps(tmp_path, "cuda"), gpu_check.steps(tmp_path, "cpu")
    tests = ["cuda tests", "triton tests"]
    names = ["build cpu", "build cuda", "every op", "doctor", *tests, "op", "step", "memcheck", "racecheck"]
    assert [s.name for s in on_gpu] == [s.name for s in rehearsed] == names
    assert [s.name for s in rehearsed if s.skip] == ["build cuda", "every op", *tests, "memcheck", "racecheck"]
    assert all(("REBALFER_BUILD" in s.environment) == (not s.name.startswith("build")) for s in on_gpu)
    commands = {s.name: s.command(100.0) for s in on_gpu}
    assert "--rehearse" not in commands["op"] and "--rehearse" in rehearsed[6].command(9.0)
    assert commands["op"][commands["op"].index("--limit") + 1] == "90"
    assert commands["racecheck"][2] == "racecheck" and commands["memcheck"][-2:] == ["cuda", "triton"]
    logs = {s.log for s in on_gpu if s.log}
    assert len(logs) + len({"summary.json", "doctor.json", "op.json", "step.json"}) == 8
    left = 480.0
    for each in on_gpu:  # were each to use all it may, the later ones would still have their turn
        limit = left * each.share
        left -= limit
        assert limit >= 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_the_commands_say_so(tmp_path, capsys):
    assert main(["gpu-check", "--out", str(tmp_path / "out")]) == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["gpu-check", "--out", str(tmp_path / "out"), "--device", "cpu", "--only", "nothing"]) == 2
    assert "--only: got 'nothing', expected some of 'build cpu'" in capsys.readouterr().err
    assert main(["op", "--device", "cuda"]) == 2
    assert main(["step", "--device", "cuda"]) == 2
