"""Every operation of a backend once, forward and backward, compared with float64 as in the doctor.

    python -m bench.verify.every_op cuda        at the doctor's sizes, in several processes, which warm Triton's cache
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.verify.every_op --small triton

The exit status is 1 if a result is wrong, or if there is none.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import torch

from rebalfer_kernels.backend import BACKENDS
from rebalfer_kernels.doctor.cases import ODD, PAPER, SMALL, Combination, Size, combinations
from rebalfer_kernels.doctor.selfcheck import check

from . import workers
from .device import POISONED, poisoned
from .reports import Report, say

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
STATES = {"right": "passed", "not served": "skipped", "wrong": "failed", "failed": "failed"}
#: The longest that one operation may take, s; a cold one compiles several kernels.
PATIENCE = 60.0


def items(backend: str) -> dict[str, Combination]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {str(combination): combination for combination in combinations(backend, device, DTYPES)}


def here(backend: str, names: Iterable[str], sizes: Sequence[Size], end: float = math.inf) -> Iterator[Report]:
    """Check these in this process until ``end``; it ends as soon as its device is no use to it."""
    available, why = BACKENDS[backend].available()
    if not available:
        print(f"{backend} is not available: {why}", flush=True)
        return
    known = items(backend)
    for name in names:
        if time.monotonic() > end:
            yield Report(name, "not run")
            continue
        say(name, "begun")
        row = check(known[name], sizes)
        state, note = STATES[row["state"]], row["note"]
        if bad := poisoned():
            state, note = "failed", f"{note}; it leaves the device unusable: {bad}"
        say(name, state, note)
        yield Report(name, state, note)
        if bad:
            print(f"{name}: {note}", flush=True)
            os._exit(POISONED)


def main(backend: str, processes: int, seconds: float, patience: float = PATIENCE) -> int:
    """Check them all in workers; the exit status."""
    command = [sys.executable, "-m", "bench.verify.every_op", backend, "--worker"]
    end = time.monotonic() + seconds
    return workers.main(workers.run(lambda some: [*command, *some], list(items(backend)), processes, patience, end))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.verify.every_op", description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=[name for name, backend in BACKENDS.items() if backend.fused])
    parser.add_argument("--seconds", type=float, default=600.0, help="in all")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--small", action="store_true", help="at small sizes, in this process: for a sanitizer")
    way.add_argument("--worker", nargs="+", metavar="ITEM", help="these only, in this process")
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)  # the truth is computed on the CPU, by all of the workers at once
        for _ in here(options.backend, options.worker, (PAPER, ODD)):
            pass
        sys.exit()
    if options.small:
        end = time.monotonic() + options.seconds
        sys.exit(workers.main(here(options.backend, items(options.backend), (SMALL, ODD), end)))
    sys.exit(main(options.backend, min(12, os.cpu_count() or 1), options.seconds))
