"""Baseline and the paper's method on synthetic faces, side by side."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass

from .. import presets
from ..config import NOTHING, expect_number, option, select
from . import scores
from .train import train

logger = logging.getLogger(__name__)
DEFAULT = presets.demo()


@dataclass(frozen=True)
class Options:
    """baseline and the paper's method on synthetic faces: minutes on two CPU cores"""

    epochs: int = option(DEFAULT.epochs, "of each run")
    seed: int = option(DEFAULT.seed, "of both runs")
    root: str = option("runs", "folder of the runs", changes=NOTHING)
    overwrite: bool = option(False, "replace the runs of an earlier demo", changes=NOTHING)

    def __post_init__(self) -> None:
        expect_number("epochs", self.epochs, 1)

    def run(self) -> int:
        started, results = time.perf_counter(), {}
        if self.epochs < DEFAULT.epochs:
            logger.info("note: so few epochs show little: got %d of %d", self.epochs, DEFAULT.epochs)
        for method in (select("method", "baseline")(), DEFAULT.method):
            config = dataclasses.replace(
                DEFAULT,
                method=method,
                name=f"demo-{method.name}",
                epochs=self.epochs,
                seed=self.seed,
                output=dataclasses.replace(DEFAULT.output, root=self.root),
            )
            results[method.name] = train(config, overwrite=self.overwrite)
        first = next(iter(results.values()))
        columns = {
            f"{name}, {when.removeprefix('test, ')}": column
            for name, result in results.items()
            for when, column in result.columns().items()
        }
        print(scores(first.classes, dict(zip(first.classes, first.counts, strict=True)), columns))
        print("on test, which also chose the best epoch; images: of train")
        print("one run of each: a few points are within what the seed changes; `study synthetic` has intervals")
        print(f"pictures ({time.perf_counter() - started:.0f} s in all):")
        for result in results.values():
            print(f"  {result.folder / 'confusion.png'}\n  {result.folder / 'cam.png'}")
        return 0
