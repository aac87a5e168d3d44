"""The runs of a study that are missing, one after the other or in several processes, and the record of each."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config import UserError, logger
from ..run import Busy, Diverged
from ..train import Result, train
from . import grid, measure, results

NOT_PASSED = ("study", "processes", "table")  #: to the processes that share the runs
NO_LOSSES = ("seconds", "images_per_s", "gradient_share")  #: of the numbers of an epoch
WHOLE_STATE = ("last.pt", "previous.pt")  #: of a finished run, which best.pt and the log outlive


def run_missing(study: grid.Study, folder: Path, file: Path, at_most: int = 0) -> None:
    """Makes the runs that ``file`` lacks and adds their records; those that another process holds are left to it.

    At most ``at_most`` of them are started; 0: all.
    """
    runs, started = study.runs(folder), 0
    for run in runs:
        # Until its record is written: a run that is trained but not measured yet is no other process's to finish.
        with _held(folder / f".{run.config.name}.lock") as held:
            done = {results.identity(record) for record in results.read(file)}
            if run.identity in done:
                continue
            if at_most and started == at_most:
                break
            left = sum(r.identity not in done for r in runs)
            logger.info("%s: %s, seed %d; %d of %d runs are left", study.name, run.row, run.seed, left, len(runs))
            if not held:
                logger.info("another process makes this one")
                continue
            place = folder / run.config.name
            try:
                result = train(run.config, resume=(place / "last.pt").is_file(), measure=measure.over_training)
                results.add(file, record(run, result))
            except Busy as busy:
                logger.info("%s", busy)
                continue
            except Diverged as error:
                results.add(file, {**about(run), "failed": str(error)})
            started += 1
            for name in WHOLE_STATE:
                (place / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[bool]:
    """Whether this process has the file ``lock`` now, which no other has at the same time."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise UserError(f"root: got {lock.parent}, which can't be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def share(processes: int, name: str, options: dict) -> None:
    """Starts ``processes`` processes of the study with these options; each makes the runs that no other holds.

    Raises:
        UserError: one of them failed.
    """
    gpus, threads = torch.cuda.device_count(), max(1, torch.get_num_threads() // processes)
    own = {key: value for key, value in options.items() if key not in NOT_PASSED}
    arguments = ["study", name, *(f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in own.items())]
    children = []
    for i in range(processes):
        device = {"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **device}
        children.append(subprocess.Popen([sys.executable, "-m", "trainer", *arguments], env=environment))
    if bad := [status for status in [child.wait() for child in children] if status]:
        raise UserError(f"processes: {len(bad)} of {processes} ended with status {bad[0]}; see above")


def about(run: grid.Run) -> dict:
    """Which run a record is of."""
    return {"row": run.row, "seed": run.seed, "fold": run.fold, "key": run.key}


def record(run: grid.Run, result: Result) -> dict:
    """What a finished run gave, as plain values."""
    name = result.used.reported
    last, best = result.history[-1], result.best
    split = result.used.splits[name]
    images = "\n".join([*split.digests, *map(str, split.counts(len(result.used.classes)))])
    return {
        **about(run),
        "method": run.config.method.name,
        "split": name,
        "classes": list(result.used.classes),
        "images": hashlib.sha256(images.encode()).hexdigest()[:16],
        "last": last[name],
        "best": {**best[name], "epoch": best["epoch"]},
        "losses": {k: v for k, v in last.items() if isinstance(v, float) and k not in NO_LOSSES},
        "view_difference": measure.view_difference(result.method, split),
        "gradient_share": measure.gradient_share(result.method, split),
        "gradient_share_over": {r["epoch"]: r["gradient_share"] for r in result.history if "gradient_share" in r},
        "seconds": sum(row["seconds"] for row in result.history),
        "device": _described(next(result.method.parameters()).device),
    }


def _described(device: torch.device) -> str:
    """The name of a GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
