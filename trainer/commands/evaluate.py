"""Accuracies of a checkpoint on the splits of its data, or of another folder in its format."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .. import checkpoint, data, loop, metrics
from ..config import UserError, expect, from_dict, option
from . import OfCheckpoint, load, new_file


@dataclass(frozen=True)
class Options(OfCheckpoint):
    """accuracies of a checkpoint on the data of its run, or on another folder"""

    path: str = option("", "another folder in place of the run's --data.path, with train or without")
    flip: bool = option(False, "average the logits of each image and its mirror image")
    out: str = option("", "also write the scores to this JSON file")

    def run(self) -> None:
        out = new_file(self.out, self.overwrite) if self.out else None
        trained = load(self.checkpoint, self.device)
        of, other = trained.config.data, {"data": {"path": self.path}} if self.path else {}
        expect(not other or hasattr(of, "path"), "path", self.path, f"none: the run's data is {of.name}")
        sets = data.evaluated(from_dict(other, trained.config), trained.classes)
        expect(sets.classes == trained.classes, "data", sets.classes, f"the checkpoint's classes {trained.classes}")
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
