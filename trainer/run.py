"""The folder of a run: its lock, checkpoints, log, and what a signal does to it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from . import checkpoint, distributed
from .config import RESULTS, ROUNDING, Config, UserError, as_dict, differences, expect, logger, restored
from .state import State

#: What a run writes into its folder.
FILES = ("config.json", "metrics.jsonl", "last.pt", "previous.pt", "best.pt", "confusion.png", "cam.png")
LOCK = ".lock"


class Diverged(UserError):
    """A loss that is no finite number: where, and what is still good."""

    status = 3

    def __init__(self, where: str, good: str) -> None:
        super().__init__(f"loss: got a number that is not finite {where}; {good}; a lower --learning-rate may help")


class Busy(UserError):
    """Another process holds the run."""


class Stopped(Exception):
    """A signal ended the run after its state was saved."""

    def __init__(self, signum: int, position: str) -> None:
        super().__init__(f"stopped in {position}; the same command with --resume continues")
        self.status = 128 + signum


class Run(AbstractContextManager):
    """``ROOT/NAME``, held by one process at a time; of those that torchrun starts, only rank 0 holds it and writes.

    ``last.pt`` is the whole state, replaced atomically; what it replaces becomes ``previous.pt``. All other files can
    be made from it: ``best.pt`` has the weights of the best epoch, which the state holds too, and ``metrics.jsonl``
    its history. ``saved`` is the state to resume from, or None.

    Raises:
        UserError: a folder that can't be written, is in use, or has a run already that is neither to be resumed nor
        overwritten; a checkpoint that is damaged or was made with other options.
    """

    def __init__(self, config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise UserError("resume: got both --resume and --overwrite, expected one of them")
        self.config = config
        self.folder = Path(config.output.root).expanduser() / config.name
        self.about: dict = {}  #: what else the checkpoints hold: the identity of the data
        self.board: Any = None
        self.lock = -1
        self.saved_at, self.position = math.inf, ""
        self.saved: dict | None = distributed.same(distributed.first(lambda: self._open(resume, overwrite)))

    def _open(self, resume: bool, overwrite: bool) -> dict | None:
        """Locks the folder; the state to resume from."""
        if distributed.rank():
            return None
        expect(not resume or self.folder.is_dir(), "resume", str(self.folder), "the folder of a run")
        self.lock = _lock(self.folder)
        try:
            found = [name for name in FILES if (self.folder / name).exists()]
            instead = f"another one, --resume or --overwrite: {self.folder} has a run already ({', '.join(found)})"
            expect(resume or overwrite or not found, "name", self.config.name, instead)
            return self._resumed() if resume else None
        except UserError:
            self.close()
            raise

    def _resumed(self) -> dict:
        path = self.folder / "last.pt"
        try:
            saved = checkpoint.read(path)
        except UserError as error:
            raise UserError(f"resume: {error}{self._offer_previous()}") from None
        expect("optimizer" in saved, "resume", str(path), "the whole state of a run, not weights only as in best.pt")
        check_config(path, saved, self.config)
        return saved

    def _offer_previous(self) -> str:
        previous = self.folder / "previous.pt"
        try:
            saved = checkpoint.read(previous)
        except UserError:
            return ""
        where = position(saved["epoch"], saved["step"])
        return f"; {previous} is whole and stands in {where}: rename it to last.pt to resume from there"

    def begin(self, state: State) -> None:
        """The first save of a new run, for which what an overwritten one left is deleted."""
        self.saved_at, self.position = time.monotonic(), position(state.epoch, state.step)
        if distributed.rank():
            return
        replaced = (*FILES, "events.out.tfevents.*") if self.saved is None else ()
        for pattern in (".*.tmp", *replaced):  # the former of a process that was killed while it wrote
            for stale in self.folder.glob(pattern):
                stale.unlink()
        if self.saved is None:
            self.save(state)
        text = json.dumps(as_dict(self.config), indent=2, ensure_ascii=False)
        checkpoint.write(self.folder / "config.json", text + "\n")
        self._publish(state)
        if self.config.output.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self.board = SummaryWriter(str(self.folder), purge_step=len(state.history) + 1)

    def save(self, state: State) -> None:
        """The whole state, atomically, into ``last.pt``."""
        self.saved_at, self.position = time.monotonic(), position(state.epoch, state.step)
        if distributed.rank():
            return
        content = {**state.as_dict(), **self.about, "config": as_dict(self.config)}
        checkpoint.save(self.folder / "last.pt", content, keep=self.folder / "previous.pt")

    def good(self) -> str:
        """What stands on the disk, for a message."""
        return f"{self.folder / 'last.pt'} is good and stands in {self.position}"

    def due(self) -> bool:
        """Whether the last save is longer ago than wanted."""
        return time.monotonic() - self.saved_at > 60 * self.config.output.save_minutes

    def finish_epoch(self, state: State) -> None:
        """Saves, then rewrites what is made from the state."""
        self.save(state)
        self._publish(state)
        if self.board:
            row = state.history[-1]
            splits = {name: scores for name, scores in row.items() if isinstance(scores, dict)}
            numbers = row | {f"{name}/{key}": v for name, scores in splits.items() for key, v in scores.items()}
            for name, value in numbers.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, row["epoch"])

    def _publish(self, state: State) -> None:
        if distributed.rank():
            return
        rows = (json.dumps(row, allow_nan=False, ensure_ascii=False) for row in state.history)
        checkpoint.write(self.folder / "metrics.jsonl", "".join(row + "\n" for row in rows))
        if state.best:
            row = state.history[state.best["epoch"]]
            best = {**self.about, **state.best, "row": row, "config": as_dict(self.config)}
            checkpoint.save(self.folder / "best.pt", best)

    def close(self) -> None:
        if self.lock < 0:
            return
        if self.board:
            self.board.close()
        if self.folder.is_dir() and os.listdir(self.folder) == [LOCK]:  # nothing was begun
            (self.folder / LOCK).unlink()
            self.folder.rmdir()
        os.close(self.lock)

    def __exit__(self, *_: object) -> None:
        self.close()


def position(epoch: int, step: int) -> str:
    """In words, epochs from 1.

    >>> position(0, 3)
    'epoch 1 after 3 steps'
    """
    return f"epoch {epoch + 1} after {step} steps"


def _lock(folder: Path) -> int:
    """An open, locked file in ``folder``, which is made if need be; the lock ends with the process."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"output.root: {folder} can't be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock)):  # deleted by its last holder
            os.close(lock)
            return _lock(folder)
    except BlockingIOError:
        os.close(lock)
        raise Busy(f"name: got {folder.name!r}, but another process is writing to {folder}") from None
    except OSError as error:
        logger.warning("note: %s can't be locked (%s): start no second run of this name", folder, error.strerror)
    return lock


def check_config(path: Path, saved: dict, config: Config) -> None:
    """Raises :class:`UserError` if an option differs that changes the results; says which change their rounding."""
    changed = differences(restored(saved["config"]), config)
    if saved["epoch_bound"] and saved["config"]["epochs"] != config.epochs:
        changed[RESULTS].append(f"epochs {saved['config']['epochs']} -> {config.epochs}, which its schedule follows")
    if changed[RESULTS]:
        raise UserError(f"resume: got other options than {path} was made with: {', '.join(changed[RESULTS])}")
    if changed[ROUNDING]:
        logger.info("note: %s: continues, but results may be rounded differently", ", ".join(changed[ROUNDING]))


class Signals(AbstractContextManager):
    """SIGINT, SIGTERM and SIGHUP are noted, so that the step in progress ends; a second Ctrl-C stops at once.

    Only the main thread of a process can do so.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        on = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        main = threading.current_thread() is threading.main_thread()
        self.before = {signum: signal.signal(signum, self._ask) for signum in on} if main else {}

    def _ask(self, signum: int, _frame: object) -> None:
        if self.asked == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signum
        logger.info("%s: stopping after this step", signal.Signals(signum).name)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
