"""One run, by the options of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import distributed, presets
from ..config import NOTHING, Config, logger, option, title
from ..train import train


@dataclass(frozen=True)
class Options:
    """one run: train, evaluate after each epoch, write checkpoints, log and pictures"""

    preset: str = option("paper", f"where the options start from: {', '.join(presets.found())}")
    config: Config = field(default_factory=presets.paper)
    resume: bool = option(False, "continue from ROOT/NAME/last.pt, as if never interrupted", changes=NOTHING)
    overwrite: bool = option(False, "replace the run that ROOT/NAME has", changes=NOTHING)

    def run(self) -> None:
        logger.info("preset %s: %s", self.preset, title(presets.found()[self.preset]))
        result = train(self.config, resume=self.resume, overwrite=self.overwrite)
        if distributed.speaks():
            print(result.table())
