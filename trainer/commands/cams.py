"""Fig. 4: the class activation maps of an image of each class and of its mirror image."""

from __future__ import annotations

from dataclasses import dataclass

from .. import data
from ..config import UserError, expect, option
from . import OfCheckpoint, load, new_file


@dataclass(frozen=True)
class Options(OfCheckpoint):
    """a picture of every class's activation map for images of a run's data (Fig. 4)"""

    out: str = option("cam.png", "the picture", positional=True)
    classes: list[str] = option((), "rows of the picture, such as '[fear, anger]'; every class if left out")
    split: str = option("", "of which split; the one that chose the best epoch if left out")

    def run(self) -> None:
        from .. import figures

        expect(self.out.lower().endswith(".png"), "out", self.out, "a name that ends with .png")
        out = new_file(self.out, self.overwrite)
        trained = load(self.checkpoint, self.device)
        sets = data.prepare(trained.config)
        name = self.split or sets.chooser
        expect(name in sets.splits, "split", name, f"one of {', '.join(sets.splits)}")
        if unknown := sorted(set(self.classes) - set(trained.classes)):
            raise UserError(f"classes: got {', '.join(unknown)}, expected some of {', '.join(trained.classes)}")
        only = [trained.classes.index(name) for name in self.classes] or None
        images, labels = sets.splits[name].one_of_each(only)
        figures.activation_maps(out, trained.method, images, labels, trained.classes, f"{trained.about}, {name} images")
        print(out)
