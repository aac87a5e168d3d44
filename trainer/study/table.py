"""The table of a study: means over the runs of a row, their 95 % intervals, and paired differences from one row."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from ..config import UserError
from ..data import table as aligned
from .grid import Study
from .results import identity

LEVEL = 0.95  #: of the intervals


class Estimate(NamedTuple):
    """A mean over n runs and the half width of its interval, NaN for one run."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "-"
        return f"{self.mean:.2f}" + ("" if math.isnan(self.half) else f" ± {self.half:.2f}")


def estimate(values: Sequence[float]) -> Estimate:
    """By Student's t over independent runs.

    >>> print(estimate([78.0, 80.0, 79.0, 81.0, 77.0]))
    79.00 ± 1.96
    """
    n = len(values)
    if not n:
        return Estimate(math.nan, math.nan, 0)
    mean = sum(values) / n
    if n == 1:
        return Estimate(mean, math.nan, 1)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return Estimate(mean, float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n), n)


class Line(NamedTuple):
    """A row as the table has it; accuracies in percent."""

    label: str
    runs: int
    failed: int
    per_class: list[Estimate]  #: of the last epoch, as all but ``best``
    overall: Estimate
    mean: Estimate
    f1: Estimate
    best: Estimate  #: mean accuracy of the best epoch, chosen by the images that it is of
    view_difference: Estimate  #: in percent of the maps
    gradient_share: Estimate  #: of the consistency, in percent
    gradient_share_over: dict[int, Estimate]  #: the same after some epochs, of the runs that have it
    difference: Estimate  #: of ``mean`` from the row compared with, run by run
    p: float  #: of the paired t-test that it is 0
    overall_difference: Estimate  #: as ``difference``, of ``overall``
    seconds: float  #: of a run
    paper: dict
    note: str


class Table(NamedTuple):
    """The rows of a study that have a run."""

    study: Study
    classes: list[str]
    split: str  #: that they were evaluated on
    lines: list[Line]  #: in the study's order
    devices: Counter[str]  #: that trained -> number of runs; "" for runs that do not say


def of(study: Study, records: list[dict]) -> Table:
    """From the records of the study's present options.

    Raises:
        UserError: runs were evaluated on different images.
    """
    wanted = {run.identity for run in study.runs()}
    records = [r for r in records if identity(r) in wanted]
    _expect_same_images(records)
    whole = [r for r in records if "failed" not in r]
    reference = {r["seed"]: r["last"] for r in whole if r["row"] == study.compare}
    found = []
    for row in study.rows:
        mine = [r for r in whole if r["row"] == row.label]
        failed = sum(r["row"] == row.label for r in records) - len(mine)
        if not mine and not failed:
            continue
        paired = [] if row.label == study.compare else [r for r in mine if r["seed"] in reference]
        differences, of_overall = (
            [r["last"][key] - reference[r["seed"]][key] for r in paired] for key in ("mean", "overall")
        )
        classes = len(mine[0]["classes"]) if mine else 0
        found.append(
            Line(
                label=row.label,
                runs=len(mine),
                failed=failed,
                per_class=[estimate(_there(r["last"]["per_class"][i] for r in mine)) for i in range(classes)],
                overall=estimate([r["last"]["overall"] for r in mine]),
                mean=estimate([r["last"]["mean"] for r in mine]),
                f1=estimate([r["last"]["f1"] for r in mine]),
                best=estimate([r["best"]["mean"] for r in mine]),
                view_difference=estimate(_there(r["view_difference"] for r in mine)),
                gradient_share=estimate(_there(r.get("gradient_share") for r in mine)),
                gradient_share_over=_over(mine),
                difference=estimate(differences),
                p=_p(differences),
                overall_difference=estimate(of_overall),
                seconds=sum(r["seconds"] for r in mine) / max(1, len(mine)),
                paper=row.paper,
                note=row.note,
            )
        )
    names, split = (whole[0]["classes"], whole[0]["split"]) if whole else ([], "test")
    return Table(study, names, split, found, Counter(r.get("device", "") for r in whole))


def _over(records: list[dict]) -> dict[int, Estimate]:
    found: dict[int, list[float]] = {}
    for record in records:
        for epoch, value in record.get("gradient_share_over", {}).items():
            found.setdefault(int(epoch), []).append(value)
    return {epoch: estimate(values) for epoch, values in sorted(found.items())}


def _epochs(table: Table) -> list[int]:
    """After which the share of the gradient is known of some row."""
    return sorted({epoch for line in table.lines for epoch in line.gradient_share_over})


def _there(values) -> list[float]:
    return [v for v in values if v is not None]


def _p(differences: list[float]) -> float:
    """Of the two-sided t-test that the differences have mean 0; NaN for fewer than two, or for equal ones."""
    if len(differences) < 2 or len(set(differences)) == 1:
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _expect_same_images(records: list[dict]) -> None:
    """Runs of one part of the data must have been evaluated on the same images."""
    seen: dict[int, str] = {}
    for r in (r for r in records if "failed" not in r):
        if seen.setdefault(r["fold"], r["images"]) != r["images"]:
            where = f"{r['row']!r}, seed {r['seed']}"
            raise UserError(f"results: got {where} evaluated on other images than the runs before it")


