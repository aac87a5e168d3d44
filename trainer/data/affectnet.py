"""AffectNet with 7 or 8 classes: the CSV files of 2017, the .npy annotations of 2021, or folders 0 to 7.

Its validation set is called "test" here: results are published on it, since the test set is not public, so the best
epoch must be chosen on other images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..config import NOTHING, UserError, option
from . import Data, DataOptions, decode, rows
from .labels import CANONICAL, EXPRESSIONS

NUMBERS = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")
NO_CLASS = {8: "none", 9: "uncertain", 10: "no face"}

# In the order of CANONICAL. The release of 2017 has 500 validation images of contempt.
TRAIN = (14090, 6378, 3803, 134415, 25459, 24882, 74874, 3750)
OFFICIAL_2017 = {"train": TRAIN, "test": (500,) * 8}
OFFICIAL_2021 = {"train": TRAIN, "test": (*(500,) * 7, 499)}
COLUMNS = ("subDirectory_filePath", "expression", "face_x", "face_y", "face_width", "face_height")


@dataclass(frozen=True)
class Options(DataOptions):
    """AffectNet: training.csv and validation.csv, or train_set/ and val_set/, or train/0..7/ and val/0..7/"""

    path: str = option("", "the folder that holds them", changes=NOTHING)
    contempt: bool = option(False, "8 classes instead of 7")
    crop: bool = option(True, "crop the images of 2017 to the face boxes in their CSV files")

    def read(self, image_size: int, seed: int) -> Data:
        root = rows.folder_of(self.path)
        classes = CANONICAL if self.contempt else EXPRESSIONS
        if annotations := rows.nearest(root, "train_set/annotations"):
            folders = {"train": annotations.parent, "test": annotations.parents[1] / "val_set"}
            parts = [_of_2021(root, folder, split, classes, image_size) for split, folder in folders.items()]
            return rows.against_official(_data(classes, *parts), "AffectNet", OFFICIAL_2021)
        if file := rows.nearest(root, "training.csv"):
            part = self._of_2017(root, file, classes, image_size)
            return rows.against_official(_data(classes, part), "AffectNet", OFFICIAL_2017)
        numbers = {str(i): name for i, name in enumerate(NUMBERS)} | {str(i): None for i in NO_CLASS}
        layouts = "training.csv and validation.csv, or train_set and val_set with annotations and images"
        data = rows.only_test(rows.from_folders(root, layouts, numbers, classes, image_size, seed))
        return rows.against_official(data, "AffectNet", OFFICIAL_2021)

    def _of_2017(self, root: Path, training: Path, classes: tuple[str, ...], size: int) -> rows.Part:
        files = {"train": training, "test": training.with_name("validation.csv")}
        if not files["test"].is_file():
            raise UserError(f"data.path: got no {files['test']}, expected it beside {training.name}")
        found = []
        for split, file in files.items():
            found += rows.parse(file, rows.table(file, COLUMNS), partial(self._row, split, classes))
        images = rows.Images(rows.nearest(root, "Manually_Annotated_Images") or root, parts=2)
        return rows.read_files(root, training.parent, found, images, size)

    def _row(self, split: str, classes: tuple[str, ...], fields: list[str]) -> rows.Row:
        image, expression, *box = fields
        row = _row(split, image, expression, classes)
        return row if row.left_out or not self.crop else row._replace(box=_box(box))


def _data(classes: tuple[str, ...], *parts: rows.Part) -> Data:
    return rows.data_of(classes, [str(NUMBERS.index(name)) for name in classes], *parts)


def _of_2021(root: Path, folder: Path, split: str, classes: tuple[str, ...], size: int) -> rows.Part:
    annotations = folder / "annotations"
    for inside in (annotations, folder / "images"):
        if not inside.is_dir():
            raise UserError(f"data.path: got no folder {inside}, expected annotations and images in {folder}")
    files = sorted(f for f in annotations.glob("*_exp.npy") if not decode.hidden(f.name))
    found = rows.parse(annotations, ((f.name, f) for f in files), partial(_annotated, split, classes))
    return rows.read_files(root, annotations, found, rows.Images(folder / "images"), size)


def _annotated(split: str, classes: tuple[str, ...], file: Path) -> rows.Row:
    try:
        expression = str(np.load(file, allow_pickle=False).item())
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{error}, expected an array of one number from 0 to 10") from None
    return _row(split, file.name.removesuffix("_exp.npy") + ".jpg", expression, classes)


def _row(split: str, image: str, expression: str, classes: tuple[str, ...]) -> rows.Row:
    number = rows.whole_number("expression", expression, 0, 10)
    if number in NO_CLASS:
        return rows.Row(split, image, left_out=NO_CLASS[number])
    name = NUMBERS[number]
    return rows.Row(split, image, classes.index(name)) if name in classes else rows.Row(split, image, left_out=name)


def _box(fields: list[str]) -> decode.Box:
    """Left, upper, width and height, in the order of COLUMNS."""
    try:
        left, upper, width, height = map(float, fields)
    except ValueError:
        raise ValueError(
            f"the face box {', '.join(fields)}, expected four numbers; --no-data.crop does without"
        ) from None
    return left, upper, width, height
