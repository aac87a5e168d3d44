"""The clock of a GPU's multiprocessors while something is timed, from nvidia-smi: times mean little without it."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator

import torch

#: Between two samples.
PERIOD_MS = 50

Figures = dict[str, float] | None


def command() -> list[str]:
    """Prints a line every so often: the present and the highest clock, MHz."""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix("GPU-")
    query = ["--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"]
    return ["nvidia-smi", "-i", f"GPU-{uuid}", *query, "-lms", str(PERIOD_MS)]


@contextlib.contextmanager
def sampled(command: Callable[[], list[str]] = command) -> Iterator[Callable[[], Figures]]:
    """Gives what tells, within, what was seen until now: :func:`figures`."""
    with tempfile.TemporaryFile() as lines:
        process = None
        with contextlib.suppress(OSError, RuntimeError, AttributeError):  # no nvidia-smi, or a torch without uuid
            process = subprocess.Popen(command(), stdin=subprocess.DEVNULL, stdout=lines, stderr=subprocess.DEVNULL)
        try:
            yield lambda: figures(os.pread(lines.fileno(), 2**20, 0).decode())  # leaves the writer's place alone
        finally:
            if process:
                process.kill()
                process.wait()


def figures(text: str) -> Figures:
    """Lowest, median and highest clock and the GPU's limit, MHz; None if nothing was seen.

    >>> figures("1755, 1980\\n1980, 1980\\n[N/A], [N/A]\\n1965, 19")
    {'low': 1755, 'median': 1965, 'high': 1980, 'limit': 1980}
    """
    rows = [line.split(", ") for line in text.splitlines()]
    numbers = [(int(row[0]), int(row[1])) for row in rows if len(row) == 2 and all(x.isdecimal() for x in row)]
    if not numbers:
        return None
    clocks, limits = zip(*numbers, strict=True)
    return {"low": min(clocks), "median": statistics.median(clocks), "high": max(clocks), "limit": max(limits)}
