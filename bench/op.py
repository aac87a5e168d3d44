"""The head's loss by itself: prove every contender, time those that passed, judge the goals, write one JSON file.

A CPU's row holds ms of ``forward``, ``backward`` and ``both``, call by call, and as ``host_ms`` what the same call
costs with next to nothing to compute. In a GPU's row ``forward`` and ``both`` are ms per call of a CUDA graph of at
least 20 over rotated buffers; ``eager`` is between events around calls launched one by one from Python, so at small
sizes it is the host's time, of which ``host_ms`` is that for a launch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rebalfer_kernels import dispatch
from rebalfer_kernels.backend import BACKENDS
from rebalfer_kernels.doctor.environment import copy_gb_per_s

from . import baselines, goals, measure, proof, results, sm_clock
from .baselines import Formulation
from .cases import Case, Problem, problem, rotated
from .clocks import Clock
from .measure import FOREIGN_LIMIT, LoadMeter, Rotation

#: Of timing the fixed cost of a call, for each case of a CPU.
FIXED_SECONDS = 1.0
#: Calls captured in one graph, at least.
REPETITIONS = 20
#: Calls under the profiler for the durations of kernels, and the share of a GPU's time that is kept for them.
PROFILED, KERNELS_SHARE = 6, 0.2

Row = dict[str, Any]
Say = Callable[[str, str, str], None]


def contenders(
    kind: str, case: Case, chosen: Sequence[str] | None = None, more: bool = False
) -> dict[str, Formulation]:
    """Every formulation, both eager ones compiled too, and on a GPU ours on each backend available there.

    Or those that are ``chosen``: nothing of the others is then run. ``more``: as in baselines.

    Raises:
        ValueError: one of those is not known, or is a backend that is not available.
    """
    known = baselines.OPERATIONS[case.op]  # in a rehearsal, where compiling would be most of it
    if kind != "rehearsal":
        known = baselines.contenders(case, more)
    if kind == "cuda":
        backends = [name for name in baselines.fused_backends("cuda") if chosen is None or name in chosen]
        known = {**known, **baselines.on_each_backend(backends, case.op)}
    if chosen is None:
        return known
    if unknown := [name for name in chosen if name not in known]:
        why = [f"{name} is not available: {BACKENDS[name].available().reason}" for name in unknown if name in BACKENDS]
        got = "; ".join(why) or ", ".join(unknown)
        raise ValueError(f"contenders: got {got}, expected some of {', '.join(known)}")
    return {name: known[name] for name in chosen}


def run(
    cases: Sequence[Case],
    seconds: float,
    limit: float,
    directory: Path,
    *,
    kind: str,
    clock: Clock,
    contenders: Callable[[str, Case], dict[str, Formulation]] = contenders,
    memory: str | None = None,
    chosen: Sequence[str] | None = None,
    of: str = "short",
    resume: bool = False,
    say: Say = lambda case, state, text: None,
) -> tuple[dict[str, Any], Path]:
    """Measure the cases, ``seconds`` of timing each, until ``limit`` seconds are over; the result and its file.

    The file is written after every case. A case that fails is recorded and the next one tried; one that would not
    end in time, by the longest so far, is left out and named. ``kind`` is "cpu", "cuda" or "rehearsal", a GPU's
    program on a CPU. Only written down: ``memory``, how malloc was set when the process began; ``chosen``, the
    contenders; ``of``, the set of cases. ``resume`` adds to the file of an earlier process of the same run. ``say``
    hears of each case that it has "begun", then that it has "passed" or "failed", and why; or that it is "not run" for
    want of time.
    """
    end, longest = time.monotonic() + limit, 0.0
    last = end if kind == "cpu" else end - KERNELS_SHARE * limit  # to begin a case
    found = {**results.environment(kind), "memory": memory, "chosen": chosen, "set": of}
    path = directory / results.file_name("op", found)
    result = _earlier(path) if resume and path.exists() else _begin(found, cases[0].device, clock)
    proven: dict[Case, dict[str, Formulation]] = {}
    for i, case in enumerate(cases):
        start = time.monotonic()
        if start + longest > last:
            result["left_out"].append(case.name)
            say(case.name, "not run", "no time left")
            continue
        print(f"{case.name}: proving and compiling", flush=True)
        say(case.name, "begun", "")
        failure = ""
        try:
            proven[case] = _add(result, case, contenders(kind, case), seconds, clock)
            clock.wait()  # what a refused contender did to the device shows here, if not before
            failure = _shortcomings(result, case)
        except Exception as error:
            failure = results.reason(error)
            result["errors"].append({"case": case.name, "error": failure})
            print(f"  failed: {failure}", flush=True)
            if isinstance(error, torch.AcceleratorError):  # the device cannot be used again by this process
                result["left_out"] += [later.name for later in cases[i + 1 :]]
                say(case.name, "failed", failure)
                break
        if i:  # the first compiles what the others only load
            longest = max(longest, time.monotonic() - start)
        _save(result, path)
        say(case.name, "failed" if failure else "passed", failure)
    else:
        if kind == "cpu":
            with _foreign_load(result):
                result["bfloat16_over_float32"] = bfloat16_over_float32(cases, seconds, clock)
                result["fixed_cost"] = fixed_cost(cases, seconds, clock)
        else:  # last, as the profiler stays attached to the process
            for case, passed in proven.items():
                if time.monotonic() < end:
                    count_launches(case, passed, [r for r in result["rows"] if r["case"] == case.name], clock)
    result["quiet"] = max(result["foreign_cores"]) <= FOREIGN_LIMIT
    return result, _save(result, path)


def _earlier(path: Path) -> dict[str, Any]:
    """The result that a process before this one left."""
    return {**json.loads(path.read_text()), "left_out": []}


def _begin(found: dict[str, Any], device: str, clock: Clock) -> dict[str, Any]:
    """A result without rows."""
    print({key: value for key, value in found.items() if key != "backends"})
    result = {**found, "l2_bytes": clock.l2_bytes(), "copy_gb_per_s": None, "quiet": False}
    result |= {name: [] for name in ("rows", "rejected", "errors", "left_out", "foreign_cores")}
    result |= {"served_by": {}, "bfloat16_over_float32": {}, "fixed_cost": {}, "sm_mhz": {}}
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
    result["served_by"][case.name] = served_by(problem(case._replace(N=1)))  # the batch size never changes the choice
    clock.release()
    data = problem(case)
    errors, refused = proof.prove(data, contenders)
    result["rejected"] += [{"case": case.name, **r} for r in refused]
    passed = {name: contenders[name] for name in errors}
    timed = call_by_call if result["kind"] == "cpu" else in_graphs
    on_gpu = sm_clock.sampled() if result["kind"] == "cuda" else contextlib.nullcontext(lambda: None)
    with _foreign_load(result), on_gpu as sm_mhz:
        rows = timed(case, data, passed, seconds, clock)
        result["sm_mhz"][case.name] = sm_mhz()
    for row in rows:
        row["error"] = errors[row["contender"]]
        print(f"  {row['contender']:<22} {goals.median_ms(row) or math.nan:9.4f} ms", flush=True)
    _compare(rows, case, result["copy_gb_per_s"])
    result["rows"] += rows
    return passed


def served_by(x: Problem) -> str:
    """The backend that the library chooses."""
    if x.op == "cross_entropy":
        return dispatch.choose(dispatch.request_of_rows(x.features), None)
    if x.op == "views":
        return dispatch.choose(dispatch.request_of_views(x.features, x.dtype), None)
    return dispatch.choose(dispatch.request("cam" if x.op == "maps" else "head", x.features, x.weight), None)


def _shortcomings(result: dict[str, Any], case: Case) -> str:
    """Which contenders of a case were refused, or not timed in full, and why."""
    why = []
    for refused in (r for r in result["rejected"] if r["case"] == case.name):
        why.append(f"{refused['contender']} was refused: {results.reason_of(refused)}")
    for row in (row for row in result["rows"] if row["case"] == case.name):
        why += [f"{row['contender']}, {figure}: {reason}" for figure, reason in row.get("errors", {}).items()]
    return "; ".join(why)


def _compare(rows: list[Row], case: Case, copy: float | None) -> None:
    """Add what follows from the times: ``gb_per_s`` is that of the floor 4s, the same bytes for every contender."""
    identity = goals.median_ms(next((row for row in rows if row["contender"] == "identity"), None))
    for row in rows:
        ms = goals.median_ms(row)
        row["ratio_to_identity"] = ms / identity if ms and identity else None
        row["gb_per_s"] = case.floor_bytes / ms / 1e6 if ms else None
        row["share_of_copy"] = row["gb_per_s"] / copy if ms and copy else None


def call_by_call(case: Case, data: Problem, passed: dict[str, Formulation], seconds: float, clock: Clock) -> list[Row]:
    """A row for each contender on a CPU: [lower quartile, median, upper quartile] in ms of each phase, and bytes.

    ``far_caches`` is the share of the rounds in which the threads' cores had no cache in common.
    """
    runs = _runs(passed, data)
    tiny = {name: f for name, f in passed.items() if not is_compiled(name)}  # or it would compile for sizes in general
    fixed = measure.phases_ms(clock, _runs(tiny, problem(case.smallest)), min(seconds, FIXED_SECONDS))
    rows, far = [], measure.FarCaches()
    for name, times in measure.phases_ms(clock, runs, seconds, far.sample).items():
        moved = None if is_compiled(name) else measure.bytes_moved(passed[name], data)
        if not data.leaves:
            times["backward"] = None
        rows.append(
            {
                "case": case.name,
                "group": case.group,
                "contender": name,
                **times,
                "host_ms": fixed[name]["both"][1] if name in fixed else None,
                "far_caches": far.share(),
                "bytes_moved": moved,
                "bytes_over_floor": None if moved is None else moved / case.floor_bytes,
                "peak_extra_bytes": clock.peak_bytes(runs[name]),
            }
        )
    return rows


def is_compiled(name: str) -> bool:
    return name.endswith(("compiled", "max-autotune"))


def _runs(formulations: dict[str, Formulation], data: Problem) -> dict[str, Callable[..., None]]:
    return {n: functools.partial(measure.once, f, data, leaves=data.leaves) for n, f in formulations.items()}


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
    """Add ``kernels``, the name and µs of what is launched for a forward and a backward, to our rows, and how many."""
    for row in rows:
        if row["contender"] == "ours" or row["contender"] in BACKENDS:
            _try(row, "kernels", functools.partial(_kernels, passed[row["contender"]], case, clock))
            row["launches"] = None if row["kernels"] is None else len(row["kernels"])


def _kernels(formulation: Formulation, case: Case, clock: Clock) -> list[dict[str, Any]]:
    """Of the calls after the first, with inputs that are not in the L2 cache, the median duration of each launch."""
    rotation = Rotation(formulation, rotated(problem(case), clock.l2_bytes()))
    calls = [clock.launches(rotation.both) for _ in range(PROFILED)][1:]
    if any(len(call) != len(calls[0]) for call in calls):
        raise RuntimeError(f"the calls differ in their number of launches: {[len(call) for call in calls]}")
    return [
        {"name": turns[0].name[:100], "us": statistics.median(launch.us for launch in turns)}
        for turns in zip(*calls, strict=True)
    ]


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
        if case.dtype == torch.float32 and half in cases and case.name.endswith("float32"):
            runs = {c.name: _runs({"": baselines.ours}, problem(c))[""] for c in (case, half)}
            times = measure.phases_ms(clock, runs, seconds)
            ratios[case.name] = times[half.name]["both"][1] / times[case.name]["both"][1]
    return ratios


def fixed_cost(cases: Sequence[Case], seconds: float, clock: Clock) -> dict[str, dict[str, float]]:
    """Time of ours over that of the identity op in a smallest call, by its case, of the forward and of the backward.

    The two take turns in a run of their own: between more programs, each finds less of itself in the caches.
    """
    contenders: dict[str, Formulation] = {"ours": baselines.ours, "identity": baselines.identity}
    ratios = {}
    for case in cases:
        if case.group == "fixed cost":
            times = measure.phases_ms(clock, _runs(contenders, problem(case)), seconds)
            ours, identity = (times[name] for name in contenders)
            ratios[case.name] = {phase: ours[phase][1] / identity[phase][1] for phase in ("forward", "backward")}
    return ratios
