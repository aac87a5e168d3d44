"""One part of what a machine with a GPU must show, within a time; whatever ends early, the rest is kept.

``PART.json`` is written anew, whole, before and after every piece: each piece's state, reason, seconds and the end of
its output, and the goals. ``PART.txt`` gets all output while it is printed. With the files of the pieces themselves
(doctor.json, op-*.json, step-*.json) a part writes at most five.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rebalfer_kernels.doctor import bounded
from rebalfer_kernels.doctor.environment import environment

from .. import results
from ..goals import judged
from ..goals import summary as goal_summary
from .parts import PARTS, PYTHON, WRITES, Piece, choose

#: Kept of a piece's output in the JSON, characters.
TAIL = 3000
#: Files that may be in the folder: more might not be brought home.
FILES = 8
#: Less time is not worth beginning a piece.
LEAST_S = 2.0
CUT_OFF = "the run ended while this piece ran"  #: true of a file that is found so
NOT_BEGUN = "the run ended before its turn"


class Ended(BaseException):
    """This process is to end, by the signal that it names."""


class Check:
    """A part while it runs."""

    def __init__(self, part: str, pieces: list[Piece], out: Path, seconds: float, rehearse: bool) -> None:
        self.pieces, self.out, self.end = pieces, out, time.monotonic() + seconds
        self.path, self.log = out / f"{part}.json", out / f"{part}.txt"
        found = environment()
        gpus = found["gpus"] or []
        self.summary: dict[str, Any] = {
            "kind": "rehearsal" if rehearse else "gpu-check",
            "part": part,
            "device": gpus[0].split(",")[0] if gpus and not rehearse else found["cpu"],
            **{key: found[key] for key in ("gpus", "driver", "torch", "triton", "cuda", "python", "nvcc")},
            **results.version(),
            "limit_s": seconds,
            "pieces": [_record(piece) for piece in pieces],
            "goals": [],
        }

    def run(self) -> dict[str, Any]:
        """Run the pieces one after the other; what the JSON holds. SIGTERM and Ctrl-C end it, and are written down."""
        self._write()
        try:
            with _signals():
                for i, (piece, record) in enumerate(zip(self.pieces, self.summary["pieces"], strict=True)):
                    begun = time.monotonic()
                    left = self.end - begun
                    if piece.skip:
                        record |= {"state": "skipped", "reason": piece.skip}
                    elif left < LEAST_S:
                        record["reason"] = "no time left"
                    else:
                        record |= {"state": "lost", "reason": CUT_OFF}
                        self._write()
                        later = sum(p.weight for p in self.pieces[i:] if not p.skip)
                        record |= self._perform(piece, left * piece.weight / later)
                    self._write()
                    print(f"{_line(record)}", flush=True)
        except Ended as signal_name:
            lost = next((r for r in self.summary["pieces"] if r["reason"] == CUT_OFF), None)
            if lost:
                lost["reason"] = f"{signal_name} ended the run while this piece ran"
                lost["seconds"] = round(time.monotonic() - begun, 1)
            self.summary["ended_by"] = str(signal_name)
            self._write()
        return self.summary

    def _perform(self, piece: Piece, limit: float) -> dict[str, Any]:
        """Run one piece; its state, reason, seconds and the end of its output."""
        command = piece.command(limit)
        # From a bare checkout, and what is printed before the end must be in the log.
        path = os.pathsep.join(filter(None, (str(results.ROOT), os.environ.get("PYTHONPATH"))))
        # What could not be built in its own piece is not tried again in every other.
        build = {} if piece.name.startswith("build-") else {"REBALFER_BUILD": "0"}
        settings = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **build, **piece.environment}
        try:
            log = self._open_log(f"\n=== {piece.name}, at most {limit:.0f} s\n")
            outcome = bounded.run(command, limit, environment=settings, directory=results.ROOT, log=log)
        except OSError as error:  # the program cannot be started
            outcome = bounded.Outcome(127, str(error), 0.0)
        state = "passed" if outcome.failure is None else "stopped" if outcome.status is None else "failed"
        last = outcome.output.strip().splitlines()[-1:]
        return {
            "state": state,
            "reason": None if outcome.failure is None else results.portable(": ".join([outcome.failure, *last])[:500]),
            "seconds": round(outcome.seconds, 1),
            "limit_s": round(limit, 1),
            "command": [results.portable(part.replace(PYTHON, "python")) for part in command],
            "output": results.portable(outcome.output[-TAIL:]),
        }

    def _open_log(self, line: str) -> Path | None:
        """The log with one more line; None if it cannot be written: the piece's output is then only in the JSON."""
        try:
            with self.log.open("a") as file:
                file.write(line)
        except OSError as error:
            print(f"the log cannot be written: {error}", flush=True)
            return None
        return self.log

    def _write(self) -> None:
        """Write the JSON; a folder that is full or gone must not end the run, whose output may still be read."""
        try:
            self.summary["goals"] = all_goals(self.out)
        except Exception as error:  # a file that is not what its name says
            print(f"the goals cannot be judged: {results.reason(error)}", flush=True)
        with contextlib.suppress(OSError):
            self.summary["files"] = sorted(p.name for p in self.out.iterdir())
        try:
            results.write(self.summary, self.path)
        except OSError as error:
            print(f"{self.path.name} cannot be written: {error}", flush=True)


