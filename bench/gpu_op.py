"""The head's loss alone on a GPU: prove every contender, time those that passed, judge the goals, one JSON file.

A row's ``forward`` and ``both`` are from a CUDA graph of at least 20 calls over rotated buffers, ms per call;
``eager`` is between events around calls launched one by one from Python, so at small sizes it is the host's time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import rebalfer_kernels as rk
from rebalfer_kernels import doctor

from . import baselines, gpu_timing
from .cases import Case, problem
from .gpu_goals import goals
from .gpu_timing import Clock, Rotation
from .op import prove, slug, version, write_json

GPU_BACKENDS = ("triton", "cuda")


def contenders() -> dict:
    """Every formulation, both eager ones compiled, and ours on each GPU backend that is there."""
    return {**baselines.contenders(), **baselines.forced(GPU_BACKENDS)}


def run(
    cases: Sequence[Case],
    seconds: float,
    limit: float,
    directory: Path,
    *,
    clock: Clock,
    contenders: Callable[[], dict] = contenders,
    kind: str = "cuda",
) -> tuple[dict, Path]:
    """Measure the cases, ``seconds`` of timing each, until ``limit`` seconds are over; the result and its file.

    The file is written after every case. A case that fails is recorded and the next one tried; one that would not
    end in time, by the longest so far, is left out and named.
    """
    end = time.monotonic() + limit
    device = cases[0].device
    result = {
        **environment(kind), "l2_bytes": clock.l2_bytes(), "copy_gb_per_s": None, "served_by": {}, "rows": [],
        "rejected": [], "errors": [], "left_out": [], "goals": goals([]),
    }  # fmt: skip
    path = directory / f"op-{slug(kind, result['device'])}.json"
    try:
        elements = 2**28 if device == "cuda" else 2**22  # 1 GiB
        result["copy_gb_per_s"] = gpu_timing.copy_gb_per_s(clock, device, elements, min(1.0, seconds))
    except Exception as error:
        result["errors"].append({"case": "copy", "error": _short(error)})
    longest = 0.0
    proven: dict[Case, dict] = {}  # case -> contender -> it and its error
    for case in cases:
        start = time.monotonic()
        if start + longest > end:
            result["left_out"].append(case.name)
            continue
        print(case.name, flush=True)
        try:
            one = problem(case._replace(N=1))  # the batch size never changes the choice
            result["served_by"][case.name] = rk.explain(one.features, one.weight, one.targets).backend
            clock.release()
            proven[case], rejected = prove(case, contenders())
            result["rejected"] += rejected
            rows = measure(case, proven[case], seconds, result["copy_gb_per_s"], clock)
            result["rows"] += rows
            for row in rows:
                both, eager = (1e3 * x[1] if x else float("nan") for x in (row["both"], row["eager"]["both"]))
                print(f"  {row['contender']:<22} graph {both:9.2f} us   eager {eager:9.2f} us", flush=True)
        except Exception as error:
            result["errors"].append({"case": case.name, "error": _short(error)})
            print(f"  failed: {_short(error)}", flush=True)
            if isinstance(error, torch.AcceleratorError):  # of no use any more to this process
                result["left_out"] += [later.name for later in cases[cases.index(case) + 1 :]]
                break
        longest = max(longest, time.monotonic() - start)
        result["goals"] = goals(result["rows"])
        write_json(result, path)
    else:  # last, as the profiler stays attached to the process
        for case, passed in proven.items():
            if time.monotonic() < end:
                count_launches(case, passed, [r for r in result["rows"] if r["case"] == case.name], clock)
    result["goals"] = goals(result["rows"])
    return result, write_json(result, path)


def count_launches(case: Case, passed: dict, rows: list[dict], clock: Clock) -> None:
    """Add ``kernels``, what is launched for a forward and a backward, to our rows of a case, and how many."""

    def kernels(formulation: baselines.Formulation) -> list[str]:
        return [name[:100] for name in clock.launches(Rotation(formulation, [problem(case)]).both)]

    for row in rows:
        if row["contender"] in ("ours", *GPU_BACKENDS):
            row["kernels"] = _try(row, "kernels", lambda r=row: kernels(passed[r["contender"]][0]))
            row["launches"] = None if row["kernels"] is None else len(row["kernels"])


def measure(case: Case, passed: dict, seconds: float, copy_gb_per_s: float | None, clock: Clock) -> list[dict]:
    """A row for each contender; what could not be measured is None, with the reason in ``errors``."""
    problems = gpu_timing.rotated(problem(case), clock.l2_bytes())
    repetitions = len(problems) * math.ceil(gpu_timing.REPETITIONS / len(problems))  # each as often as the others
    rotations = {name: Rotation(formulation, problems) for name, (formulation, _) in passed.items()}
    eager = gpu_timing.eager_ms(clock, rotations, seconds / 3)
    rows = []
    for name, rotation in rotations.items():
        row = {
            "case": case.name, "group": case.group, "contender": name, "error": passed[name][1], "eager": eager[name],
            "buffers": len(problems), "repetitions": repetitions, "launches": None, "errors": {},
        }  # fmt: skip
        row["host_ms"] = _try(row, "host_ms", lambda r=rotation: gpu_timing.host_ms(clock, r.both))
        rotation.clear()
        row["peak_extra_bytes"] = _try(row, "peak_extra_bytes", lambda r=rotation: clock.peak_bytes(r.both))
        rotation.clear()
        rows.append(row)
    clock.release()
    for phase in ("forward", "both"):
        runs = {name: getattr(rotation, phase) for name, rotation in rotations.items()}
        timed = gpu_timing.graph_ms(clock, runs, repetitions, seconds / 3)
        for row in rows:
            value = timed[row["contender"]]
            row[phase] = None if isinstance(value, dict) else value
            if isinstance(value, dict):
                row["errors"][phase] = value["error"]
        for rotation in rotations.values():
            rotation.clear()
        clock.release()
    identity = next((row["both"] for row in rows if row["contender"] == "identity"), None)
    for row in rows:
        both = row["both"]
        row["ratio_to_identity"] = both[1] / identity[1] if both and identity else None
        row["gb_per_s"] = case.floor_bytes / both[1] / 1e6 if both else None
        row["share_of_copy"] = row["gb_per_s"] / copy_gb_per_s if both and copy_gb_per_s else None
    return rows


def _try(row: dict, key: str, measure: Callable):
    try:
        return measure()
    except Exception as error:
        row["errors"][key] = _short(error)
        return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def environment(kind: str) -> dict:
    """Where and on what this runs: the GPU as ``device``, what the doctor finds out, backends and commit."""
    found = doctor.environment()
    device = torch.cuda.get_device_name() if kind == "cuda" else found["cpu"] or "cpu"
    return {"kind": kind, "device": device, **found, "backends": rk.backends(), **version()}
