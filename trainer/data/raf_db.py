"""RAF-DB's basic expressions: the list and the aligned faces as distributed, or train/1..7 and test/1..7."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..config import NOTHING, option
from . import Data, DataOptions, rows
from .labels import EXPRESSIONS, RAFDB

OFFICIAL = {
    "train": (1290, 281, 717, 4772, 1982, 705, 2524),
    "test": (329, 74, 160, 1185, 478, 162, 680),
}
LIST = "list_patition_label.txt"  # spelt so by its authors


@dataclass(frozen=True)
class Options(DataOptions):
    """RAF-DB basic: EmoLabel/ and Image/aligned/, or train/1..7/ and test/1..7/"""

    path: str = option("", "the folder that holds EmoLabel and Image, or train and test", changes=NOTHING)

    def read(self, image_size: int, seed: int) -> Data:
        root = rows.folder_of(self.path)
        if file := rows.nearest(root, LIST):
            data = _from_list(root, file, image_size)
        else:
            layout = f"EmoLabel/{LIST} and Image/aligned"
            data = _test_by_its_name(rows.from_folders(root, layout, RAFDB, EXPRESSIONS, image_size, seed))
        return rows.against_official(data, "RAF-DB", OFFICIAL)


def _from_list(root: Path, file: Path, size: int) -> Data:
    base = file.parent.parent if file.parent.name == "EmoLabel" else file.parent
    folder = rows.nearest(base, "aligned")
    if folder is None:
        raise rows.unknown_layout(base, "the aligned faces in Image/aligned beside EmoLabel")
    lines = enumerate(file.read_text("utf-8-sig", errors="replace").splitlines(), 1)
    found = rows.parse(file, [(i, line) for i, line in lines if line.strip()], _row)
    part = rows.read_files(root, file, found, rows.Images(folder), size, _spellings)
    return rows.data_of(EXPRESSIONS, tuple(RAFDB), part)


def _row(line: str) -> rows.Row:
    name, *label = re.split(r"[\s,]+", line.strip())
    split = name.partition("_")[0]
    if split not in OFFICIAL or len(label) != 1:
        raise ValueError(f"{line!r}, expected an image and its label, such as 'train_00001.jpg 5'")
    return rows.Row(split, name, rows.whole_number("label", label[0], 1, 7) - 1)


def _spellings(name: str) -> tuple[str, ...]:
    """The distribution appends "_aligned" to the names in its list, some copies do not."""
    stem, _, suffix = name.rpartition(".")
    plain = stem.removesuffix("_aligned")
    return f"{plain}_aligned.{suffix}", f"{plain}.{suffix}"


def _test_by_its_name(data: Data) -> Data:
    """Some exports call the test set "valid", as if it were there to choose an epoch by."""
    is_test = any(split.counts(len(data.classes)) == OFFICIAL["test"] for split in data.evaluated.values())
    return rows.only_test(data) if is_test else data
