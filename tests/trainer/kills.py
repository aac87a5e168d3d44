"""Kills runs at random moments and resumes them; each must end as the run that nobody killed, bit for bit.

make kills    100 of them; tests/trainer/kills.py NUMBER SEED with PYTHONPATH=.:tests for other moments
"""

import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from support import runs

from trainer import checkpoint

#: Whatever draws random numbers or keeps a state between steps; a checkpoint after each step, or only where due.
FLAGS = ["--epochs=3", *runs.STATEFUL]
SAVES = (["--output.save-minutes=0"], [])


def start(root: Path, name: str, *flags: str) -> int:
    """A child that trains, forked from this process, so that it does not import PyTorch again; its process id."""
    if child := os.fork():
        return child
    status = 1
    try:
        quiet = os.open(root / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        status = runs.train(root, f"--name={name}", *FLAGS, *flags)
    finally:
        os._exit(status)


def end_of(child: int, killed_after: float = math.inf) -> int:
    """Its exit status, or minus the signal that ended it, at the latest after so many seconds."""
    moment = time.perf_counter() + killed_after
    while time.perf_counter() < moment:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def resumable(run: Path) -> list[str]:
    """The flags that continue it. Whenever it was killed, its checkpoint is whole or there is nothing of it yet."""
    if (run / "last.pt").exists():
        checkpoint.read(run / "last.pt")
        return ["--resume"]
    assert not [path.name for path in run.glob("*.*") if not path.name.startswith(".")], sorted(run.iterdir())
    return []


def differences(run: Path, whole: Path) -> list[str]:
    """Where its files differ from those of the whole run."""
    found = [
        line for name in ("last.pt", "best.pt") for line in runs.differ(runs.state(run, name), runs.state(whole, name))
    ]
    return found + runs.differ(runs.rows(run), runs.rows(whole), "metrics.jsonl")


def main(kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # a fork has no threads but its own
    moments, killed, finished = random.Random(seed), 0, 0
    found = set()  # positions
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        began = time.perf_counter()
        assert end_of(start(root, "whole")) == 0, (root / "whole.log").read_text()
        length = time.perf_counter() - began  # of a whole run, as fast as one was: the first may be slow
        while killed < kills:
            run, saves = root / f"run{finished}", SAVES[finished % 2]
            status = 1
            while status:
                flags, start_of_child = resumable(run), time.perf_counter()
                child = start(root, run.name, *saves, *flags)
                # About every third child ends by itself.
                status = end_of(child, moments.uniform(0, 1.5 * length) if killed < kills else math.inf)
                if not status and not flags:
                    length = min(length, time.perf_counter() - start_of_child)
                assert status in (0, -signal.SIGKILL), (root / f"{run.name}.log").read_text()
                if status and resumable(run):
                    saved = checkpoint.read(run / "last.pt")
                    found.add((saved["epoch"], saved["step"]))
                killed += status != 0
            finished += 1
            assert differences(run, root / "whole") == [], f"{run.name} after {killed} kills"
    seconds = time.perf_counter() - began
    print(f"{killed} kills of {finished} runs at {len(found)} positions: all ended as the whole run ({seconds:.0f} s)")


if __name__ == "__main__":
    main(*(int(argument) for argument in [*sys.argv[1:], 0][:2]))
