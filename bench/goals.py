"""The goals of both devices, and whether the figures of a run meet them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from .cases import Case

Rows = dict[str, dict[str, Any]]  #: one case's rows, by contender
Figures = Callable[[dict[str, Any]], dict[str, float | None]]  #: result -> case -> figure, None where it is missing

#: The whole run: 60 epochs of RAF-DB's 12,271 training images, both views.
EPOCHS, IMAGES = 60, 12_271


def median_ms(row: dict[str, Any] | None) -> float | None:
    """Of forward and backward; None for a contender that was refused or could not be timed."""
    return row["both"][1] if row and row["both"] else None


def time_over(contender: str) -> Callable[[Rows], float | None]:
    """Our time over that of the contender."""
    return _ratio("ours", contender)


def speed_up(contender: str) -> Callable[[Rows], float | None]:
    """The contender's time over ours."""
    return _ratio(contender, "ours")


def _ratio(numerator: str, denominator: str) -> Callable[[Rows], float | None]:
    def ratio(rows: Rows) -> float | None:
        over, under = (median_ms(rows.get(name)) for name in (numerator, denominator))
        return over / under if over and under else None

    return ratio


def fixed_cost(phase: str) -> Callable[[Rows], float | None]:
    """Our time over the identity op's, launched from Python one call after the other."""

    def ratio(rows: Rows) -> float | None:
        ours, identity = (rows.get(name, {}).get("eager", {}).get(phase) for name in ("ours", "identity"))
        return ours[1] / identity[1] if ours and identity and identity[1] else None

    return ratio


def fixed_cost_by_turns(phase: str) -> Figures:
    """The same where a run of its own measured it; nothing of results that are older than that."""
    return lambda result: {case: of[phase] for case, of in result.get("fixed_cost", {}).items()}


def field(key: str, contender: str = "ours") -> Callable[[Rows], float | None]:
    return lambda rows: rows.get(contender, {}).get(key)


def microseconds(rows: Rows) -> float | None:
    ms = median_ms(rows.get("ours"))
    return 1e3 * ms if ms else None


def judged_dtype(result: dict[str, Any]) -> str:
    """The dtype that most goals judge: float32 on a CPU, bfloat16 on a GPU."""
    return "float32" if result["kind"] == "cpu" else "bfloat16"


def by_case(result: dict[str, Any]) -> dict[str, Rows]:
    """The rows, by the name of their case and the contender."""
    cases: dict[str, Rows] = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], {})[row["contender"]] = row
    return cases


def of(dtype: str, figure: Callable[[Rows], float | None], group: str | None = None) -> Figures:
    """A figure of every case of a dtype but that of the fixed cost, or of those whose group begins with ``group``.

    None of those that were left out or failed. A case of other maps, classes or operations than usual has a name that
    does not end with its dtype.
    """

    def belongs(to: str) -> bool:
        return to != "fixed cost" if group is None else to.startswith(group)

    def figures(result: dict[str, Any]) -> dict[str, float | None]:
        failed = [error["case"] for error in result.get("errors", []) if error["case"] != "copy"]
        cases = {**dict.fromkeys([*result.get("left_out", []), *failed], {}), **by_case(result)}
        return {
            case: figure(rows) for case, rows in cases.items() if case.endswith(dtype) and belongs(_group(case, rows))
        }

    return figures


def _group(case: str, rows: Rows) -> str:
    """As it was when it was measured."""
    return next(iter(rows.values())).get("group", "") if rows else Case.named(case).group


def geometric_mean(figures: Figures) -> Figures:
    def mean(result: dict[str, Any]) -> dict[str, float | None]:
        every = list(figures(result).values())
        known = [figure for figure in every if figure is not None]
        return {"all": statistics.geometric_mean(known) if known and len(known) == len(every) else None}

    return mean


def whole_run(result: dict[str, Any]) -> dict[str, float | None]:
    measured = result.get("whole_run")
    return {"ours": measured["whole_run_s"] if measured else None}


class Goal(NamedTuple):
    program: str  #: that measures it, "op" or "step"
    device: str  #: "cuda" or "cpu", or a CPU with one kind of memory
    name: str
    sense: str  #: "at most" or "at least"
    bound: float
    unit: str
    figures: Figures

    def judge(self, result: dict[str, Any]) -> dict[str, Any]:
        """The worst case's figure, every case's, and whether the bound is met; with a figure missing it is not."""
        cases = self.figures(result)
        known = [figure for figure in cases.values() if figure is not None]
        figure = None
        if known and len(known) == len(cases):
            figure = max(known) if self.sense == "at most" else min(known)
        met = figure is not None and (figure <= self.bound if self.sense == "at most" else figure >= self.bound)
        goal = {"goal": self.name, "sense": self.sense, "bound": self.bound, "unit": self.unit}
        return {**goal, "figure": figure, "met": met, "cases": cases}


