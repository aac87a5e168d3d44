"""The GPU's cases of ``python -m bench op`` with some contenders, in a process that is replaced when it ends early.

    python -m bench.verify.every_case cuda identity --out DIR --seconds 100

The result file has all that was measured, by whichever process. The exit status is 1 unless all cases were measured.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

import torch

from .. import goals, op
from ..cases import CASES, REHEARSED, Case
from ..clocks import CudaClock, WallClock
from . import workers
from .reports import say

#: The longest that one case may take, s: two cold compilations.
PATIENCE = 75.0
#: Of timing for each case, s.
TIMED = 1.5


def cases(rehearse: bool) -> dict[str, Case]:
    return {case.name: case for case in (REHEARSED if rehearse else CASES) if rehearse or case.device == "cuda"}


def worker(options: argparse.Namespace) -> int:
    """Measure the cases that are named, in this process; the exit status."""
    kind = "rehearsal" if options.rehearse else "cuda"
    if options.rehearse:
        torch.set_num_threads(1)
    known = cases(options.rehearse)
    result, path = op.run(
        [known[name] for name in options.worker],
        TIMED,
        options.seconds,
        options.out,
        kind=kind,
        clock=WallClock() if options.rehearse else CudaClock(),
        contenders=functools.partial(op.contenders, chosen=options.contenders),
        chosen=options.contenders,
        resume=options.resume,
        say=say,
    )
    print(*map(goals.summary, result["goals"]), path, sep="\n")
    return int(bool(result["errors"]))


def main(options: argparse.Namespace) -> int:
    """Measure all cases, one process after the other; the exit status."""
    end, names = time.monotonic() + options.seconds, list(cases(options.rehearse))
    again = [sys.executable, "-m", "bench.verify.every_case", *options.contenders, "--out", str(options.out)]
    again += ["--rehearse"] if options.rehearse else []

    def command(left: list[str]) -> list[str]:
        resume = ["--resume"] if len(left) < len(names) else []
        return [*again, *resume, "--seconds", f"{0.95 * (end - time.monotonic()):.0f}", "--worker", *left]

    return workers.main(workers.run(command, names, 1, options.patience, end))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.verify.every_case", description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="+", help="the first one names the file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0, help="in all")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for one case")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes")
    parser.add_argument("--resume", action="store_true", help="add to the file of an earlier process")
    parser.add_argument("--worker", nargs="+", metavar="CASE", help="these only, in this process")
    given = parser.parse_args()
    sys.exit(worker(given) if given.worker else main(given))
