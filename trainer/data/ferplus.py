"""FERPlus: the votes of ten people on each image of FER2013, as majority, arg-max or label distribution."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..config import NOTHING, UserError, option
from . import Data, DataOptions, fer2013, rows
from .labels import CANONICAL, EXPRESSIONS

COLUMNS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF")
FOLDERS = {"train": "FER2013Train", "val": "FER2013Valid", "test": "FER2013Test"}

# Images of a majority, in the order of CANONICAL: by the votes of fer2013new.csv, and by those of the label.csv files
# that come with it and are older.
OFFICIAL = {
    "train": (3149, 532, 119, 7287, 3014, 2100, 8740, 119),
    "val": (415, 62, 24, 865, 351, 287, 1182, 13),
    "test": (396, 83, 18, 893, 384, 273, 1090, 16),
}
OLDER = {
    "train": (3136, 536, 116, 7284, 3022, 2098, 8733, 120),
    "val": (411, 60, 25, 862, 348, 289, 1180, 16),
    "test": (394, 86, 16, 892, 382, 269, 1083, 15),
}
#: Where the labels of fer2013.csv agree with fewer majorities than this, its rows are in another order.
AGREEMENT = 0.35


class Voted(NamedTuple):
    """The votes on an image."""

    split: str
    image: str
    votes: tuple[int, ...]  #: in the order of COLUMNS


@dataclass(frozen=True)
class Options(DataOptions):
    """FERPlus: fer2013.csv and fer2013new.csv, or FER2013Train/, FER2013Valid/ and FER2013Test/ with label.csv"""

    path: str = option("", "the folder that holds them", changes=NOTHING)
    votes: str = option(
        "majority",
        "majority, argmax, or soft: train on the distribution of the votes",
        choices=("majority", "argmax", "soft"),
    )
    contempt: bool = option(False, "8 classes instead of 7")

    def read(self, image_size: int, seed: int) -> Data:
        root = rows.folder_of(self.path)
        votes, faces = rows.nearest(root, "fer2013new.csv"), rows.nearest(root, *fer2013.FILES)
        if votes and faces:
            voted, parts = self._from_tables(votes, faces, image_size)
        elif train := rows.nearest(root, FOLDERS["train"]):
            voted, parts = self._from_folders(root, train.parent, image_size)
        else:
            layouts = f"fer2013.csv and fer2013new.csv, or {', '.join(FOLDERS.values())} with images and label.csv"
            raise rows.unknown_layout(root, layouts)
        data = rows.data_of(self._classes, (), *parts)
        return data._replace(notes=(*data.notes, *_against_official(voted)))

    @property
    def _classes(self) -> tuple[str, ...]:
        return CANONICAL if self.contempt else EXPRESSIONS

    def _from_tables(self, votes: Path, faces: Path, size: int) -> tuple[list[Voted], list[rows.Part]]:
        """Votes belong to faces by their order; the names are no key, since four occur twice and 173 rows have none."""
        pixels, notes = fer2013.pixel_rows(faces)
        lines = rows.table(votes, ("Usage", "Image name", *COLUMNS))
        voted = rows.parse(votes, lines, _voted)
        if len(voted) != len(pixels):
            raise UserError(
                f"{faces}: got {len(pixels)} rows, expected the {len(voted)} of {votes}, whose votes belong to them by "
                "their order"
            )
        _expect_same_order(faces, pixels, voted)
        found = [self._row(v)._replace(image=p.image, pixels=p.pixels) for v, p in zip(voted, pixels, strict=True)]
        splits, left_out = rows.read_pixels(faces, found, size)
        return voted, [(splits, notes + left_out)]

    def _from_folders(self, root: Path, base: Path, size: int) -> tuple[list[Voted], list[rows.Part]]:
        voted, parts = [], []
        for split, name in FOLDERS.items():
            file = base / name / "label.csv"
            if not file.is_file():
                raise UserError(f"data.path: got no {file}, expected the votes on the images beside it")
            with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
                lines = [(i, fields) for i, fields in enumerate(csv.reader(text), 1) if fields]
            of_split = rows.parse(file, lines, partial(_labelled, split))
            images = rows.Images(base / name)
            parts.append(rows.read_files(root, file, [self._row(v) for v in of_split], images, size))
            voted += of_split
        return voted, parts

    def _row(self, voted: Voted) -> rows.Row:
        """The label by the rule; where one trains on distributions, the majority is what counts in an evaluation."""
        rule = "majority" if self.votes == "soft" and voted.split != "train" else self.votes
        winner = majority(voted.votes) if rule == "majority" else most(voted.votes)
        if winner not in self._classes:
            return rows.Row(voted.split, voted.image, left_out=winner or "without a majority")
        label = distribution(voted.votes, self._classes) if rule == "soft" else self._classes.index(winner)
        return rows.Row(voted.split, voted.image, label)


def majority(votes: Sequence[int]) -> str | None:
    """The column with more than half of the votes, when those that are the only one of their column do not count.

    >>> majority((4, 0, 0, 1, 3, 2, 0, 0, 0, 0)), majority((6, 0, 1, 1, 0, 0, 0, 0, 2, 0))
    (None, 'neutral')
    """
    counted = _without_single(votes)
    return most(counted) if 2 * max(counted) > sum(counted) else None


def most(votes: Sequence[int]) -> str | None:
    """The column with most votes, the first of several; None where no two people agree."""
    return COLUMNS[max(range(len(votes)), key=votes.__getitem__)] if max(votes) > 1 else None


def distribution(votes: Sequence[int], classes: Sequence[str]) -> tuple[float, ...]:
    """The share of each class in the votes for one of them, when single votes do not count."""
    counted = dict(zip(COLUMNS, _without_single(votes), strict=True))
    total = sum(counted[name] for name in classes)
    return tuple(counted[name] / total for name in classes)


def _without_single(votes: Sequence[int]) -> list[int]:
    return [n if n > 1 else 0 for n in votes]


def _voted(fields: list[str]) -> Voted:
    usage, image, *votes = fields
    if usage not in fer2013.SPLITS:
        raise ValueError(f"Usage {usage!r}, expected one of {', '.join(fer2013.SPLITS)}")
    return Voted(fer2013.SPLITS[usage], image, _votes(votes))


def _labelled(split: str, fields: list[str]) -> Voted:
    """Image, perhaps a box, which is the whole image everywhere, and ten votes."""
    image, *rest = fields
    return Voted(split, image.strip(), _votes(rest[1:] if len(rest) == len(COLUMNS) + 1 else rest))


def _votes(fields: Sequence[str]) -> tuple[int, ...]:
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{len(fields)} votes, expected {len(COLUMNS)}: {', '.join(COLUMNS)}")
    votes = tuple(rows.whole_number(name, text, 0, 10) for name, text in zip(COLUMNS, fields, strict=True))
    if not any(votes):
        raise ValueError("no vote, expected about 10")
    return votes


def _expect_same_order(faces: Path, pixels: Sequence[rows.Row], voted: Sequence[Voted]) -> None:
    """Raises :class:`UserError` if the rows of both files are not of the same images."""
    for i, (p, v) in enumerate(zip(pixels, voted, strict=True), 1):
        if p.split != v.split:
            raise UserError(f"{faces}: got row {i} of {p.split}, expected {v.split}, as row {i} of fer2013new.csv")
    labels = [(p.label, majority(v.votes)) for p, v in zip(pixels, voted, strict=True)]
    decided = [label == EXPRESSIONS.index(winner) for label, winner in labels if winner in EXPRESSIONS]
    if len(decided) >= 100 and sum(decided) < AGREEMENT * len(decided):
        raise UserError(
            f"{faces}: got labels of which {100 * sum(decided) / len(decided):.0f} % agree with the votes of "
            "fer2013new.csv, expected most of them: the rows of one file are in another order"
        )


def _against_official(voted: Sequence[Voted]) -> list[str]:
    """Notes that compare the majorities, whatever the rule of the labels and the number of classes."""
    notes = []
    for split in OFFICIAL:
        winners = Counter(majority(v.votes) for v in voted if v.split == split)
        counts = tuple(winners[name] for name in CANONICAL)
        if counts == OLDER[split]:
            newer = sum(OFFICIAL[split])
            notes.append(f"{split} has the older votes of FERPlus: {sum(counts)} images have a majority, not {newer}")
        else:
            notes += rows.differences(f"majorities in {split} of FERPlus", CANONICAL, counts, OFFICIAL[split])
    return notes
