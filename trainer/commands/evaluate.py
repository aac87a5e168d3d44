"""Accuracies of a checkpoint on the splits of its data, or of another folder in its format."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from .. import checkpoint, data, loop, metrics
from ..config import Checked, UserError, option
from . import load, new_file


@dataclass(frozen=True)
class Options(Checked):
    """accuracies of a checkpoint on the data of its run, or on another folder"""

    checkpoint: str = option("", "a run's folder, or its best.pt or last.pt", positional=True)
    path: str = option("", "another folder in place of the run's --data.path")
    flip: bool = option(False, "average the logits of each image and its mirror image")
    device: str = option("auto", choices=("auto", "cpu", "cuda"))
    out: str = option("", "also write the scores to this JSON file")
    overwrite: bool = option(False, "replace that file")

    def run(self) -> int:
        out = new_file(self.out, self.overwrite) if self.out else None
        trained = load(self.checkpoint, self.device)
        config = trained.config
        if self.path:
            if not hasattr(config.data, "path"):
                raise UserError(f"path: got {self.path!r}, which has no effect: the run's data is {config.data.name}")
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=self.path))
        sets = data.prepare(config)
        if sets.classes != trained.classes:
            raise UserError(f"data: got the classes {sets.classes}, expected those of the checkpoint {trained.classes}")
        columns, images = {}, {}
        for name, split in sets.evaluated.items():
            matrix = loop.evaluate(trained.method, split, len(sets.classes), flip=self.flip)
            if matrix is None:
                raise UserError(f"checkpoint: got {self.checkpoint}, whose logits on {name} are not finite")
            columns[name], images[name] = metrics.accuracies(matrix), split.counts(len(sets.classes))
        notes = data.changes(trained.saved["identity"], sets.identity())
        print(trained.about + "".join(f"\nnote: not the data of the run: {note}" for note in notes))
        print(metrics.table(sets.classes, None, columns))
        if out:
            content = {"checkpoint": trained.about, "classes": sets.classes, "images": images, "scores": columns}
            checkpoint.write(out, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return 0
