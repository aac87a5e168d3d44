"""The head's loss by itself: prove every contender, time those that passed, judge the goals, write one JSON file.

A CPU's row holds ms of ``forward``, ``backward`` and ``both``, call by call. In a GPU's row ``forward`` and ``both``
are ms per call of a CUDA graph of at least 20 over rotated buffers; ``eager`` is between events around calls launched
one by one from Python, so at small sizes it is the host's time.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import rebalfer_kernels as rk
from rebalfer_kernels.backend import BACKENDS
from rebalfer_kernels.doctor.environment import copy_gb_per_s

from . import baselines, goals, measure, results
from .baselines import Formulation
from .cases import Case, Problem, problem, rotated
from .clocks import Clock
from .measure import LoadMeter, Rotation

#: Cores that others may keep busy before a time is no longer worth reporting.
FOREIGN_LIMIT = 0.1
#: Calls captured in one graph, at least.
REPETITIONS = 20

Row = dict[str, Any]


def contenders(kind: str) -> dict[str, Formulation]:
    """Every formulation, both eager ones compiled too, and on a GPU ours on each backend available there."""
    if kind == "rehearsal":
        return baselines.FORMULATIONS  # compiling would be most of it
    return {**baselines.contenders(), **(baselines.on_each_backend("cuda") if kind == "cuda" else {})}


def run(
    cases: Sequence[Case],
    seconds: float,
    limit: float,
    directory: Path,
    *,
    kind: str,
    clock: Clock,
    contenders: Callable[[str], dict[str, Formulation]] = contenders,
    memory: str | None = None,
) -> tuple[dict[str, Any], Path]:
    """Measure the cases, ``seconds`` of timing each, until ``limit`` seconds are over; the result and its file.

    The file is written after every case. A case that fails is recorded and the next one tried; one that would not
    end in time, by the longest so far, is left out and named. ``kind`` is "cpu", "cuda" or "rehearsal", a GPU's
    program on a CPU; ``memory`` says how malloc was set when the process began and is only written down.
    """
    end, longest = time.monotonic() + limit, 0.0
    result = _begin(kind, cases[0].device, clock, memory)
    path = directory / results.file_name("op", result)
    proven: dict[Case, dict[str, Formulation]] = {}
    for i, case in enumerate(cases):
        start = time.monotonic()
        if start + longest > end:
            result["left_out"].append(case.name)
            continue
        print(f"{case.name}: proving and compiling", flush=True)
        try:
            proven[case] = _add(result, case, contenders(kind), seconds, clock)
        except Exception as error:
            result["errors"].append({"case": case.name, "error": results.reason(error)})
            print(f"  failed: {results.reason(error)}", flush=True)
            if isinstance(error, torch.AcceleratorError):  # the device cannot be used again by this process
                result["left_out"] += [later.name for later in cases[i + 1 :]]
                break
        longest = max(longest, time.monotonic() - start)
        _save(result, path)
    else:
        if kind == "cpu":
            with _foreign_load(result):
                result["bfloat16_over_float32"] = bfloat16_over_float32(cases, seconds, clock)
        else:  # last, as the profiler stays attached to the process
            for case, passed in proven.items():
                if time.monotonic() < end:
                    count_launches(case, passed, [r for r in result["rows"] if r["case"] == case.name], clock)
    result["quiet"] = max(result["foreign_cores"]) <= FOREIGN_LIMIT
    return result, _save(result, path)


def _begin(kind: str, device: str, clock: Clock, memory: str | None) -> dict[str, Any]:
    """A result without rows."""
    found = results.environment(kind)
    print({key: value for key, value in found.items() if key != "backends"})
    result = {**found, "memory": memory, "l2_bytes": clock.l2_bytes(), "copy_gb_per_s": None, "quiet": False}
    result |= {name: [] for name in ("rows", "rejected", "errors", "left_out", "foreign_cores")}
    result |= {"served_by": {}, "bfloat16_over_float32": {}}
    with _foreign_load(result):
        try:
            result["copy_gb_per_s"] = copy_gb_per_s(device)
        except Exception as error:
            result["errors"].append({"case": "copy", "error": results.reason(error)})
    return result


@contextlib.contextmanager
def _foreign_load(result: dict[str, Any]) -> Iterator[None]:
    """Record how many cores others kept busy within."""
    meter = LoadMeter()
    yield
    result["foreign_cores"].append(meter.foreign_cores())


def _save(result: dict[str, Any], path: Path) -> Path:
    result["goals"] = goals.judged("op", result)
    return results.write(result, path)


def _add(
    result: dict[str, Any], case: Case, contenders: dict[str, Formulation], seconds: float, clock: Clock
) -> dict[str, Formulation]:
    """Measure one case into the result; the contenders that passed."""
    one = problem(case._replace(N=1))  # the batch size never changes the choice
    result["served_by"][case.name] = rk.explain(one.features, one.weight, one.targets).backend
    clock.release()
    data = problem(case)
    errors, refused = baselines.prove(data, contenders)
    result["rejected"] += [{"case": case.name, **r} for r in refused]
    passed = {name: contenders[name] for name in errors}
    timed = call_by_call if result["kind"] == "cpu" else in_graphs
    with _foreign_load(result):
        rows = timed(case, data, passed, seconds, clock)
    for row in rows:
        row["error"] = errors[row["contender"]]
        print(f"  {row['contender']:<22} {goals.median_ms(row) or math.nan:9.4f} ms", flush=True)
    _compare(rows, case, result["copy_gb_per_s"])
    result["rows"] += rows
    return passed


def _compare(rows: list[Row], case: Case, copy: float | None) -> None:
    """Add what follows from the times: ``gb_per_s`` is that of the floor 4s, the same bytes for every contender."""
    identity = goals.median_ms(next((row for row in rows if row["contender"] == "identity"), None))
    for row in rows:
        ms = goals.median_ms(row)
        row["ratio_to_identity"] = ms / identity if ms and identity else None
        row["gb_per_s"] = case.floor_bytes / ms / 1e6 if ms else None
        row["share_of_copy"] = row["gb_per_s"] / copy if ms and copy else None


def call_by_call(case: Case, data: Problem, passed: dict[str, Formulation], seconds: float, clock: Clock) -> list[Row]:
    """A row for each contender on a CPU: [lower quartile, median, upper quartile] in ms of each phase, and bytes."""
    runs = {name: functools.partial(measure.once, formulation, data) for name, formulation in passed.items()}
    rows = []
    for name, times in measure.phases_ms(clock, runs, seconds).items():
        moved = None if name.endswith("compiled") else measure.bytes_moved(passed[name], data)
        rows.append(
            {
                "case": case.name,
                "contender": name,
                **times,
                "bytes_moved": moved,
                "bytes_over_floor": None if moved is None else moved / case.floor_bytes,
                "peak_extra_bytes": clock.peak_bytes(runs[name]),
            }
        )
    return rows


def in_graphs(case: Case, data: Problem, passed: dict[str, Formulation], seconds: float, clock: Clock) -> list[Row]:
    """A row for each contender on a GPU; what could not be measured is None, with the reason in ``errors``."""
    problems = rotated(data, clock.l2_bytes())
    repetitions = len(problems) * math.ceil(REPETITIONS / len(problems))  # each as often as the others
    rotations = {name: Rotation(formulation, problems) for name, formulation in passed.items()}
    eager = measure.phases_ms(clock, {name: rotation.both for name, rotation in rotations.items()}, seconds / 3)
    rows = []
    for name, rotation in rotations.items():
        row: Row = {"case": case.name, "group": case.group, "contender": name, "eager": eager[name], "errors": {}}
        row |= {"buffers": len(problems), "repetitions": repetitions, "launches": None}
        _try(row, "host_ms", functools.partial(measure.host_ms, clock, rotation.both))
        rotation.clear()
        _try(row, "peak_extra_bytes", functools.partial(clock.peak_bytes, rotation.both))
        rotation.clear()
        rows.append(row)
    clock.release()
    for phase in ("forward", "both"):
        runs = {name: getattr(rotation, phase) for name, rotation in rotations.items()}
        timed, failures = measure.graph_ms(clock, runs, repetitions, seconds / 3)
        for row in rows:
            row[phase] = timed.get(row["contender"])
            if row["contender"] in failures:
                row["errors"][phase] = failures[row["contender"]]
        for rotation in rotations.values():
            rotation.clear()
        clock.release()
    return rows


def count_launches(case: Case, passed: dict[str, Formulation], rows: list[Row], clock: Clock) -> None:
    """Add ``kernels``, what is launched for a forward and a backward, to our rows of a case, and how many."""
    for row in rows:
        if row["contender"] == "ours" or row["contender"] in BACKENDS:
            _try(row, "kernels", functools.partial(_kernels, passed[row["contender"]], case, clock))
            row["launches"] = None if row["kernels"] is None else len(row["kernels"])


def _kernels(formulation: Formulation, case: Case, clock: Clock) -> list[str]:
    return [name[:100] for name in clock.launches(Rotation(formulation, [problem(case)]).both)]


def _try(row: Row, key: str, figure: Callable[[], object]) -> None:
    """Set the row's figure, or None with the reason in the row's ``errors``."""
    row[key] = None
    try:
        row[key] = figure()
    except Exception as error:
        row["errors"][key] = results.reason(error)


def bfloat16_over_float32(cases: Sequence[Case], seconds: float, clock: Clock) -> dict[str, float]:
    """Time of ours in bfloat16 over that in float32, by the float32 case, where both are among the cases.

    The two take turns in a run of their own: in their cases' runs each has other neighbours, and so other pages.
    """
    ratios = {}
    for case in cases:
        half = case._replace(dtype=torch.bfloat16)
        if case.dtype == torch.float32 and half in cases:
            runs = {c.name: functools.partial(measure.once, baselines.ours, problem(c)) for c in (case, half)}
            times = measure.phases_ms(clock, runs, seconds)
            ratios[case.name] = times[half.name]["both"][1] / times[case.name]["both"][1]
    return ratios
