"""The report's pictures, drawn from result files: the same numbers give the same picture.

A picture that is stored stands as long as it shows the same: drawn by the same version of Matplotlib, pixel by pixel;
by another, whose fonts and ticks may differ, by what is in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image

from . import curves, goals, results
from .model import changed_since

Result = dict[str, Any]

COLOURS = {
    "ours": "#c2410c",
    "identity": "#98a2ad",
    "best eager, compiled": "#15803d",
    "plain eager, compiled": "#1d4ed8",
    "best eager": "#86b89a",
    "plain eager": "#4d6fb8",
    "released": "#6b21a8",
    "measured": "#c2410c",
    "model": "#98a2ad",
}
#: What a reader compares, the nearest first.
SHOWN = ("identity", goals.BEST, goals.PLAIN, goals.RELEASED)
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b6673",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#dfe4ea",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
#: When csrc/cpu last changed so much that a result from before says so.
CPU_KERNELS_OF = "2026-11-27T23:56:00+00:00"
MARKERS = {"float32": "o", "bfloat16": "^"}
DPI = 150
#: Of 255, by which pixels of one version of Matplotlib may differ between processors.
ROUNDING = 8


def where(result: Result) -> str:
    """What a panel's title says.

    >>> where({"kind": "cpu", "device": "AMD EPYC", "capability": "AVX2", "memory": "fresh"})
    'AMD EPYC (AVX2), fresh memory'
    """
    if result["kind"] != "cpu":
        return result["device"] + earlier(result)
    memory = f", {result['memory']} memory" if result.get("memory") else ""
    return f"{result['device']} ({results.capability(result)}){memory}{earlier(result)}"


def earlier(result: Result) -> str:
    """What follows a place whose kernels have changed since.

    >>> earlier({"kind": "cpu", "date": "2026-11-26T18:00:00+00:00"})
    ', an earlier version of the CPU kernels'
    """
    if result["kind"] == "cpu":
        return ", an earlier version of the CPU kernels" if result.get("date", CPU_KERNELS_OF) < CPU_KERNELS_OF else ""
    changed = changed_since(result.get("commits", {}).get("cuda", result.get("commit")))
    return ", an earlier version of the CUDA kernels" if changed else ""


def title(result: Result, *more: str) -> str:
    """Where, in lines that fit a panel.

    >>> title({"kind": "cpu", "device": "AMD EPYC", "capability": "AVX2", "memory": "fresh"}, "float32")
    'AMD EPYC (AVX2), float32\\nfresh memory'
    """
    place, *rest = where(result).split(", ", 1)
    return "\n".join([", ".join([place, *more]), *rest])


def speed_ups(results: Sequence[Result]) -> Figure | None:
    """Each contender's time over ours, of every case of the dtype that the goals judge."""
    panels = [(result, ratios) for result in results if (ratios := _ratios(result))]
    if not panels:
        return None
    figure, axes = _panels(len(panels), 0.9 + 0.62 * max(len(ratios) for _, ratios in panels))
    for ax, (result, ratios) in zip(axes, panels, strict=True):
        _bars(ax, ratios, SHOWN, "{:.1f}×", start=1.0)
        ax.axvline(1, color=COLOURS["ours"], linewidth=1.5)
        ax.set(title=title(result, goals.judged_dtype(result)), xlabel="time over ours (1: as fast as ours)")
    _legend(figure, ("ours", *SHOWN))
    return figure


def _ratios(result: Result) -> dict[str, dict[str, float]]:
    found = {}
    for case, rows in goals.by_case(result).items():
        ours = goals.median_ms(rows.get("ours"))
        if ours and case.endswith(goals.judged_dtype(result)):
            times = {name: ms / ours for name in SHOWN if (ms := goals.median_ms(rows.get(name)))}
            if times.keys() - {"identity"}:
                found[case] = times
    return found


def roofline(results: Sequence[Result]) -> Figure | None:
    """The rate at which the bytes of the floor move, against how many there are, under the copy bandwidth."""
    results = [result for result in results if result["copy_gb_per_s"] and result["rows"]]
    if not results:
        return None
    names = ("ours", *SHOWN)
    figure, axes = _panels(len(results), 3.4)
    for ax, result in zip(axes, results, strict=True):
        for name in names:
            rows = [r for r in result["rows"] if r["contender"] == name and r.get("gb_per_s")]
            for dtype, marker in MARKERS.items():
                own = [(r, ms) for r in rows if r["case"].endswith(dtype) and (ms := goals.median_ms(r))]
                points = sorted((r["gb_per_s"] * ms, r["gb_per_s"]) for r, ms in own)
                if points:
                    ax.plot(*zip(*points, strict=True), marker, color=COLOURS[name], markersize=6, alpha=0.85)
        copy = result["copy_gb_per_s"]
        ax.axhline(copy, color="#1d232b", linewidth=1.2, linestyle="--")
        ax.annotate(f"a copy: {copy:,.0f} GB/s", (0.02, copy), (0, 4), ("axes fraction", "data"), "offset points")
        ax.set(title=title(result), xlabel="MB that must move", ylabel="GB/s")
        _log(ax, "x")
        _log(ax, "y")
        ax.set_ylim(top=2.2 * max(copy, *(r["gb_per_s"] or 0 for r in result["rows"])))
    _legend(figure, names)
    return figure


