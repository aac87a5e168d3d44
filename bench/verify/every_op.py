"""Every operation of some backends once, forward and backward.

    python -m bench.verify.every_op cuda triton      at the doctor's sizes; several processes warm Triton's cache
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.verify.every_op --small cuda triton

Results are compared with float64 as in the doctor; the exit status is 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence

import torch

from rebalfer_kernels.backend import BACKENDS
from rebalfer_kernels.doctor.cases import ODD, PAPER, SMALL, Combination, combinations
from rebalfer_kernels.doctor.selfcheck import check

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def main(backends: Sequence[str], device: str, small: bool, processes: int = 1) -> int:
    """Run the operations of these backends, those that are available; the exit status."""
    todo: list[Combination] = []
    for backend in backends:
        available, reason = BACKENDS[backend].available()
        print(f"{backend}: {reason}", flush=True)
        todo += combinations(backend, device, DTYPES) if available else []
    checked = functools.partial(check, sizes=(SMALL if small else PAPER, ODD))
    wrong = False
    with contextlib.ExitStack() as stack:
        rows: Iterable[dict] = map(checked, todo)
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            rows = pool.imap(checked, todo)
        for row in rows:
            wrong |= row["state"] in ("wrong", "failed")
            combination = ", ".join(row[key] for key in ("backend", "op", "dtype", "layout"))
            print(f"{combination}: {row['state']} {row['note']}".rstrip(), flush=True)
    return int(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.verify.every_op", description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="+")
    parser.add_argument("--small", action="store_true", help="at small sizes, in one process: for a sanitizer")
    options = parser.parse_args()
    count = 1 if options.small else min(12, os.cpu_count() or 1)
    sys.exit(main(options.backends, "cuda" if torch.cuda.is_available() else "cpu", options.small, count))
