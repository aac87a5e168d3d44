"""A study's table as pictures: the accuracies of its rows, and curves over an option that rows vary."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..figures import legible, save
from .table import LEVEL, Estimate, Line, Table

OVERALL, MEAN = "tab:gray", "tab:blue"
INTERVALS = f"{LEVEL:.0%} intervals"


def accuracies(path: Path, table: Table) -> bool:
    """Overall and mean accuracy of each row, with their intervals; False: no row has runs."""
    lines = [line for line in table.lines if line.runs]
    if not lines:
        return False
    figure = Figure(figsize=(7.2, 1.2 + 0.34 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(lines))[::-1]
    for offset, name, colour in ((0.12, "overall", OVERALL), (-0.12, "mean", MEAN)):
        centre, half = _values(getattr(line, name) for line in lines)
        axes.errorbar(centre, places + offset, xerr=half, fmt="o", color=colour, capsize=3, markersize=4, label=name)
    axes.set_yticks(places, legible(tuple(line.label for line in lines)))
    axes.set(xlabel=f"accuracy in %, with {INTERVALS}", title=table.study.title)
    axes.title.set_fontsize(9)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    save(figure, path)
    return True


def curves(path: Path, table: Table) -> bool:
    """Accuracies over the value of each option that rows vary, as in the paper's Figure 3; False: there is none.

    The row compared with is drawn across, where it has runs.
    """
    found: dict[tuple[str, str], list[tuple[float, Line]]] = {}
    values = {row.label: row.varied for row in table.study.rows}
    for line in table.lines:
        if line.runs and (varied := values[line.label]):
            found.setdefault(varied[:2], []).append((varied[2], line))
    if not found:
        return False
    figure = Figure(figsize=(4.4 * len(found), 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    across = [line for line in table.lines if line.label == table.study.compare and line.runs]
    for axes, ((label, option), points) in zip(panels, found.items(), strict=True):
        xs = [x for x, _ in points]
        for name, colour in (("overall", OVERALL), ("mean", MEAN)):
            centre, half = _values(getattr(line, name) for _, line in points)
            axes.errorbar(xs, centre, half, fmt="o-", color=colour, capsize=3, markersize=4, label=name)
            for line in across:
                axes.axhline(getattr(line, name).mean, color=colour, linestyle=":", label=f"{name}, {line.label}")
        if min(xs) > 0:
            axes.set_xscale("log")
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()
        axes.set(xlabel=option, title=legible((label,))[0])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"accuracy in %, with {INTERVALS}")
    panels[0].legend(loc="best", fontsize=8)
    save(figure, path)
    return True


def _values(estimates: Iterable[Estimate]) -> tuple[list[float], list[float]]:
    """The means, and the halves of the intervals where there are any."""
    found = list(estimates)
    return [e.mean for e in found], [0.0 if math.isnan(e.half) else e.half for e in found]