def scaling(results: Sequence[Result]) -> Figure | None:
    """Time against N, C and L, where three sizes of a line were measured: by a place's first result that has one."""
    names = ("ours", *SHOWN)
    panels: dict[tuple[str, str], curves.Line] = {}
    for result in results:
        for axis, line in curves.of(result, names).items():
            panels.setdefault((title(result), axis), line)
    if not panels:
        return None
    figure, axes = _panels(len(panels), 3.2)
    for ax, ((place, axis), line) in zip(axes, panels.items(), strict=True):
        for name, points in line.times.items():
            ax.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], markersize=4, linewidth=1.5)
        ax.set(title=f"{place}\n{line.fixed}", xlabel=curves.AXES[axis], ylabel="ms")
        _log(ax, "x")
        _log(ax, "y")
    _legend(figure, names)
    return figure


def every_axis(results: Sequence[Result]) -> bool:
    """Whether a place's results have a line along each axis."""
    axes = [set(curves.of(result, ("ours",))) for result in results]
    return any(found == set(curves.AXES) for found in axes)


def memory(results: Sequence[Result]) -> Figure | None:
    """Memory beyond the inputs, and bytes moved, over the least that any formulation needs."""
    names = ("ours", "identity", "best eager", "plain eager", "released")
    result = next((r for r in results if any(row.get("bytes_over_floor") for row in r["rows"])), None)
    if result is None:
        return None
    dtype = goals.judged_dtype(result)
    cases = {case: rows for case, rows in goals.by_case(result).items() if case.endswith(dtype)}
    held = {case: _held(rows) for case, rows in cases.items()}
    moved = {case: {n: rows[n]["bytes_over_floor"] for n in names if n in rows} for case, rows in cases.items()}
    figure, axes = _panels(2, 0.9 + 0.75 * len(cases))
    for ax, (bars, title, label) in zip(axes, (
        (held, f"Memory held beyond the inputs, {dtype}", "the most at once, over the size of the gradient"),
        (moved, f"Bytes moved, {dtype}", "over reading features and writing gradient once"),
    ), strict=True):  # fmt: skip
        _bars(ax, bars, names, "{:.3g}×")
        ax.axvline(1, color="#1d232b", linewidth=1)
        ax.set(title=title, xlabel=label)
    _legend(figure, names)
    return figure


def _held(rows: goals.Rows) -> dict[str, float]:
    """Over the identity op's, which holds the gradient and nothing else."""
    least = rows.get("identity", {}).get("peak_extra_bytes")
    return {n: r["peak_extra_bytes"] / least for n, r in rows.items() if least and r["peak_extra_bytes"]}


def model(modelled: Sequence[tuple[str, float, float]]) -> Figure | None:
    """What kernels took on a GPU beside what the model says: (launch, measured µs, modelled µs)."""
    if not modelled:
        return None
    ways: dict[str, dict[str, dict[str, float]]] = {}
    for launch, measured, said in modelled:
        way, *size = launch.split(" ")
        ways.setdefault(way, {})["-".join([*size, "bfloat16"])] = {"measured": measured, "model": said}
    names = ("measured", "model")
    figure, axes = _panels(len(ways), 0.9 + 0.42 * max(map(len, ways.values())))
    for ax, (way, sizes) in zip(axes, ways.items(), strict=True):
        _bars(ax, sizes, names, "{:.1f}")
        ax.set(title=way, xlabel="µs")
    _legend(figure, names)
    return figure


PARTS = {
    "views": "#98a2ad",
    "backbone forward": "#93b8e0",
    "head": "#c2410c",
    "backbone backward": "#4d6fb8",
    "optimiser": "#cbd2d9",
}
DARK = ("head", "backbone backward")


