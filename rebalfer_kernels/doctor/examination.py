"""Check every combination of one backend, in this process or in one of its own that may crash or hang."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import native
from ..backend import AVAILABLE, BACKENDS
from . import bounded
from .cases import ODD, PAPER, SMALL, Combination, combinations
from .environment import copy_gb_per_s, without_home
from .report import as_json
from .selfcheck import LIMITS, check, in_short, time_call

MARGIN_S = 5.0  #: a backend's process should end by itself this long before it is killed
_KEPT_OUTPUT = 8000  #: characters, of the end of what a backend's process printed


def examine(backend: str, seconds: float, progress: Callable[[dict], object] = lambda report: None) -> dict:
    """Check one backend in this process: whether it is available, and a row for each device and combination.

    ``progress`` is called with the report so far before each part of the work, which ``report["at"]`` names.
    """
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"backend": backend, "reason": "not known", "load_s": 0.0, "built": [], "rows": []}
    report |= {"copy_gb_per_s": {}, "unchecked": 0, "at": "loading"}
    progress(report)
    report |= _load(backend)
    if report["reason"] != AVAILABLE.reason:
        return report
    cases = [case for device in BACKENDS[backend].devices() for case in combinations(backend, device, LIMITS)]
    report["unchecked"] = len(cases)
    for case in cases:
        if time.monotonic() > end:
            break
        report["at"] = str(case)
        progress(report)
        if case.device not in report["copy_gb_per_s"]:
            report["copy_gb_per_s"][case.device] = _copy_or_none(case.device)
        report["rows"].append(_row(case, report["copy_gb_per_s"][case.device]))
        report["unchecked"] -= 1
    report["at"] = None
    return report


def _load(backend: str) -> dict[str, Any]:
    before, start = _libraries(), time.monotonic()
    reason = BACKENDS[backend].available().reason
    autograd = native.load("autograd")[1] if BACKENDS[backend].fused and reason == AVAILABLE.reason else None
    seconds = time.monotonic() - start
    built = sorted(_libraries() - before)
    return {"reason": without_home(reason), "cpp_autograd": autograd, "load_s": seconds, "built": built}


def _libraries() -> set[str]:
    with contextlib.suppress(OSError, native.BuildError):  # the backend's reason says it
        return {p.name for p in native.cache_files() if p.suffix == ".so"}
    return set()


def _copy_or_none(device: str) -> float | None:
    with contextlib.suppress(Exception):  # not enough memory, for example: the report leaves out the shares
        return copy_gb_per_s(device)
    return None


def _row(case: Combination, copy: float | None) -> dict:
    """A combination's row, timed if it is right and compiled."""
    interpreted = BACKENDS[case.backend].interpreted()
    row = check(case, (SMALL if interpreted else PAPER, ODD))
    if row["state"] != "right" or interpreted:
        return row
    try:
        seconds, moved = time_call(case)
    except torch.OutOfMemoryError:
        return row | {"note": "not timed: out of memory"}
    except Exception as error:  # a large size that fails where the small one was right
        return row | {"state": "failed", "note": f"timing: {in_short(error)}"}
    speed = moved / seconds / 1e9
    return row | {"ms": 1e3 * seconds, "gb_per_s": speed, "share_of_copy": speed / copy if copy else None}


def examine_into(backend: str, until: str, file: str) -> None:
    """:func:`examine` until that ``time.time()``, for another process, which may read ``file`` at any time."""

    def save(report: dict) -> None:
        part = Path(f"{file}.part")
        part.write_text(as_json(report))
        part.replace(file)

    save(examine(backend, float(until) - time.time(), save))


def examine_apart(backend: str, seconds: float) -> dict:
    """:func:`examine` in a process of its own, which is killed after ``seconds``.

    The report has two entries more: "failure", None or what ended the process, and "output", the end of what it
    printed.
    """
    code = f"import sys; from {__name__} import examine_into; examine_into(*sys.argv[1:])"
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        command = [sys.executable, "-c", code, backend, str(time.time() + seconds - MARGIN_S), str(file)]
        outcome = bounded.run(command, seconds, environment={"PYTHONPATH": path})
        report = {"backend": backend, "reason": "not known", "at": "starting"}
        with contextlib.suppress(OSError):
            report = json.loads(file.read_text())
    return report | {"failure": outcome.failure, "output": without_home(outcome.output[-_KEPT_OUTPUT:])}
