"""The bounded check of a GPU, tried without one, with every fault that must not cost what was found beside it."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.benchmark import GPU_ROWS

import rebalfer_kernels as rk
from bench import results
from bench.__main__ import main
from bench.cases import CASES
from bench.verify import counters, every_case, every_op, gpu_check, parts, workers
from bench.verify.parts import Piece
from rebalfer_kernels import ops
from rebalfer_kernels.doctor.cases import ODD, OPERATIONS, SMALL

CPU = pytest.mark.skipif(rk.backends()["cpu"] != "available", reason=rk.backends()["cpu"])


@CPU
def test_every_op_checks_all_and_fails_on_a_wrong_one(monkeypatch, capsys):
    def run():
        return workers.main(every_op.here("cpu", every_op.items("cpu"), (SMALL, ODD)))

    assert run() == 0
    out = capsys.readouterr().out
    assert all(f"passed {name}, bfloat16" in out for name in OPERATIONS) and "27 items: 27 passed" in out
    backward = ops.OPERATORS["cpu"]["cam_backward"]
    monkeypatch.setitem(ops.OPERATORS["cpu"], "cam_backward", lambda *a: [g * 1.1 for g in backward(*a)])
    assert run() == 1
    assert "failed maps, float32, nchw on cpu: d_" in capsys.readouterr().out


@CPU
def test_every_op_in_workers(monkeypatch, capsys):
    two = dict(list(every_op.items("cpu").items())[:2])
    monkeypatch.setattr(every_op, "items", lambda backend: two)
    assert every_op.main("cpu", 1, 60.0) == 0
    assert capsys.readouterr().out.splitlines() == [*(f"passed {name}" for name in two), "2 items: 2 passed"]


def test_a_backend_that_is_not_available_is_no_success(capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(every_op.BACKENDS["cuda"], "available", lambda: (False, "no library"))
        assert workers.main(every_op.here("cuda", every_op.items("cuda"), (SMALL,))) == 1
    assert capsys.readouterr().out == "cuda is not available: no library\n0 items: \n"


def test_every_op_leaves_a_process_whose_device_is_of_no_use(monkeypatch):
    left = []
    monkeypatch.setattr(every_op, "check", lambda case, sizes: {"state": "right", "note": ""})
    monkeypatch.setattr(every_op, "poisoned", lambda: "illegal access")
    monkeypatch.setattr(every_op.os, "_exit", lambda status: left.append(status) or sys.exit())
    with pytest.raises(SystemExit):
        for report in every_op.here("reference", every_op.items("reference"), (SMALL,)):
            assert (report.state, report.text) == ("failed", "; it leaves the device unusable: illegal access")
    assert left == [17]


def _sh(name, script, weight=1.0, **options):
    return Piece(name, weight, lambda _: ["sh", "-c", script], **options)


def _check(out, pieces, seconds=12.0):
    out.mkdir(exist_ok=True)
    return gpu_check.Check("right", pieces, out, seconds, rehearse=True)


def _states(summary):
    return {record["piece"]: (record["state"], record["reason"]) for record in summary["pieces"]}


def _saved(out):
    return json.loads((out / "right.json").read_text())


def test_a_piece_that_fails_hangs_or_dies_costs_the_others_nothing(tmp_path):
    todo = [
        _sh("good", "echo all is well", 9),
        _sh("hangs", "echo begun; echo 'failed test_a: 1 != 2'; sleep 60", 0.5),
        _sh("segv", "echo last; kill -SEGV $$", 9),
        _sh("killed", "kill -KILL $$", 9),
        _sh("fails", "echo 3 items: 2 passed, 1 failed; exit 1", 9),
        Piece("absent", 9, lambda _: ["/nonexistent/program"]),
        _sh("left out", "exit 1", 9, skip="not installed"),
        _sh("settings", 'test "$A$REBALFER_BUILD" = b0', 9, environment={"A": "b"}),
        _sh("build-cpu", 'test -z "$REBALFER_BUILD"', 9),
    ]
    summary = _check(tmp_path, todo).run()
    states = _states(summary)
    assert states["absent"][0] == "failed" and "No such file" in states.pop("absent")[1]
    assert states == {
        "good": ("passed", None),
        "hangs": ("stopped", "stopped after 0 s: failed test_a: 1 != 2"),
        "segv": ("failed", "died of SIGSEGV: last"),
        "killed": ("failed", "died of SIGKILL"),
        "fails": ("failed", "exit status 1: 3 items: 2 passed, 1 failed"),
        "left out": ("skipped", "not installed"),
        "settings": ("passed", None),
        "build-cpu": ("passed", None),
    }
    log = (tmp_path / "right.txt").read_text()
    assert log.count("===") == 8 and "begun\nfailed test_a: 1 != 2\n" in log and "all is well" in log
    assert _saved(tmp_path) == json.loads(json.dumps(summary)) and sorted(os.listdir(tmp_path)) == summary["files"]
    for field in ("device", "driver", "torch", "triton", "cuda", "commit", "date", "goals"):
        assert field in summary


def test_time_is_shared_among_the_pieces_that_are_left(tmp_path):
    todo = [_sh("a", "true", 3), _sh("b", "true", 9, skip="needs a GPU"), _sh("c", "true", 5), _sh("d", "true", 2)]
    limits = {r["piece"]: r.get("limit_s") for r in _check(tmp_path, todo, 100.0).run()["pieces"]}
    assert limits["b"] is None
    assert [limits[name] for name in "acd"] == pytest.approx([30, 500 / 7, 100], abs=3)  # 3/10, 5/7, all that is left


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.3)
    summary = _check(tmp_path, [_sh("a", "sleep 9", 99), _sh("b", "true")], 0.6).run()
    assert _states(summary)["b"] == ("not run", "no time left")


def test_a_run_that_is_told_to_end_says_which_piece_was_lost(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    start = time.monotonic()
    summary = _check(tmp_path, [_sh("a", "echo x"), _sh("b", "kill -TERM $PPID; sleep 60", 99), _sh("c", "true")]).run()
    assert time.monotonic() - start < 10
    assert (
        _states(summary)
        == _states(_saved(tmp_path))
        == {
            "a": ("passed", None),
            "b": ("lost", "SIGTERM ended the run while this piece ran"),
            "c": ("not run", "the run ended before its turn"),
        }
    )
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_is_killed_has_said_so_before(tmp_path):
    check = _check(tmp_path, [_sh("a", "echo x"), _sh("b", "echo found; kill -KILL $PPID"), _sh("c", "true")])
    if (pid := os.fork()) == 0:
        check.run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert _states(_saved(tmp_path)) == {
        "a": ("passed", None),
        "b": ("lost", "the run ended while this piece ran"),
        "c": ("not run", "the run ended before its turn"),
    }
    assert "\nfound\n" in (tmp_path / "right.txt").read_text()


def test_a_folder_that_takes_nothing_more_loses_only_what_should_be_in_it(tmp_path, capsys):
    (tmp_path / "right.txt").symlink_to("/dev/full")
    (tmp_path / "right.json").mkdir()
    summary = _check(tmp_path, [_sh("a", "echo seen; exit 1"), _sh("b", "true")]).run()
    assert _states(summary) == {"a": ("failed", "exit status 1: seen"), "b": ("passed", None)}
    out = capsys.readouterr().out
    assert "No space left on device" in out and "right.json cannot be written" in out and "exit status 1: seen" in out


def test_goals_are_judged_by_the_files_of_the_pieces(tmp_path):
    gpu = {"kind": "cuda", "device": "H", "date": "2", "commit": "c", "rows": GPU_ROWS}
    (tmp_path / "op-cuda-h.json").write_text(json.dumps(gpu))
    summary = _check(tmp_path, []).run()
    met = [goal["met"] for goal in summary["goals"]]
    assert met == [False, True, False, False, False, True, False, False, True, False]
    assert "met share of the copy bandwidth, large and wide: 0.91 (at least 0.9)" in gpu_check.table(summary)


def test_a_file_that_is_not_what_its_name_says_ends_nothing(tmp_path, capsys):
    (tmp_path / "op-cuda-h.json").write_text("{")
    assert _states(_check(tmp_path, [_sh("a", "true")]).run()) == {"a": ("passed", None)}
    assert "the goals cannot be judged: JSONDecodeError" in capsys.readouterr().out


@pytest.fixture
def unknown(monkeypatch):
    """A checkout without .git."""
    monkeypatch.setattr(results, "_git", lambda *_: None)
    monkeypatch.delenv("REBALFER_COMMIT", raising=False)


def _refused(capsys, out, *more, part="right"):
    assert main(["gpu-check", part, "--out", str(out), *more]) == 2
    return capsys.readouterr().err


def test_without_a_commit_it_refuses(tmp_path, capsys, monkeypatch, unknown):
    assert "set REBALFER_COMMIT" in _refused(capsys, tmp_path / "out", "--rehearse")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("REBALFER_COMMIT", "abc")
    assert gpu_check.refusal("right", tmp_path, True, None, []) is None


def test_a_checkout_around_the_folder_does_not_name_its_commit(tmp_path, monkeypatch):
    monkeypatch.delenv("REBALFER_COMMIT", raising=False)
    (tmp_path / "inner").mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert len(results.version()["commit"]) == 40
    monkeypatch.setattr(results, "ROOT", tmp_path / "inner")
    assert results.version()["commit"] is None


@pytest.mark.parametrize("part, room", [("right", 5), ("fast", 3), ("deep", 5)])
def test_a_folder_with_too_many_files_is_refused(tmp_path, capsys, part, room):
    for i in range(room):
        (tmp_path / f"{i}.txt").touch()
    for own in {"right": ["right.json", "doctor.json"], "fast": ["op-a.json"], "deep": ["step-a.json"]}[part]:
        (tmp_path / own).touch()  # will be written anew
    pieces = parts.PARTS[part](tmp_path, True)
    assert gpu_check.refusal(part, tmp_path, True, None, pieces) is None
    (tmp_path / "one more").touch()
    assert f"{room + 1} other files" in _refused(capsys, tmp_path, "--rehearse", part=part)


def test_an_unknown_piece_is_refused_and_a_missing_gpu(tmp_path, capsys, monkeypatch):
    message = _refused(capsys, tmp_path, "--rehearse", "--only", "nothing")
    assert "--only: got 'nothing', expected some of 'build-cpu', 'every-op-cpu'" in message
    monkeypatch.setattr(gpu_check, "environment", lambda: {"gpus": []})
    assert "PyTorch sees no GPU here" in _refused(capsys, tmp_path)
    assert list(tmp_path.iterdir()) == []


NAMES = {
    "right": "build-cuda every-op-cuda every-op-triton tests-cuda tests-triton build-cpu doctor",
    "fast": "build-cuda op-cuda op-triton op-eager tune-triton",
    "deep": "build-cuda memcheck-cuda step racecheck-cuda counters-cuda synccheck-cuda memcheck-triton counters-triton "
    "racecheck-triton synccheck-triton initcheck-cuda",
}


@pytest.mark.parametrize("part", NAMES)
def test_the_pieces_of_a_part(part, monkeypatch):
    monkeypatch.setattr(parts.shutil, "which", lambda program, path=None: f"/bin/{program}")
    pieces = {piece.name: piece for piece in parts.PARTS[part](Path("/out"), False)}
    assert list(pieces) == NAMES[part].split() and not any(piece.skip for piece in pieces.values())
    rehearsed = parts.PARTS[part](Path("/out"), True)
    assert {p.skip for p in rehearsed} <= {None, "needs a GPU"} and rehearsed[0].name == "build-cpu"
    left = 540.0
    weights = [piece.weight for piece in pieces.values()]
    for i, piece in enumerate(pieces.values()):  # were each to use all it may, the later ones would have their turn
        limit = left * piece.weight / sum(weights[i:])
        left -= limit
        command = piece.command(limit)
        assert limit >= 25
        if "--seconds" in command:  # it ends by itself, with time to say what it found
            assert float(command[command.index("--seconds") + 1]) < limit - 5
    for name in pieces:  # nothing is left to chance on a machine that has only the checkout
        if name.endswith("-cuda") and name != "build-cuda":
            assert "build-cuda" in [p.name for p in parts.choose(list(pieces.values()), [name])]


def test_the_commands_of_the_pieces(monkeypatch):
    monkeypatch.setattr(parts.shutil, "which", lambda program, path=None: None)
    pieces = {p.name: p for part in parts.PARTS.values() for p in part(Path("/out"), False)}
    assert {name for name, piece in pieces.items() if piece.skip == "not installed"} == {
        name
        for name in pieces
        if name.partition("-")[0] in ("memcheck", "racecheck", "synccheck", "initcheck", "counters")
    }
    commands = {name: " ".join(piece.command(100.0)) for name, piece in pieces.items()}
    assert "--tool synccheck" in commands["synccheck-triton"] and "--small triton" in commands["synccheck-triton"]
    assert "--report-api-errors no" in commands["memcheck-cuda"]
    assert "every_case --out /out triton identity" in commands["op-triton"]
    assert "ours" not in commands["op-eager"] and "best eager, compiled" in commands["op-eager"]
    assert pieces["tests-triton"].environment["HYPOTHESIS_PROFILE"] == "few"
    assert "--clock-control none" in commands["counters-cuda"]
    assert [c.name for c in CASES if c.device == "cuda" and parts.TUNED in c.name] == [parts.TUNED]


def test_a_process_after_the_first_adds_to_the_cases(monkeypatch):
    """What is measured is what `python -m bench op --device cuda` measures, in the same order."""
    started = {}

    def run(command, items, processes, patience, end):
        started.update(items=items, processes=processes, patience=patience)
        started["commands"] = [command(items), command(items[3:])]
        return iter([])

    monkeypatch.setattr(every_case.workers, "run", run)
    given = {"contenders": ["triton", "identity"], "out": "/out", "seconds": 100.0, "patience": 9.0, "rehearse": False}
    assert every_case.main(argparse.Namespace(**given)) == 1  # nothing was measured
    assert started["items"] == [case.name for case in CASES if case.device == "cuda"]
    assert (started["processes"], started["patience"]) == (1, 9.0)
    first, second = started["commands"]
    assert "--resume" not in first and "--resume" in second and second[-1] == first[-1] and second[-3] in first
    assert first[3:7] == ["triton", "identity", "--out", "/out"] and first[first.index("--seconds") + 1] == "95"


def test_the_profiler_sees_each_case_once_and_not_its_first_call(monkeypatch):
    did = []
    monkeypatch.setattr(counters, "problem", lambda case: case.name)
    monkeypatch.setattr(counters, "once", lambda formulation, name: did.append(name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: did.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: did.append("stop"))
    counters.main("cuda", 60.0)
    names = [f"N{n}-{layout}-bfloat16" for n in ("32-C512", "512-C2048") for layout in ("nchw", "channels_last")]
    assert did == [word for name in names for word in (name, "start", name, "stop")]
    counters.main("cuda", -1.0)
    assert len(did) == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_the_commands_say_so():
    assert main(["op", "--device", "cuda"]) == 2
    assert main(["step", "--device", "cuda"]) == 2