PLAIN, BEST, RELEASED = "plain eager, compiled", "best eager, compiled", "released"
AUTHORS = "as the authors"  #: a whole step as their programs take it

#: Forward and backward; float32 is judged on a CPU, bfloat16 on a GPU.
GOALS = (
    Goal("op", "cpu fresh", "time against the identity op", "at most", 1.3, "×", of("float32", time_over("identity"))),
    Goal("op", "cpu reused", "time against the identity op", "at most", 1.5, "×", of("float32", time_over("identity"))),
    Goal("op", "cpu", "speed-up over plain eager, compiled", "at least", 2.5, "×", of("float32", speed_up(PLAIN))),
    Goal("op", "cpu", "speed-up over best eager, compiled", "at least", 1.2, "×", of("float32", speed_up(BEST))),
    Goal("op", "cpu", "speed-up over best eager, compiled, geometric mean", "at least", 1.5, "×",
         geometric_mean(of("float32", speed_up(BEST)))),
    Goal("op", "cpu", "speed-up over the released formulation", "at least", 12.0, "×",
         of("float32", speed_up(RELEASED))),
    Goal("op", "cpu", "fixed cost of a forward against the identity op, by turns", "at most", 2.5, "×",
         fixed_cost_by_turns("forward")),
    Goal("op", "cpu", "fixed cost of a backward against the identity op, by turns", "at most", 1.3, "×",
         fixed_cost_by_turns("backward")),
    Goal("op", "cpu", "time of bfloat16 against float32, by turns", "at most", 1.0, "×",
         lambda result: result["bfloat16_over_float32"]),
    Goal("op", "cuda", "time against the identity op, large and wide", "at most", 1.1, "×",
         of("bfloat16", time_over("identity"), "large and wide")),
    Goal("op", "cuda", "share of the copy bandwidth, large and wide", "at least", 0.9, "",
         of("bfloat16", field("share_of_copy"), "large and wide")),
    Goal("op", "cuda", "fixed cost of a forward against the identity op", "at most", 2.5, "×",
         of("bfloat16", fixed_cost("forward"), "fixed cost")),
    Goal("op", "cuda", "fixed cost of a backward against the identity op", "at most", 1.3, "×",
         of("bfloat16", fixed_cost("backward"), "fixed cost")),
    Goal("op", "cuda", "speed-up over plain eager, compiled", "at least", 3.0, "×", of("bfloat16", speed_up(PLAIN))),
    Goal("op", "cuda", "speed-up over best eager, compiled, large", "at least", 1.5, "×",
         of("bfloat16", speed_up(BEST), "large")),
    Goal("op", "cuda", "speed-up over best eager, compiled, the paper's batch", "at least", 3.0, "×",
         of("bfloat16", speed_up(BEST), "paper's batch")),
    Goal("op", "cuda", "speed-up over the released formulation", "at least", 25.0, "×",
         of("bfloat16", speed_up(RELEASED))),
    Goal("op", "cuda", "the paper's batch in a CUDA graph", "at most", 12.0, " µs",
         of("bfloat16", microseconds, "paper's batch")),
    Goal("op", "cuda", "nodes of the paper's batch in a CUDA graph, CUDA kernels", "at most", 2, "",  # Triton has three
         of("bfloat16", field("launches", "cuda"), "paper's batch")),
    Goal("step", "cuda", f"whole run, {EPOCHS} epochs of {IMAGES:,} images, extrapolated from the steady state",
         "at most", 180.0, " s", whole_run),
)  # fmt: skip


def applying(program: str, result: dict[str, Any]) -> list[Goal]:
    """The goals of this program and this result's device; a rehearsal has those of a GPU."""
    device = f"cpu {result.get('memory')}" if result["kind"] == "cpu" else "cuda"
    return [goal for goal in GOALS if goal.program == program and device.startswith(goal.device)]


def judged(program: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    return [goal.judge(result) for goal in applying(program, result)]


def summary(goal: dict[str, Any]) -> str:
    """A judged goal in a line.

    >>> summary({"goal": "time", "sense": "at most", "bound": 2.0, "unit": "×", "figure": 1.5, "met": True})
    'met time: 1.5× (at most 2×)'
    """
    cases = goal.get("cases", {})
    known = sum(figure is not None for figure in cases.values())
    figure = f"measured in {known} of {len(cases)} cases" if known else "not measured"
    if goal["figure"] is not None:
        figure = f"{goal['figure']:.3g}{goal['unit']}"
    return (
        f"{'met' if goal['met'] else 'NOT'} {goal['goal']}: {figure} ({goal['sense']} {goal['bound']:g}{goal['unit']})"
    )
