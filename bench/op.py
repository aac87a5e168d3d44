"""The head's loss alone: prove every contender, time those that passed, judge the goals, write one JSON file."""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

import rebalfer_kernels as rk

from . import baselines, timing
from .cases import Case, problem

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
#: Cores that others may keep busy before a time is no longer worth reporting.
FOREIGN_LIMIT = 0.1

#: (goal, its contender, the bound on time / ours; "at most" bounds ours / time). DESIGN: CPU, float32, both passes.
GOALS = (
    ("time against the identity op", "identity", "at most", 1.3),
    ("speed-up over plain eager, compiled", "plain eager, compiled", "at least", 2.5),
    ("speed-up over best eager, compiled", "best eager, compiled", "at least", 1.2),
    ("speed-up over the released formulation", "released", "at least", 12.0),
)
BEST_GEOMETRIC_MEAN = 1.5


def run(cases: Sequence[Case], seconds: float, memory: str) -> dict:
    """Measure the cases, ``seconds`` of timing each; everything a result file holds.

    ``memory`` says how malloc was set when the process began (``bench.__main__``) and is only written down.
    """
    meter = timing.LoadMeter()
    copy = timing.copy_gb_per_s()
    disturbed = [meter.foreign_cores()]
    result = {**environment(), "memory": memory, "copy_gb_per_s": copy, "rows": [], "rejected": []}
    for case in cases:
        print(f"{case.name}: proving and compiling", flush=True)
        passed, rejected = prove(case, baselines.contenders())
        result["rejected"] += rejected
        meter = timing.LoadMeter()
        rows = measure(case, passed, seconds, copy)
        disturbed.append(meter.foreign_cores())
        result["rows"] += rows
        for row in rows:
            print(f"  {row['contender']:<22}" + "".join(f" {p} {row[p][1]:9.3f} ms" for p in timing.PHASES), flush=True)
        print(f"  others kept {disturbed[-1]:.2f} cores busy")
    meter = timing.LoadMeter()
    result["bfloat16_over_float32"] = bfloat16_over_float32(cases, seconds)
    disturbed.append(meter.foreign_cores())
    result["foreign_cores"] = disturbed  # while copying, then for each case, then for the dtypes side by side
    result["quiet"] = max(disturbed) <= FOREIGN_LIMIT
    result["goals"] = goals(result["rows"], result["bfloat16_over_float32"])
    return result


def prove(case: Case, contenders: dict) -> tuple[dict, list[dict]]:
    """The contenders whose loss and gradients are float64's, name -> (formulation, error), and those refused."""
    data, passed, rejected, expected = problem(case), {}, [], {}
    for name, formulation in contenders.items():
        kind = "identity" if name == "identity" else "head"
        if kind not in expected:
            expected[kind] = baselines.truth(kind, data)
        error, reason = math.inf, None
        try:
            error = baselines.worst_error(formulation, data, expected[kind])
        except Exception as failure:  # it cannot be compiled here, say; the others can still be measured
            reason = f"{type(failure).__name__}: {failure}"[:300]
        if error <= baselines.TOLERANCE[case.dtype]:
            passed[name] = (formulation, error)
        else:
            known = error if math.isfinite(error) else None
            rejected.append({"case": case.name, "contender": name, "error": known, "reason": reason})
            print(f"  {name}: refused, {reason or f'relative error {error:.2g}'}", flush=True)
    return passed, rejected


def measure(case: Case, passed: dict, seconds: float, copy_gb_per_s: float) -> list[dict]:
    """A row for each contender: [lower quartile, median, upper quartile] in ms of each phase, and what follows.

    ``gb_per_s`` is that of the floor 4s, the same bytes for each, over the median of both passes.
    """
    data, rows = problem(case), []
    samples = timing.interleave(
        {name: lambda f=f: timing.once(f, data) for name, (f, _) in passed.items()}, seconds
    )  # fmt: skip
    times = {name: timing.quartiles_ms(s) for name, s in samples.items()}
    for name, (formulation, error) in passed.items():
        both = times[name]["both"][1]
        moved = None if name.endswith("compiled") else timing.bytes_moved(formulation, data)
        rows.append(
            {
                "case": case.name,
                "contender": name,
                "error": error,
                "rounds": len(samples[name]),
                **times[name],
                "ratio_to_identity": both / times["identity"]["both"][1] if "identity" in times else None,
                "bytes_moved": moved,
                "bytes_over_floor": None if moved is None else moved / case.floor_bytes,
                "peak_extra_bytes": timing.peak_bytes(formulation, data),
                "gb_per_s": case.floor_bytes / both / 1e6,
                "share_of_copy": case.floor_bytes / both / 1e6 / copy_gb_per_s,
            }
        )
    return rows


