"""FER2013: fer2013.csv or icml_face_data.csv with the pixels in its rows, or train/angry ... and test/angry ..."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import NOTHING, option
from . import Data, DataOptions, rows
from .labels import EXPRESSIONS

NUMBERS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
FILES = ("fer2013.csv", "icml_face_data.csv")
ROWS = 35_887  # what some copies have after these is no image

# In the order of EXPRESSIONS. The folders' test set is both test parts together.
OFFICIAL = {
    "train": (3171, 4097, 436, 7215, 4830, 3995, 4965),
    "val": (415, 496, 56, 895, 653, 467, 607),
    "test": (416, 528, 55, 879, 594, 491, 626),
}
FOLDERS_TEST = (831, 1024, 111, 1774, 1247, 958, 1233)


@dataclass(frozen=True)
class Options(DataOptions):
    """FER2013: fer2013.csv or icml_face_data.csv, or train/angry/ ... and test/angry/ ..."""

    path: str = option("", "the folder that holds one of the files, or train and test", changes=NOTHING)

    def read(self, image_size: int, seed: int) -> Data:
        root = rows.folder_of(self.path)
        if file := rows.nearest(root, *FILES):
            found, notes = pixel_rows(file)
            splits, left_out = rows.read_pixels(file, found, image_size)
            data = rows.data_of(EXPRESSIONS, _numbers(), (splits, notes + left_out))
            return rows.against_official(data, "FER2013", OFFICIAL)
        numbers = {str(i): name for i, name in enumerate(NUMBERS)}
        data = rows.from_folders(root, "fer2013.csv or icml_face_data.csv", numbers, EXPRESSIONS, image_size, seed)
        if "val" not in data.splits:
            return rows.against_official(data, "FER2013", {"train": OFFICIAL["train"], "test": FOLDERS_TEST})
        return rows.against_official(data, "FER2013", OFFICIAL)


def _numbers() -> tuple[str, ...]:
    return tuple(str(NUMBERS.index(name)) for name in EXPRESSIONS)


def pixel_rows(file: Path) -> tuple[list[rows.Row], list[str]]:
    """Every row with its pixels and its class in EXPRESSIONS, and a note of what follows the last one.

    Raises:
        UserError: a column is missing, or rows can't be used.
    """
    lines = rows.table(file, ("emotion", "pixels", "Usage"))
    found = rows.parse(file, lines[:ROWS], _row)
    after = []
    for _, line in lines[ROWS:]:
        try:
            found.append(_row(line))
        except ValueError:
            after.append(line)
    note = f"{len(after)} rows of {file} after the {ROWS} of FER2013 are no images and are left out"
    return [row._replace(image=f"{file.name}:{i}") for i, row in enumerate(found, 1)], [note] if after else []


def _row(fields: list[str]) -> rows.Row:
    emotion, text, usage = fields
    if usage not in SPLITS:
        raise ValueError(f"Usage {usage!r}, expected one of {', '.join(SPLITS)}")
    label = EXPRESSIONS.index(NUMBERS[rows.whole_number("emotion", emotion, 0, 6)])
    return rows.Row(SPLITS[usage], "", label, pixels=_pixels(text))


def _pixels(text: str) -> bytes:
    try:
        pixels = bytes(map(int, text.split()))
    except ValueError:
        raise ValueError(f"pixels {text[:20]!r}..., expected numbers from 0 to 255") from None
    if len(pixels) != rows.SIDE**2:
        raise ValueError(f"{len(pixels)} pixels, expected {rows.SIDE} x {rows.SIDE}")
    return pixels
