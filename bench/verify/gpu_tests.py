"""The tests that need a GPU, of one backend, in several processes of pytest: python -m bench.verify.gpu_tests cuda.

A failure is printed when it happens. After a test that kills its process, hangs or ruins its device, a new process
continues with the next one. The exit status is 1 unless some passed and all were run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence

from . import workers
from .reports import Report

#: The longest that one test, or collecting them, may take, s.
PATIENCE = 90.0
PLUGIN = "bench.verify.pytest_reports"
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", PLUGIN]


def collect(paths: Sequence[str], marker: str, backend: str, patience: float, end: float) -> list[Report]:
    """The tests, "collected", and what could not be collected, "failed"; the others are still run."""
    command = [*PYTEST, "--collect-only", "--continue-on-collection-errors", "-m", marker, "-k", backend, *paths]
    worker = workers.Worker(command, patience, end)
    found = list(worker)
    if not any(report.state == "collected" for report in found):
        found.append(Report("the collection of the tests", "lost", worker.ended))
    return found


def run(
    backend: str, paths: Sequence[str], processes: int, patience: float, end: float, marker: str = "gpu"
) -> Iterator[Report]:
    """How each test ended, as it comes; those of the first path first."""
    found = collect(paths, marker, backend, patience, end)
    yield from (report for report in found if report.state != "collected")
    tests = list(dict.fromkeys(report.item for report in found if report.state == "collected"))
    yield from workers.run(lambda some: [*PYTEST, *some], tests, processes, patience, end)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.verify.gpu_tests", description=__doc__.splitlines()[0])
    parser.add_argument("backend", help="the word that the name of a test must have")
    parser.add_argument("paths", nargs="*", default=["tests/gpu", "tests"], help="those that matter most first")
    parser.add_argument("--marker", default="gpu")
    parser.add_argument("--seconds", type=float, default=600.0, help="in all")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for one test")
    options = parser.parse_args()
    count, end = min(8, os.cpu_count() or 1), time.monotonic() + options.seconds
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    sys.exit(workers.main(run(options.backend, options.paths, count, options.patience, end, options.marker)))