def step(steps: Sequence[Result]) -> Figure | None:
    """How the trainer's step divides."""
    steps = [s for s in steps if s.get("parts_ms")]
    if not steps:
        return None
    figure = Figure(figsize=(10.8, 1.2 + 0.6 * len(steps)), layout="constrained")
    ax = figure.add_subplot()
    names = [f"{s['config']['backbone']['name']}\n{s['device']}" for s in steps]
    left = np.zeros(len(steps))
    for part, colour in PARTS.items():
        share = np.array([100 * s["parts_ms"].get(part, 0.0) / sum(s["parts_ms"].values()) for s in steps])
        ax.barh(names, share, left=left, color=colour, label=part, height=0.6)
        for i, percent in enumerate(share):
            if percent >= 4 or part == "head":
                text = f"{percent:.1f} %"
                inside = percent >= 4
                at = (left[i] + percent / 2, i) if inside else (left[i], i + 0.42)
                ink = ("#ffffff" if part in DARK else "#1d232b") if inside else colour
                ax.annotate(text, at, ha="center", va="center", color=ink, fontsize=8)
        left += share
    ax.set(xlim=(0, 100), xlabel="% of the step")
    ax.set_ylim(len(steps) - 0.35, -0.65)
    figure.legend(loc="outside upper center", ncols=len(PARTS))
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Side by side, at most three in a row."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(10.8, rows * height + 0.4), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _bars(ax: Axes, groups: dict[str, dict[str, float]], names: Sequence[str], label: str, start: float = 0.0) -> None:
    """A group of horizontal bars from ``start`` on, with their figures, for each case."""
    thick = 0.8 / len(names)
    for i, bars in enumerate(groups.values()):
        for j, name in enumerate(names):
            if name in bars:
                y = i + (j - (len(names) - 1) / 2) * thick
                ax.barh(y, bars[name] - start, thick * 0.9, left=start, color=COLOURS[name])
                side, aside = ("left", 3) if bars[name] >= start else ("right", -3)
                ax.annotate(label.format(bars[name]), (bars[name], y), (aside, 0), textcoords="offset points",
                            ha=side, va="center", fontsize=7)  # fmt: skip
    ax.set_yticks(range(len(groups)), [_two_lines(case) for case in groups], fontsize=8)
    ax.set_ylim(len(groups) - 0.45, -0.55)
    values = [value for bars in groups.values() for value in bars.values()]
    ax.set_xscale("log")
    ax.set_xlim(0.5 * min(values, default=1.0), 2.4 * max(values, default=1.0))
    _log(ax, "x")
    ax.grid(axis="y", visible=False)


def _two_lines(case: str) -> str:
    """A case's name without its dtype, which all of a panel share.

    >>> _two_lines("N32-C512-channels_last-float32-14x14")
    'N32 C512\\nchannels_last 14x14'
    """
    size, channels, layout, _, *unusual = case.split("-")
    return f"{size} {channels}\n{' '.join([layout, *unusual])}"


def _log(ax: Axes, axis: str) -> None:
    """Makes an axis, whose limits are known, logarithmic, and labels it in plain numbers as densely as they fit."""
    getattr(ax, f"set_{axis}scale")("log")
    one = getattr(ax, f"{axis}axis")
    low, high = sorted(one.get_view_interval())
    one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,), numticks=12))
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    one.set_minor_formatter(NullFormatter())
    one.set_minor_locator(NullLocator())
    ax.grid(True)


def _legend(figure: Figure, names: Iterable[str]) -> None:
    marks = [matplotlib.lines.Line2D([], [], color=COLOURS[n], marker="s", linestyle="", label=n) for n in names]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks))


def png(figure: Figure) -> bytes:
    """The file's content: no date, and of what it shows a fingerprint."""
    content = io.BytesIO()
    shown = fingerprint(figure)
    software = f"Matplotlib {matplotlib.__version__}"
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": software, "Description": shown})
    return content.getvalue()


def fingerprint(figure: Figure) -> str:
    """Of the words, lines and bars in it, which no version of Matplotlib changes."""
    seen: list[Any] = [[text.get_text() for legend in figure.legends for text in legend.get_texts()]]
    for ax in figure.axes:
        seen.append([ax.get_title("left"), ax.get_xlabel(), ax.get_ylabel(), *(t.get_text() for t in ax.texts)])
        seen += [[[f"{number:.6g}" for number in row] for row in np.asarray(line.get_xydata())] for line in ax.lines]
        seen += [[f"{number:.6g}" for number in bar.get_extents().bounds] for bar in _unscaled(ax)]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _unscaled(ax: Axes) -> list[Any]:
    """The bars' paths in the axes' own numbers."""
    return [patch.get_path().transformed(patch.get_patch_transform()) for patch in ax.patches]


def draw(figures: dict[str, Figure], stored: Path) -> dict[str, bytes]:
    """The files' contents by name: the stored one's where it still shows the same."""
    contents = {}
    for name, figure in figures.items():
        new, path = png(figure), stored / name
        contents[name] = path.read_bytes() if path.exists() and same(path.read_bytes(), new) else new
    return contents


def same(a: bytes, b: bytes) -> bool:
    """Whether two pictures show the same."""
    one, other = (Image.open(io.BytesIO(content)) for content in (a, b))
    if one.info.get("Description") != other.info.get("Description"):
        return False
    if one.info.get("Software") != other.info.get("Software"):
        return True
    pixels = [np.asarray(image.convert("RGB"), dtype=np.int16) for image in (one, other)]
    return pixels[0].shape == pixels[1].shape and bool(abs(pixels[0] - pixels[1]).max() <= ROUNDING)


def settings() -> Any:
    """What is drawn within looks the same whatever the user's own settings are."""
    plain: Any = matplotlib.rcParamsDefault
    whole: Any = {**plain, "backend": "agg", **STYLE}
    return matplotlib.rc_context(whole)
