"""The README's benchmark sections, of the CPU and of GPUs, generated from the newest result files."""

from __future__ import annotations

import json
from pathlib import Path

from .op import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLUMNS = ("identity", "plain eager, compiled", "best eager, compiled", "released")
MEMORY = {
    "fresh": "Fresh memory: every large tensor gets pages from the system and gives them back",
    "reused": "Reused memory: nothing is given back, so that pages are rarely touched for the first time",
}
GPU_COLUMNS = ("triton", "cuda", *COLUMNS)
INTRODUCTION = """## Benchmark

Milliseconds for forward and backward with a fresh gradient, median of interleaved rounds, and in brackets the time
relative to ours; 7 × 7 maps, 7 classes. The identity op sums the features and writes a constant gradient: the same
reads and writes, no computation. Each contender was first shown to equal float64, loss and gradients. glibc alone
moves between the two ways to get memory by what was freed before; `python -m bench --help` says more. A virtual machine
that hands idle memory back to its host makes fresh pages, huge ones above all, dear after a second's pause: rows with
slow neighbours show it. The goal on bfloat16 is judged by ours in both dtypes taking turns."""


GPU_INTRODUCTION = """## Benchmark on a GPU

Microseconds for forward and backward, per call of a CUDA graph that holds 20 or more over inputs and gradients rotated
beyond three times the L2 cache, median of interleaved replays, and in brackets the time relative to ours (the backend
the library chooses); 7 × 7 maps, 7 classes. Each contender was first shown to equal float64, loss and gradients."""

NO_GPU = """## Benchmark on a GPU

The kernels, tests and benchmarks for GPUs are not yet run on a GPU: `python -m bench gpu-check --out bench/results/gpu`
runs all of them within 8 minutes."""


def newest(directory: Path = RESULTS) -> list[dict]:
    """For each kind of memory the latest result that nothing disturbed."""
    quiet = [r for r in _read(directory, "op", "cpu") if r["quiet"]]
    latest = {r["memory"]: r for r in quiet}
    return [latest[memory] for memory in sorted(latest)]


def newest_gpu(directory: Path = RESULTS) -> list[tuple[dict, dict | None]]:
    """For each GPU the latest result of the loss alone, and that of the training step if there is one."""
    steps = {r["device"]: r for r in _read(directory, "step", "cuda")}
    return [(op, steps.get(device)) for device, op in {r["device"]: r for r in _read(directory, "op", "cuda")}.items()]


def _read(directory: Path, name: str, kind: str) -> list[dict]:
    """The results of a kind, also in folders below (``gpu-check --out`` makes one), in the order of their dates."""
    results = [json.loads(path.read_text()) for path in directory.rglob(f"{name}-*.json")]
    return sorted((r for r in results if r["kind"] == kind), key=lambda r: r["date"])


def render(results: list[dict], gpus: list[tuple[dict, dict | None]]) -> str:
    """Markdown: what the figures are; of each result where it was measured, a row per case and a row per goal."""
    cpu = "## Benchmark\n\n`python -m bench op` measures; no result is committed yet."
    if results:
        cpu = "\n\n".join([INTRODUCTION, *map(_tables, results)])
    gpu = NO_GPU
    if gpus:
        gpu = "\n\n".join([GPU_INTRODUCTION, *(_gpu_tables(op, step) for op, step in gpus)])
    return f"{cpu}\n\n{gpu}"


def _commit(result: dict) -> str:
    return (result["commit"] or "unknown")[:9] + (" with local changes" if result["dirty"] else "")