def bfloat16_over_float32(cases: Sequence[Case], seconds: float) -> dict[str, float]:
    """Time of ours in bfloat16 over that in float32, by the float32 case, where both are among the cases.

    The two take turns in one run: in those of their cases they have other neighbours, and so other pages.
    """
    ratios = {}
    for case in cases:
        half = case._replace(dtype=torch.bfloat16)
        if case.dtype == torch.float32 and half in cases:
            runs = {c.name: functools.partial(timing.once, baselines.ours, problem(c)) for c in (case, half)}
            both = {name: timing.quartiles_ms(s)["both"][1] for name, s in timing.interleave(runs, seconds).items()}
            ratios[case.name] = both[half.name] / both[case.name]
    return ratios


def goals(rows: Sequence[dict], bfloat16_over_float32: dict[str, float]) -> list[dict]:
    """Each goal with the worst case's figure, every case's, and whether it is met; a missing row is not."""
    both = {(row["case"], row["contender"]): row["both"][1] for row in rows}
    names = list(dict.fromkeys(row["case"] for row in rows))
    float32 = [name for name in names if name.endswith("float32")]

    def ratios(numerator: tuple[str, str], denominator: tuple[str, str]) -> float | None:
        return both[numerator] / both[denominator] if {numerator, denominator} <= both.keys() else None

    judged = []
    for goal, contender, sense, bound in GOALS:
        cases = {}
        for name in float32:
            pair = ((name, "ours"), (name, contender))
            cases[name] = ratios(*pair) if sense == "at most" else ratios(*reversed(pair))
        judged.append(judge(goal, sense, bound, cases))
        if contender == "best eager, compiled":
            known = [r for r in cases.values() if r is not None]
            mean = statistics.geometric_mean(known) if known and len(known) == len(cases) else None
            judged.append(judge(f"{goal}, geometric mean", sense, BEST_GEOMETRIC_MEAN, {"all": mean}))
    halves = dict[str, float | None](bfloat16_over_float32)
    return [*judged, judge("time of bfloat16 against float32, by turns", "at most", 1.0, halves)]


def judge(goal: str, sense: str, bound: float, cases: dict[str, float | None]) -> dict:
    """A goal with the worst of the cases' figures; a figure that is missing, or all of them, and it is not met."""
    figure = None
    if cases and None not in cases.values():
        figure = max(cases.values()) if sense == "at most" else min(cases.values())
    met = figure is not None and (figure <= bound if sense == "at most" else figure >= bound)
    return {"goal": goal, "sense": sense, "bound": bound, "figure": figure, "met": met, "cases": cases}


def environment() -> dict:
    """Where and on what this runs: what a reader needs to repeat it."""
    with open("/proc/cpuinfo") as file:
        model = re.search(r"^model name\s*: (.*)$", file.read(), re.M)
    settings = ("OMP_", "KMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "REBALFER_")
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "kind": "cpu",
        "device": model[1] if model else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(settings)},
        "transparent_hugepage": pages.read_text().strip() if pages.exists() else None,
        "load_average": os.getloadavg(),
        "backends": rk.backends(),
        **version(),
    }


def version() -> dict:
    """The commit (from REBALFER_COMMIT where the folder is no checkout), whether files differ from it, the date."""
    changed = _git("status", "--porcelain", "--", "rebalfer_kernels", "csrc", "trainer", "bench/*.py")
    return {
        "commit": _git("rev-parse", "HEAD") or os.environ.get("REBALFER_COMMIT"),
        "dirty": None if changed is None else bool(changed),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(result: dict, directory: Path) -> Path:
    """Write ``op-<device>-<memory>.json`` whole or not at all; its path."""
    return write_json(result, directory / f"op-{slug(result['device'], result['memory'])}.json")


def slug(*words: str) -> str:
    """Words for a file's name.

    >>> slug("NVIDIA H200 (SXM)", "fresh")
    'nvidia-h200-sxm-fresh'
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


def write_json(result: dict, path: Path) -> Path:
    """Write a result whole or not at all; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)
    return path
