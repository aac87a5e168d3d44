"""Baseline and the paper's method on synthetic faces, side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .. import metrics, presets
from ..config import NOTHING, Checked, logger, option, select
from ..train import train

DEFAULT = presets.demo()


@dataclass(frozen=True)
class Options(Checked):
    """baseline and the paper's method on synthetic faces: minutes on two CPU cores"""

    epochs: int = option(DEFAULT.epochs, "of each run", low=1)
    seed: int = option(DEFAULT.seed, "of both runs")
    root: str = option("runs", "folder of the runs", changes=NOTHING)
    overwrite: bool = option(False, "replace the runs of an earlier demo", changes=NOTHING)

    def run(self) -> int:
        if self.epochs < DEFAULT.epochs:
            logger.info("note: so few epochs show little: got %d of %d", self.epochs, DEFAULT.epochs)
        columns: dict[str, dict] = {}
        pictures: list[Path] = []
        output = dataclasses.replace(DEFAULT.output, root=self.root)
        both = dataclasses.replace(DEFAULT, epochs=self.epochs, seed=self.seed, output=output)
        for method in (select("method", "baseline")(), DEFAULT.method):
            config = dataclasses.replace(both, method=method, name=f"demo-{method.name}")
            result = train(config, overwrite=self.overwrite)
            columns |= {f"{method.name}, {k.removeprefix('test, ')}": v for k, v in result.columns().items()}
            pictures += [result.folder / "confusion.png", result.folder / "cam.png"]
        print(metrics.table(result.used.classes, result.used.counts, columns))
        print("on test, which also chose the best epoch; images: of train")
        print("one run of each: a few points are within what the seed changes; `study synthetic` has intervals")
        print("pictures:", *pictures, sep="\n  ")
        return 0
