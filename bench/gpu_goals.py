"""The goals of DESIGN section 6 for a GPU, and whether the figures of a run meet them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .op import judge

Figure = Callable[[dict[str, dict]], float | None]


def _both(rows: dict[str, dict], name: str) -> float | None:
    both = rows.get(name, {}).get("both")
    return both[1] if both else None


def _against(numerator: str, denominator: str) -> Figure:
    def ratio(rows: dict[str, dict]) -> float | None:
        times = _both(rows, numerator), _both(rows, denominator)
        return None if None in times else times[0] / times[1]

    return ratio


def _microseconds(rows: dict[str, dict]) -> float | None:
    ms = _both(rows, "ours")
    return None if ms is None else 1e3 * ms


def _field(key: str) -> Figure:
    return lambda rows: rows.get("ours", {}).get(key)


class Goal(NamedTuple):
    goal: str
    sense: str  #: "at most" or "at least"
    bound: float
    unit: str
    figure: Figure  #: of one case's rows by contender
    group: str | None = None  #: only the cases of this group


#: DESIGN section 6, forward and backward in bfloat16.
GOALS = (
    Goal("time against the identity op, large", "at most", 1.1, "×", _against("ours", "identity"), "large"),
    Goal("share of the copy bandwidth, large", "at least", 0.9, "", _field("share_of_copy"), "large"),
    Goal("speed-up over plain eager, compiled", "at least", 3.0, "×", _against("plain eager, compiled", "ours")),
    Goal("speed-up over best eager, compiled, large", "at least", 1.5, "×",
         _against("best eager, compiled", "ours"), "large"),
    Goal("speed-up over best eager, compiled, the paper's batch", "at least", 3.0, "×",
         _against("best eager, compiled", "ours"), "paper's batch"),
    Goal("speed-up over the released formulation", "at least", 25.0, "×", _against("released", "ours")),
    Goal("the paper's batch in a CUDA graph", "at most", 12.0, " µs", _microseconds, "paper's batch"),
    Goal("nodes of the paper's batch in a CUDA graph", "at most", 2, "", _field("launches"), "paper's batch"),
)  # fmt: skip


def goals(rows: Sequence[dict]) -> list[dict]:
    """Each goal with the worst case's figure, every case's, and whether it is met; bfloat16 alone is judged."""
    cases: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["case"].endswith("bfloat16"):
            cases.setdefault(row["case"], {})[row["contender"]] = row
    judged = []
    for goal in GOALS:
        figures = {
            name: goal.figure(by_contender)
            for name, by_contender in cases.items()
            if goal.group in (None, next(iter(by_contender.values()))["group"])
        }
        judged.append({**judge(goal.goal, goal.sense, goal.bound, figures), "unit": goal.unit})
    return judged


#: 60 epochs of RAF-DB's 12,271 training images, both views, in at most 3 minutes.
EPOCHS, IMAGES, WHOLE_RUN_S = 60, 12_271, 180.0


def whole_run_goals(measured: dict | None) -> list[dict]:
    """The goal for the whole run, from ``bench.step.whole_run``; not met while it was not measured."""
    figure = measured["whole_run_s"] if measured else None
    name = f"whole run, {EPOCHS} epochs of {IMAGES:,} images, extrapolated from the steady state"
    return [{**judge(name, "at most", WHOLE_RUN_S, {"ours": figure}), "unit": " s"}]
