"""Baseline and the paper's method on synthetic faces, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from .. import metrics, presets
from ..config import NOTHING, Checked, from_dict, logger, option
from ..train import train

DEFAULT = presets.demo()


@dataclass(frozen=True)
class Options(Checked):
    """baseline and the paper's method on synthetic faces: minutes on two CPU cores"""

    epochs: int = option(DEFAULT.epochs, "of each run", low=1)
    seed: int = option(DEFAULT.seed, "of both runs")
    root: str = option("runs", "folder of the runs", changes=NOTHING)
    overwrite: bool = option(False, "replace the runs of an earlier demo", changes=NOTHING)

    def run(self) -> None:
        if self.epochs < DEFAULT.epochs:
            logger.info("note: so few epochs show little: got %d of %d", self.epochs, DEFAULT.epochs)
        columns: dict[str, dict] = {}
        both = {"epochs": self.epochs, "seed": self.seed, "output": {"root": self.root}}
        for name in ("baseline", DEFAULT.method.name):
            config = from_dict({**both, "method": {"name": name}, "name": f"demo-{name}"}, DEFAULT)
            result = train(config, overwrite=self.overwrite)
            columns |= {f"{name}, {k.removeprefix('test, ')}": v for k, v in result.columns().items()}
        print(metrics.table(result.used.classes, result.used.counts, columns))
        print("on test, which also chose the best epoch; images: of train")
        print("one run of each: a few points are within what the seed changes; `study synthetic` has intervals")
        print(f"pictures of each: {self.root}/demo-*/confusion.png and cam.png")