def cells(table: Table) -> list[list[str]]:
    """The table as text, its head first: accuracies of the last epoch in percent."""
    paper = any(line.paper for line in table.lines)
    differ = any(line.difference.n for line in table.lines)
    maps = any(line.view_difference.n for line in table.lines)
    pull = any(line.gradient_share.n for line in table.lines)
    over = _epochs(table)
    head = ["", "runs", *table.classes, "overall", "mean", "mean, best epoch"]
    head += [f"mean - {table.study.compare}", "p", f"overall - {table.study.compare}"] if differ else []
    head += ["maps differ by %"] if maps else []
    head += ["consistency's share of the gradient, %"] if pull else []
    head += [f"the same after epoch {', '.join(map(str, over))}"] if over else []
    head += ["paper: overall", "mean"] if paper else []
    rows = [head]
    for line in table.lines:
        runs = f"{line.runs}" + (f" + {line.failed} diverged" if line.failed else "")
        label = line.label + (f" ({line.note})" if line.note else "")
        row = [label, runs, *(f"{e.mean:.1f}" for e in line.per_class)]
        row += [""] * (2 + len(table.classes) - len(row))
        row += [str(line.overall), str(line.mean), str(line.best)]
        if differ:
            row += [_signed(line.difference), _small(line.p), _signed(line.overall_difference)]
        if maps:
            row.append(str(line.view_difference))
        if pull:
            fewer = 0 < line.gradient_share.n < line.runs
            row.append(f"{line.gradient_share}" + f" ({line.gradient_share.n} runs)" * fewer)
        if over:
            row.append(_course(line, over))
        if paper:
            row += [f"{line.paper[k]:.2f}" if k in line.paper else "-" for k in ("overall", "mean")]
        rows.append(row)
    return rows


def _course(line: Line, epochs: list[int]) -> str:
    """The mean shares of the gradient after these epochs, and of how many runs where not all have them."""
    there = line.gradient_share_over
    runs = max((e.n for e in there.values()), default=0)
    values = ", ".join(f"{there[epoch].mean:.2f}" if epoch in there else "-" for epoch in epochs)
    return (values + f" ({runs} runs)" * (runs < line.runs)) if there else ""


def _signed(d: Estimate) -> str:
    return "" if not d.n else f"{d.mean:+.2f}" + ("" if math.isnan(d.half) else f" ± {d.half:.2f}")


def _small(p: float) -> str:
    """
    >>> _small(0.0312), _small(0.0002), _small(math.nan)
    ('0.031', '< 0.001', '')
    """
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def text(table: Table) -> str:
    return "\n".join([table.study.title, "", aligned(cells(table)), "", *footnotes(table)])


def markdown(table: Table) -> str:
    head, *rest = cells(table)
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *rest]
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    notes = "\n".join(f"- {note}" for note in footnotes(table))
    return f"### {table.study.title}\n\n{table.study.about.strip()}\n\n{body}\n\n{notes}\n"


def footnotes(table: Table) -> list[str]:
    """How the numbers came about."""
    study, base = table.study, table.study.base
    what = "part of the images" if study.folds else "seed"
    model = f"{base.backbone.name} at {base.image_size} pixels, {base.epochs} epochs of batches of {base.batch_size}"
    starts = {row.options.get("backbone", {}).get("weights", base.backbone.weights) for row in study.rows}
    weights = ", from the weights of each row"
    if len(starts) == 1:
        weights = f", from the weights {start}" if (start := starts.pop()) else ", from random weights"
    notes = [
        f"{base.data.name}, evaluated on {table.split}; {model}{weights}, at a learning rate of {base.learning_rate:g}"
    ]
    notes.append(f"accuracy in percent of the last epoch, mean ± {LEVEL:.0%} interval (Student's t) over runs")
    if any(line.difference.n > 1 for line in table.lines):
        notes.append(
            f"differences from {study.compare} are paired by {what}; p is of the paired t-test of that of the mean"
        )
    if base.backbone.train_from:
        kept = f"; {base.augment.versions} versions of each image" if base.augment.versions else ""
        notes.append(f"what comes before {base.backbone.train_from} keeps its weights{kept}")
    if any(table.devices):
        of = sorted((name or "a device that was not recorded", n) for name, n in table.devices.items())
        counts = [f" ({n} run{'s' * (n > 1)})" if len(of) > 1 else "" for _, n in of]
        notes.append("trained on " + " and ".join(name + count for (name, _), count in zip(of, counts, strict=True)))
    return notes


def as_csv(table: Table) -> str:
    """Every number with all its digits, a line for each row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["overall", "mean", "f1", "best", "view_difference", "gradient_share", "difference", "overall_difference"]
    over = _epochs(table)
    titles = [*table.classes, *names, *(f"gradient_share after epoch {epoch}" for epoch in over)]
    writer.writerow(
        ["row", "runs", "diverged", *(f"{title} {k}" for title in titles for k in ("mean", "half"))]
        + ["p", "seconds", "paper overall", "paper mean"]
    )
    for line in table.lines:
        estimates = [*line.per_class, *(getattr(line, name) for name in names)]
        estimates += [line.gradient_share_over.get(epoch, estimate([])) for epoch in over]
        there = [v for e in estimates for v in (e.mean, e.half)]
        numbers = there if line.runs else [""] * 2 * len(titles)
        tail = [line.p, line.seconds, line.paper.get("overall", ""), line.paper.get("mean", "")]
        writer.writerow([line.label, line.runs, line.failed, *numbers, *tail])
    return out.getvalue()
