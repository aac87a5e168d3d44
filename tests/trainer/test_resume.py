"""A run that was interrupted, wherever and however, ends as the one that was not: bit for bit, log and all."""

import os
import re
import shutil
import signal

import pytest
import torch
from support import child, runs
from support.machine import ROOT

from trainer import checkpoint, metrics, run
from trainer.methods import Method

EPOCHS, STEPS = 2, 4
FLAGS = ["--name=a", f"--epochs={EPOCHS}", *runs.STATEFUL]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    root = tmp_path_factory.mktemp("whole")
    assert runs.train(root, *FLAGS) == 0
    saved = runs.state(root / "a")
    assert saved["taken"] == EPOCHS * STEPS and saved["average"] and saved["best"]
    return root / "a"


def differences(folder, whole):
    last, best = (runs.differ(runs.state(folder, n), runs.state(whole, n), n) for n in ("last.pt", "best.pt"))
    return last + best + runs.differ(runs.rows(folder), runs.rows(whole), "metrics.jsonl")


def at_step(monkeypatch, number, action):
    """Calls ``action`` in the given step of the run, from 1."""
    steps = []

    def after_step(self, batch):
        steps.append(batch)
        if len(steps) == number:
            action()

    monkeypatch.setattr(Method, "after_step", after_step)


def position(folder):
    saved = checkpoint.read(folder / "last.pt")
    return saved["epoch"], saved["step"]


def test_a_run_in_parts_of_an_epoch_each(whole, tmp_path):
    for epochs in range(1, EPOCHS + 1):
        resume = ["--resume"] if epochs > 1 else []
        assert runs.train(tmp_path, *FLAGS, f"--epochs={epochs}", *resume) == 0
    assert differences(tmp_path / "a", whole) == []


@pytest.mark.parametrize(
    "name, number, stands",
    [
        ("SIGINT", 1, (0, 1)),
        ("SIGTERM", 3, (0, 3)),
        ("SIGHUP", 6, (1, 2)),
        ("SIGTERM", STEPS, (1, 0)),  # the last step: the evaluation still belongs to the epoch
        ("SIGINT", EPOCHS * STEPS, (EPOCHS, 0)),
    ],
)
def test_a_signal_ends_the_step_and_saves(name, number, stands, whole, tmp_path, monkeypatch, caplog, capsys):
    signum = getattr(signal, name)
    before = signal.getsignal(signum)
    at_step(monkeypatch, number, lambda: os.kill(os.getpid(), signum))
    assert runs.train(tmp_path, *FLAGS) == 128 + signum
    assert f"{name}: stopping after this step" in caplog.messages
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped in epoch {stands[0] + 1} after {stands[1]} steps; the same command with --resume continues"
    assert position(tmp_path / "a") == stands and signal.getsignal(signum) is before
    monkeypatch.undo()
    assert runs.train(tmp_path, *FLAGS, "--resume") == 0
    assert differences(tmp_path / "a", whole) == []


def test_a_signal_in_the_evaluation_waits_for_its_end(whole, tmp_path, monkeypatch):
    accuracies, calls = metrics.accuracies, []

    def then_stop(matrix):
        calls.append(matrix)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return accuracies(matrix)

    monkeypatch.setattr(metrics, "accuracies", then_stop)
    assert runs.train(tmp_path, *FLAGS) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert position(tmp_path / "a")[1] == 0 and len(runs.rows(tmp_path / "a")) >= 1
    assert runs.train(tmp_path, *FLAGS, "--resume") == 0
    assert differences(tmp_path / "a", whole) == []


def test_many_signals_one_after_the_other(whole, tmp_path, monkeypatch):
    """A run that is stopped after every third step."""
    for number in range(3, EPOCHS * STEPS, 3):
        at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert runs.train(tmp_path, *FLAGS, *(["--resume"] if number > 3 else [])) == 143
        assert position(tmp_path / "a") == divmod(number, STEPS)
    assert runs.train(tmp_path, *FLAGS, "--resume") == 0
    assert differences(tmp_path / "a", whole) == []


def test_a_second_ctrl_c_stops_at_once(whole, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 6, twice)
    assert runs.train(tmp_path, *FLAGS) == 130
    assert position(tmp_path / "a") == (1, 0)  # what was saved before
    monkeypatch.undo()
    assert runs.train(tmp_path, *FLAGS, "--resume") == 0
    assert differences(tmp_path / "a", whole) == []


class Crash(Exception):
    """An error of the program, which keeps its traceback."""


def crash():
    raise Crash


@pytest.mark.parametrize("minutes, stands", [(10, (1, 0)), (0, (1, 2)), (1.5, (1, 2))])
def test_checkpoints_inside_an_epoch_come_by_time(minutes, stands, whole, tmp_path, monkeypatch):
    """Each step takes a minute, by the clock of this test."""
    minute = [0]

    def after_step(self, batch):
        minute[0] += 1
        if minute[0] == STEPS + 3:
            crash()

    monkeypatch.setattr(Method, "after_step", after_step)
    monkeypatch.setattr(run.time, "monotonic", lambda: 60.0 * minute[0])
    with pytest.raises(Crash):
        runs.train(tmp_path, *FLAGS, f"--output.save-minutes={minutes}")
    assert position(tmp_path / "a") == stands
    monkeypatch.undo()
    assert runs.train(tmp_path, *FLAGS, "--resume") == 0
    assert differences(tmp_path / "a", whole) == []


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in the middle of its second epoch."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_step(monkeypatch, STEPS + 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert runs.train(root, *FLAGS) == 143
    return root / "a"


def spoil(value):
    if isinstance(value, torch.Tensor):
        return value + 1
    if isinstance(value, dict):
        return {k: spoil(v) if isinstance(v, dict | torch.Tensor | float) else v for k, v in value.items()}
    return value + 1


@pytest.mark.parametrize("part", ["model", "average", "optimizer", "taken", "sums", "history", "best", "step"])
def test_every_part_of_the_state_counts(part, whole, stopped, tmp_path):
    """The oracle sees a part that is not restored: each one is spoilt in turn."""
    shutil.copytree(stopped, tmp_path / "a")
    saved = checkpoint.read(tmp_path / "a/last.pt")
    if part == "optimizer":
        saved[part]["state"] = {i: spoil(moments) for i, moments in saved[part]["state"].items()}
    elif part == "history":
        saved[part][0]["loss"] += 1
    elif part == "best":
        saved[part]["score"] = 1000.0  # so that no later epoch takes its place
    else:
        saved[part] = spoil(saved[part])
    checkpoint.save(tmp_path / "a/last.pt", saved)
    assert runs.train(tmp_path, *FLAGS, "--resume") == 0
    assert differences(tmp_path / "a", whole) != []


def test_killed_runs_resume_bit_for_bit():
    """A few SIGKILLs at random moments; `make kills` for a hundred."""
    done = child.run(
        ROOT / "tests/trainer/kills.py", "3", PYTHONPATH=f"{ROOT}:{ROOT}/tests", OMP_NUM_THREADS="1", timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.match(r"3 kills of \d+ runs at \d+ positions: all ended as the whole run", done.stdout)
