"""PATH/train/CLASS/**/image and the same under val, valid, validation, dev or test."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import NOTHING, UserError, expect, option, printable
from . import TEST, TRAIN, VALIDATION, Data, DataOptions, Split, decode, labels, listed


@dataclass(frozen=True)
class Options(DataOptions):
    """PATH/train/CLASS/ and PATH/val|test/CLASS/ with images inside"""

    path: str = option("", "the folder that holds train and val or test", changes=NOTHING)
    classes: dict = option({}, "class of a folder, such as '{suprise: surprise, unknown: null}'")

    def __post_init__(self) -> None:
        super().__post_init__()
        for folder, name in self.classes.items():
            expect(name is None or type(name) is str and bool(name), f"data.classes.{folder}", name, "a class, or null")
        # YAML reads a folder called 0 as a number.
        object.__setattr__(self, "classes", {str(folder): name for folder, name in self.classes.items()})

    def read(self, image_size: int, seed: int) -> Data:
        root = Path(self.path).expanduser()
        folders = split_folders(root)
        train = class_folders(folders["train"])
        names, notes = labels.name_folders(train, {f: c for f, c in self.classes.items() if f in train})
        said = set(self.classes) - {f for folder in folders.values() for f in class_folders(folder)}
        if said:
            raise UserError(f"data.classes: got {sorted(said)[0]!r}, expected one of the folders {', '.join(train)}")
        classes = tuple(dict.fromkeys(names.values()))
        if len(classes) < 2:
            raise UserError(
                f"data.classes: got {self.classes}, which leaves {len(classes)} classes, expected two or more"
            )
        splits = {}
        for split, folder in folders.items():
            mapped = names if split == "train" else self._evaluated(folder, names)
            splits[split], skipped = _read(root, folder, mapped, classes, image_size, whole=split == "train")
            notes += [*skipped, *_loose(folder)]
        on_disk = tuple("+".join(printable(f) for f in names if names[f] == c) for c in classes)
        return Data(classes, splits, on_disk, tuple(notes))

    def without_train(self) -> bool:
        """Whether the folder can be read and has no train, so that only a checkpoint can say what its classes are."""
        root = Path(self.path).expanduser()
        return root.is_dir() and os.access(root, os.R_OK | os.X_OK) and not set(TRAIN) & _inside(root).keys()

    def read_evaluated(self, classes: tuple[str, ...], image_size: int) -> Data:
        """Of a folder without train, PATH/test/CLASS and the like, or PATH/CLASS, under these classes."""
        root = Path(self.path).expanduser()
        inside = _inside(root)
        folders = {name: inside[name] for name in (*VALIDATION, *TEST) if name in inside} or {root.resolve().name: root}
        splits, notes = {}, []
        for split, folder in folders.items():
            mapped = self._evaluated(folder, {name: name for name in classes})
            splits[split], skipped = _read(root, folder, mapped, classes, image_size, whole=False)
            notes += [*skipped, *_loose(folder)]
        return Data(classes, splits, (), tuple(notes))

    def _evaluated(self, folder: Path, names: dict[str, str]) -> dict[str, str]:
        """Folder -> class, by the names in train where they are the same; a class may be missing."""
        mapped: dict[str, str] = {}
        for name in class_folders(folder):
            meaning = self.classes.get(name, "") if name in self.classes else names.get(name) or labels.canonical(name)
            if name in self.classes and not meaning:
                continue
            if not meaning or meaning not in names.values():
                expected = ", ".join(dict.fromkeys(names.values()))
                raise UserError(f"data: got the folder {folder / name}, expected one of the classes {expected}")
            mapped[name] = meaning
        return mapped


def split_folders(root: Path) -> dict[str, Path]:
    """Split -> folder, "train" first, the others under their own names.

    Raises:
        UserError: no such folder, no train, or nothing to evaluate.
    """
    if not root.is_dir():
        raise UserError(f"data.path: got {str(root)!r}, which is no folder; expected one with train and val or test")
    inside = _inside(root)
    train = next((inside[name] for name in TRAIN if name in inside), None)
    evaluated = {name: inside[name] for name in (*VALIDATION, *TEST) if name in inside}
    if train is None or not evaluated:
        found = listed(sorted(f.name for f in inside.values()), 8) or "no folder"
        raise UserError(
            f"data.path: got {str(root)!r}, which holds {found}; expected the folders train and val or test, "
            "each with a folder for every class"
        )
    return {"train": train, **evaluated}


def _inside(root: Path) -> dict[str, Path]:
    """The folders in ``root`` by their names in lower case, system folders left out."""
    return {f.name.lower(): f for f in sorted(root.iterdir()) if f.is_dir() and not decode.hidden(f.name)}


def class_folders(root: Path) -> list[str]:
    """Their names in natural order, system folders left out."""
    folders = [f.name for f in root.iterdir() if f.is_dir() and not decode.hidden(f.name)]
    if len(folders) < 2:
        raise UserError(
            f"data: got {len(folders)} class folders in {root}, expected at least two, one for each class, "
            "with its images inside"
        )
    return sorted(folders, key=labels.natural)


def _loose(folder: Path) -> list[str]:
    """A note of the files that lie beside the folders of the classes."""
    files = sorted(f.name for f in folder.iterdir() if f.is_file() and not decode.hidden(f.name))
    return [f"{len(files)} files in {folder} are in no class's folder: {listed(files, 3)}"] if files else []


def _read(
    root: Path, folder: Path, names: dict[str, str], classes: tuple[str, ...], size: int, *, whole: bool
) -> tuple[Split, list[str]]:
    files, targets, others = [], [], []
    for name, meaning in names.items():
        images, rest = decode.image_files(folder / name)
        files += images
        targets += [classes.index(meaning)] * len(images)
        others += rest
    if missing := [c for i, c in enumerate(classes) if i not in set(targets)] if whole else []:
        raise UserError(f"data: got no image of {', '.join(missing)} in {folder}, expected some of every class")
    if not files:
        raise UserError(f"data: got no image in {folder}, expected some")
    kinds = Counter(f.suffix or "no suffix" for f in others)
    note = f"{len(others)} files in {folder} are no images ({', '.join(f'{n} {k}' for k, n in kinds.items())}): "
    notes = [note + listed([f.relative_to(root).as_posix() for f in others], 3)] if others else []
    return decode.read(root, folder.name, files, torch.tensor(targets), size), notes
