"""The README's benchmark section, generated from the newest result files."""

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
INTRODUCTION = """## Benchmark

Milliseconds for forward and backward with a fresh gradient, median of interleaved rounds, and in brackets the time
relative to ours; 7 × 7 maps, 7 classes. The identity op sums the features and writes a constant gradient: the same
reads and writes, no computation. Each contender was first shown to equal float64, loss and gradients. glibc alone
moves between the two ways to get memory by what was freed before; `python -m bench --help` says more."""


def newest(directory: Path = RESULTS) -> list[dict]:
    """For each kind of memory the latest result that nothing disturbed."""
    results = [json.loads(path.read_text()) for path in directory.glob("op-*.json")]
    quiet = sorted((r for r in results if r["quiet"]), key=lambda r: r["date"])
    latest = {r["memory"]: r for r in quiet}
    return [latest[memory] for memory in sorted(latest)]


def render(results: list[dict]) -> str:
    """Markdown: what the figures are; of each result where it was measured, a row per case and a row per goal."""
    if not results:
        return "## Benchmark\n\n`python -m bench op` measures; no result is committed yet."
    return "\n\n".join([INTRODUCTION, *map(_tables, results)])


def _tables(result: dict) -> str:
    commit = (result["commit"] or "unknown")[:9] + (" with local changes" if result["dirty"] else "")
    lines = [
        f"### {MEMORY[result['memory']]}",
        "",
        f"{result['device']} ({result['capability']}), {result['threads']} threads, torch {result['torch']}, "
        f"{result['date'][:10]}, commit {commit}, copy bandwidth {result['copy_gb_per_s']:.1f} GB/s.",
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


def _time(ms: float | None, ours: float | None) -> str:
    if ms is None:
        return "refused"
    return f"{ms:.2f}" if ours is None else f"{ms:.2f} ({ms / ours:.2f}×)"


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
