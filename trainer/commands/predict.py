"""Classes and probabilities of image files, decoded as for training."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from .. import checkpoint, loop
from ..config import UserError, expect, option
from ..data import decode
from . import OfCheckpoint, load, new_file


@dataclass(frozen=True)
class Options(OfCheckpoint):
    """classes of image files and folders, as text, CSV or JSON"""

    images: list[str] = option((), "image files, or folders that are searched for them", positional=True)
    out: str = option("", "a .csv or .json file; printed as CSV if left out")
    flip: bool = option(True, "average the logits of each image and its mirror image")
    maps: str = option("", "also draw every class's activation map into this new folder")

    def run(self) -> None:
        suffix = Path(self.out).suffix.lower()
        expect(suffix in (".csv", ".json") or not self.out, "out", self.out, "a name that ends with .csv or .json")
        out = new_file(self.out, self.overwrite) if self.out else None
        folder = new_file(self.maps, self.overwrite, "maps") if self.maps else None
        files = decode.found(self.images)
        trained = load(self.checkpoint, self.device)
        images = decode.read_unlabelled(files, trained.config.image_size)
        found = loop.logits(trained.method, images, flip=self.flip).softmax(1)
        classes = [trained.classes[i] for i in found.argmax(1).tolist()]
        rows = list(zip(map(str, files), classes, found.tolist(), strict=True))
        text = _text(rows, trained.classes, suffix)
        if out:
            checkpoint.write(out, text)
        else:
            print(text, end="")
        if folder:
            from .. import figures

            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise UserError(f"maps: got {folder}, which can't be a folder: {error.strerror}") from error
            for i, file in enumerate(files):
                about = images[i : i + 1], None, trained.classes, trained.about
                figures.activation_maps(folder / f"{i:05d}-{file.stem}.png", trained.method, *about)


def _text(rows: list[tuple[str, str, list[float]]], classes: tuple[str, ...], kind: str) -> str:
    """CSV, or JSON where ``kind`` is ".json", of each file's name, class and probabilities."""
    if kind == ".json":
        of = [{"file": f, "class": c, "probabilities": dict(zip(classes, p, strict=True))} for f, c, p in rows]
        return json.dumps(of, indent=1, ensure_ascii=False) + "\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", *classes])
    writer.writerows([file, name, *(f"{p:.6f}" for p in found)] for file, name, found in rows)
    return text.getvalue()
