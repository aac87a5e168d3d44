"""The runs of a study, from its file.

    title = "what is compared"
    preset = "paper"                       # where the options start from
    seeds = [0, 1, 2, 3, 4]
    compare = "Baseline"                   # the row that the others are compared with
    [options]                              # of every run, as in a file for --config
    epochs = 60
    [[rows]]
    label = "Baseline"
    method = "baseline"
    paper = { overall = 87.42, mean = 78.53 }
    [[rows]]
    label = "RAC"
    method = "rac"
    grid = { "method.consistency_weight" = [0.5, 1, 2] }     # a row for each value, or for each combination

With ``folds = true``, run i of a row has part i modulo ``split.folds`` as its test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import presets
from ..config import NOTHING, ROUNDING, Config, UserError, as_dict, expect, from_dict, select, spelt

FOLDER = Path(__file__).parents[1] / "studies"


class Row(NamedTuple):
    """A line of the table."""

    label: str
    options: dict  #: of its runs, nested
    paper: dict  #: what the paper reports, in percent, where it does
    note: str
    varied: tuple[str, str, float] | None = None  #: label without it, option and value, where a grid has one number


class Run(NamedTuple):
    """One run of a row."""

    row: str
    seed: int
    fold: int
    config: Config
    key: str  #: of all that its results follow from but the images

    @property
    def identity(self) -> tuple[str, int, str]:
        """Which run a record is of."""
        return self.row, self.seed, self.key


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    compare: str
    base: Config
    about: str = ""
    folds: bool = False

    def runs(self, root: Path = Path()) -> list[Run]:
        """All of them, seed by seed, so that what is there at any time can be compared; their folders are in root."""
        return [self._run(row, i, seed, root) for i, seed in enumerate(self.seeds) for row in self.rows]

    def _run(self, row: Row, i: int, seed: int, root: Path) -> Run:
        split = self.base.split
        if self.folds:
            split = dataclasses.replace(split, fold=i % split.folds)
        base = dataclasses.replace(self.base, seed=seed, split=split)
        if "method" in row.options:  # whose options start from its own defaults, not from the preset's
            base = dataclasses.replace(base, method=select("method", row.options["method"].get("name", ""))())
        config = from_dict(row.options, base)
        name = re.sub(r"[^\w.]+", "-", row.label.lower())
        output = dataclasses.replace(config.output, root=str(root), pictures=False)
        config = dataclasses.replace(config, name=f"{name}-{seed}", output=output)
        return Run(row.label, seed, split.fold, config, key(config))


def key(config: Config) -> str:
    """A digest of the options that change the results, wherever the images and the weights are.

    >>> paper = presets.paper()
    >>> key(paper) == key(dataclasses.replace(paper, name="other")) != key(dataclasses.replace(paper, epochs=9))
    True
    """
    values = _that_count(config)
    values["epochs"], values["weights"] = config.epochs, Path(config.backbone.weights).stem
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _that_count(options: Any) -> dict:
    values = {k: v for k, v in as_dict(options).items() if k == "name" and not isinstance(options, Config)}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if dataclasses.is_dataclass(value):
            values[f.name] = _that_count(value)
        elif f.metadata.get("changes") not in (NOTHING, ROUNDING):
            values[f.name] = value
    return values


def found() -> dict[str, Path]:
    """Name -> file of the studies that come with the trainer."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def read(
    name: str, *, data: str = "", weights: str = "", options: dict | None = None, seeds: tuple[int, ...] = ()
) -> Study:
    """The study called ``name``, or in the file of that name.

    Args:
        data: a data set, "NAME" or "NAME:PATH", in place of the study's. weights: of the backbone, in place of the
        study's. options: nested, in place of the study's.

    Raises:
        UserError: no such study, or something in it that is unknown or refused.
    """
    path = found().get(spelt(name)) or found().get(name) or Path(name).expanduser()
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study: got {name!r}, expected one of {', '.join(found())}, or a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"study: got {path}, which is no TOML: {error}") from error
    known = {"title", "about", "preset", "seeds", "compare", "folds", "options", "rows"}
    _expect_known("study", values, known)
    preset = values.get("preset", "paper")
    expect(preset in presets.found(), "preset", preset, f"one of {', '.join(presets.found())}")
    base = presets.found()[preset]()
    given = [{"data": _data(data)}] * bool(data) + [{"backbone": {"weights": weights}}] * bool(weights)
    for chosen in (values.get("options", {}), *given, options or {}):
        base = from_dict(_named(chosen), base)
    rows = tuple(row for entry in values.get("rows", []) for row in _rows(entry))
    expect(bool(rows), "rows", [], f"at least one in {path}")
    labels = [row.label for row in rows]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"rows.label: got {twice!r} twice in {path}")
    compare = values.get("compare", labels[0])
    expect(compare in labels, "compare", compare, f"one of {', '.join(labels)}")
    seeds = seeds or tuple(values.get("seeds", range(5)))
    expect(len(set(seeds)) == len(seeds) > 0, "seeds", seeds, "different whole numbers")
    folds = bool(values.get("folds", False))
    expect(not folds or base.split.folds > 0, "folds", True, "options.split.folds too")
    study = Study(path.stem, values.get("title", path.stem), rows, seeds, compare, base, values.get("about", ""), folds)
    study.runs()  # whose options are refused now, not after hours
    return study


def _rows(entry: dict) -> list[Row]:
    _expect_known("rows", entry, {"label", "method", "options", "paper", "note", "grid"})
    method = entry.get("method", "")
    label = entry.get("label") or (method if isinstance(method, str) else method.get("name", ""))
    expect(bool(label), "rows.label", "", "a name for each row")
    options = _named({**entry.get("options", {}), **({"method": method} if method else {})})
    grid = entry.get("grid", {})
    rows = []
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        text = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in values.items())
        nested = options
        for name, value in values.items():
            nested = _with(nested, name.split("."), value)
        title = f"{label}, {text}" if text else label
        one = [(label, name, float(value)) for name, value in values.items() if isinstance(value, int | float)]
        varied = one[0] if len(one) == len(values) == 1 else None
        rows.append(Row(title, nested, entry.get("paper", {}), entry.get("note", ""), varied))
    return rows


def _with(options: dict, path: list[str], value: Any) -> dict:
    """``options`` with one value at a nested place."""
    first, *rest = path
    return {**options, first: _with(options.get(first, {}), rest, value) if rest else value}


def _named(options: dict) -> dict:
    """A method, a data set or a backbone may be said by its name only."""
    named = ("method", "data", "backbone")
    return {k: {"name": v} if k in named and isinstance(v, str) else v for k, v in options.items()}


def _data(text: str) -> dict:
    """
    >>> _data("raf-db:/faces"), _data("synthetic")
    ({'name': 'raf-db', 'path': '/faces'}, {'name': 'synthetic'})
    """
    name, colon, path = text.partition(":")
    return {"name": name, **({"path": path} if colon else {})}


def _expect_known(name: str, values: dict, known: set[str]) -> None:
    if unknown := sorted(set(values) - known):
        raise UserError(f"{name}.{unknown[0]}: got an unknown entry, expected one of {', '.join(sorted(known))}")
