"""How time grows with one size while the others stay: the lines that a result's cases make along N, C and L."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import goals
from .cases import Case

AXES = {"N": "images N (and as many twins)", "C": "channels C", "L": "classes L"}
#: Sizes that a line needs, or it shows nothing.
LEAST = 3


class Line(NamedTuple):
    fixed: str  #: what all of its cases have in common
    times: dict[str, list[tuple[int, float]]]  #: contender -> (size, ms), by size


def of(result: dict[str, Any], names: Sequence[str]) -> dict[str, Line]:
    """The longest line along each axis, the first of equally long ones; only axes that have one."""
    cases = {Case.named(name): rows for name, rows in goals.by_case(result).items()}
    found = {}
    for axis in AXES:
        lines: dict[Case, list[Case]] = {}
        for case in cases:
            lines.setdefault(_any(case, axis), []).append(case)
        fixed, line = max(lines.items(), key=lambda item: len(item[1]), default=(None, []))
        if fixed and len(line) >= LEAST:
            times = {name: _times(axis, name, {case: cases[case] for case in line}) for name in names}
            found[axis] = Line(_without(fixed, axis), {name: points for name, points in times.items() if points})
    return found


def _any(case: Case, axis: str) -> Case:
    """The case with no size along the axis."""
    none: dict[str, Any] = {axis: 0}
    return case._replace(**none)


def _times(axis: str, name: str, line: dict[Case, goals.Rows]) -> list[tuple[int, float]]:
    known = ((getattr(case, axis), goals.median_ms(rows.get(name))) for case, rows in line.items())
    return sorted((size, ms) for size, ms in known if ms)


def _without(case: Case, axis: str) -> str:
    """What a line's cases share, as their names say it.

    >>> _without(Case(64, 0, "nchw", Case.named("N1-C1-nchw-float32").dtype, L=11), "C")
    'N64 nchw float32 L11'
    """
    return " ".join(word for word in case.name.split("-") if not (word[0] == axis and word[1:].isdecimal()))