def _gpu_tables(result: dict, step: dict | None) -> str:
    copy = result["copy_gb_per_s"]
    lines = [
        f"### {result['device']}",
        "",
        f"Driver {result['driver']}, CUDA {result['cuda']}, torch {result['torch']}, Triton {result['triton']}, "
        f"{result['date'][:10]}, commit {_commit(result)}, copy bandwidth "
        + ("not measured." if copy is None else f"{copy:.0f} GB/s."),
        "",
        "| case | ours | " + " | ".join(GPU_COLUMNS) + " |",
        "|---" * (2 + len(GPU_COLUMNS)) + "|",
    ]
    rows = {(row["case"], row["contender"]): row for row in result["rows"]}
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    for case in cases:
        us = {name: _us(rows.get((case, name))) for name in ("ours", *GPU_COLUMNS)}
        cells = [_time(us[name], us["ours"], "-") for name in GPU_COLUMNS]
        served = f" ({result['served_by'][case]})" if us["ours"] is not None else ""
        lines.append(f"| {case} | {_time(us['ours'], None, '-')}{served} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Ours alone: launched from Python call by call (µs), the host's part of it, launches, memory beyond the "
        "inputs, and the bytes that must move (4s) over the time in the graph.",
        "",
        "| case | call by call | host | launches | MB | GB/s | share of copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        row = rows.get((case, "ours"))
        if row:
            figures = (
                (row["eager"]["both"][1], 1e3, ".1f"), (row["host_ms"], 1e3, ".1f"), (row["launches"], 1, "d"),
                (row["peak_extra_bytes"], 1e-6, ".1f"), (row["gb_per_s"], 1, ".0f"), (row["share_of_copy"], 1, ".0%"),
            )  # fmt: skip
            cells = ["-" if x is None else format(x * scale, style) for x, scale, style in figures]
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
    if result["left_out"]:
        lines += ["", f"Left out for want of time: {', '.join(result['left_out'])}."]
    goals = list(result["goals"])
    if step:
        config = step["config"]
        lines += [
            "",
            f"A training step, {config['backbone']} at {config['image_size']} pixels, N = {config['batch_size']}, "
            f"both views, {config['amp']} autocast ({step['date'][:10]}, commit {_commit(step)}):",
            "",
            "| head | ms a step | images/s |",
            "|---|---|---|",
        ]
        lines += [f"| {r['contender']} | {r['ms'][1]:.2f} | {r['images_per_s']:.0f} |" for r in step["rows"]]
        goals += step["goals"]
    lines += ["", "| goal | bound | worst case | met |", "|---|---|---|---|"]
    for goal in goals:
        figure = "not measured" if goal["figure"] is None else f"{goal['figure']:.2f}{goal['unit']}"
        met = "yes" if goal["met"] else "**no**"
        lines.append(f"| {goal['goal']} | {goal['sense']} {goal['bound']:g}{goal['unit']} | {figure} | {met} |")
    return "\n".join(lines)


def _us(row: dict | None) -> float | None:
    return None if row is None or row["both"] is None else 1e3 * row["both"][1]


def _tables(result: dict) -> str:
    lines = [
        f"### {MEMORY[result['memory']]}",
        "",
        f"{result['device']} ({result['capability']}), {result['threads']} threads, torch {result['torch']}, "
        f"{result['date'][:10]}, commit {_commit(result)}, copy bandwidth {result['copy_gb_per_s']:.1f} GB/s.",
        "",
        "| case | ours | " + " | ".join(COLUMNS) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    both = {(row["case"], row["contender"]): row["both"][1] for row in result["rows"]}
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        ours = both.get((case, "ours"))
        cells = [_time(both.get((case, name)), ours) for name in COLUMNS]
        lines.append(f"| {case} | {_time(ours, None)} | " + " | ".join(cells) + " |")
    lines += ["", "| goal | bound | worst case | met |", "|---|---|---|---|"]
    for goal in result["goals"]:
        figure = "not measured" if goal["figure"] is None else f"{goal['figure']:.2f}×"
        met = "yes" if goal["met"] else "**no**"
        lines.append(f"| {goal['goal']} | {goal['sense']} {goal['bound']:g}× | {figure} | {met} |")
    return "\n".join(lines)


def _time(time: float | None, ours: float | None, missing: str = "refused") -> str:
    if time is None:
        return missing
    return f"{time:.2f}" if ours is None else f"{time:.2f} ({time / ours:.2f}×)"


def insert(readme: str, section: str) -> str:
    """The README with ``section`` between the markers.

    >>> insert(f"a {BEGIN} old {END} z", "new") == f"a {BEGIN}\\nnew\\n{END} z"
    True
    """
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"
