"""Classes and probabilities of image files, decoded as for training."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import checkpoint, loop
from ..config import UserError, option
from ..data import decode
from . import load, new_file


@dataclass(frozen=True)
class Options:
    """classes of image files and folders, as text, CSV or JSON"""

    checkpoint: str = option("", "a run's folder, or its best.pt or last.pt", positional=True)
    images: list[str] = option((), "image files, or folders that are searched for them", positional=True)
    out: str = option("", "a .csv or .json file; printed as CSV if left out")
    flip: bool = option(True, "average the logits of each image and its mirror image")
    maps: str = option("", "also draw every class's activation map into this new folder")
    device: str = option("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    overwrite: bool = option(False, "replace the file and the folder's pictures")

    def __post_init__(self) -> None:
        if self.out and Path(self.out).suffix.lower() not in (".csv", ".json"):
            raise UserError(f"out: got {self.out!r}, expected a name that ends with .csv or .json")

    def run(self) -> int:
        out = new_file(self.out, self.overwrite) if self.out else None
        folder = new_file(self.maps, self.overwrite) if self.maps else None
        files = [file for name in self.images for file in _files(Path(name).expanduser())]
        trained = load(self.checkpoint, self.device)
        labels = torch.zeros(len(files), dtype=torch.int64)  # not known
        split = decode.read(
            Path("/"), "predict", [file.absolute() for file in files], labels, trained.config.image_size
        )
        probabilities = loop.logits(trained.method, split.images, flip=self.flip).softmax(1)
        text = (_json if self.out.lower().endswith(".json") else _csv)(files, trained.classes, probabilities)
        if out:
            with checkpoint.replacing(out) as written:
                written.write(text.encode())
        else:
            print(text, end="")
        if folder:
            from .. import figures

            folder.mkdir(exist_ok=True)
            for i, file in enumerate(files):
                picture = folder / f"{i:05d}-{file.stem}.png"
                image = split.images[i : i + 1]
                figures.activation_maps(picture, trained.method, image, None, trained.classes, trained.about)
        return 0


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        images, _ = decode.image_files(path)
        if not images:
            raise UserError(f"images: got the folder {path}, which has no images")
        return images
    if not path.is_file():
        raise UserError(f"images: got {path}, expected a file or folder that exists")
    return [path]


def _csv(files: list[Path], classes: tuple[str, ...], probabilities: torch.Tensor) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", *classes])
    for file, p in zip(files, probabilities, strict=True):
        writer.writerow([file, classes[int(p.argmax())], *(f"{x:.6f}" for x in p.tolist())])
    return text.getvalue()


def _json(files: list[Path], classes: tuple[str, ...], probabilities: torch.Tensor) -> str:
    rows = [
        {
            "file": str(file),
            "class": classes[int(p.argmax())],
            "probabilities": dict(zip(classes, p.tolist(), strict=True)),
        }
        for file, p in zip(files, probabilities, strict=True)
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