def _record(piece: Piece) -> dict[str, Any]:
    return {"piece": piece.name, "state": "not run", "reason": NOT_BEGUN, "seconds": 0.0}


def _line(record: dict[str, Any]) -> str:
    return f"{record['piece']:<18} {record['state']:<8} {record['seconds']:6.1f} s  {record['reason'] or ''}".rstrip()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Within, SIGTERM, SIGHUP and SIGINT raise :class:`Ended`."""

    def end(number: int, _: object) -> None:
        raise Ended(signal.Signals(number).name)

    names = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {name: signal.signal(name, end) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def all_goals(out: Path) -> list[dict[str, Any]]:
    """A GPU's goals, judged by the result files in ``out`` of the programs that have any."""
    measured = {"op": results.newest_gpu(out), "step": results.newest_by_backbone("step", out)}
    return [goal for program, found in measured.items() if found for goal in judged(program, found[-1])]


def table(summary: dict[str, Any]) -> str:
    """What is printed last."""
    lines = [f"{summary['device']}, driver {summary['driver']}, torch {summary['torch']}, commit {summary['commit']}"]
    return "\n".join([*lines, *map(_line, summary["pieces"]), *map(goal_summary, summary["goals"])])


def refusal(part: str, out: Path, rehearse: bool, only: list[str] | None, pieces: list[Piece]) -> str | None:
    """Why the part cannot be run, before anything is."""
    if unknown := set(only or ()) - {piece.name for piece in pieces}:
        names = ", ".join(repr(piece.name) for piece in pieces)
        return f"--only: got {', '.join(map(repr, sorted(unknown)))}, expected some of {names}"
    if not results.version()["commit"]:
        return "the commit is not known: this is no git checkout, so set REBALFER_COMMIT to what it is a copy of"
    count, own = WRITES[part]
    others = [path.name for path in out.glob("*") if not path.name.startswith(own)]
    if len(others) + count > FILES:
        names = ", ".join(sorted(others))
        return f"--out: got a folder with {len(others)} other files ({names}), expected at most {FILES - count}"
    if not rehearse and not environment()["gpus"]:
        return "PyTorch sees no GPU here (--rehearse tries the check out without one)"
    return None


def main(part: str, out: Path, seconds: float, rehearse: bool = False, only: list[str] | None = None) -> int:
    """Run a part, or ``only`` its pieces of these names; 2 if it was refused, 1 if a piece failed or was not run."""
    out = out.resolve()
    pieces = PARTS[part](out, rehearse)
    if why := refusal(part, out, rehearse, only, pieces):
        print(f"error: {why}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    summary = Check(part, choose(pieces, only), out, seconds, rehearse).run()
    print(table(summary))
    return int(any(piece["state"] not in ("passed", "skipped") for piece in summary["pieces"]))
