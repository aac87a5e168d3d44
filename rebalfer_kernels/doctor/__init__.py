"""``python -m rebalfer_kernels doctor``: what this machine has, and whether each backend is right on it.

Every operation that a backend serves here is compared, outputs and gradients, with the package's own reference in
float64 on the CPU. Each backend is checked in a process of its own, so that one that crashes or hangs costs the others
nothing, and what it had found before is kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import native
from ..backend import BACKENDS
from . import environment
from .examination import examine, examine_apart
from .report import as_json, heading, healthy, section, verdict

SUMMARY = "compare this machine's backends with float64, as text for a bug report"
LIMIT_S = 110.0  #: of the whole command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command ``doctor``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--backend", choices=list(BACKENDS), help="check only this one, in this process")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="time limit; reports what is left unchecked")
    parser.add_argument("--clear-cache", action="store_true", help="only remove the files of the native build")


def main(options: argparse.Namespace) -> int:
    """Run the command; returns 1 if anything was wrong, failed, crashed or was left unchecked."""
    if options.clear_cache:
        return _clear_cache()
    end = time.monotonic() + options.seconds
    result: dict[str, Any] = {"environment": environment.environment(), "backends": [], "right": False}
    print(heading(result["environment"]), flush=True)
    for report in _reports(options.backend, end):
        print(section(report), flush=True)
        result["backends"].append(report)
        _write(options.json, result)  # so that it can be read even if this process is killed
    result["right"] = all(map(healthy, result["backends"]))
    _write(options.json, result)
    print(verdict(result))
    return 0 if result["right"] else 1


def _clear_cache() -> int:
    try:
        count, size = native.clear_cache()
    except (OSError, native.BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    directory = environment.without_home(native.cache_directory())
    print(f"removed {count} files, {size / 2**20:.1f} MiB, from {directory}")
    return 0


def _write(file: Path | None, result: dict) -> None:
    if file is not None:
        file.write_text(as_json(result))


def _reports(backend: str | None, end: float) -> Iterator[dict]:
    """Of one backend, or of all: each may use two thirds of the time that is left, the last one all of it."""
    if backend is not None:
        yield examine(backend, end - time.monotonic())
        return
    for later, name in zip(reversed(range(len(BACKENDS))), BACKENDS, strict=True):
        left = end - time.monotonic()
        yield examine_apart(name, left * 2 / 3 if later else left)
