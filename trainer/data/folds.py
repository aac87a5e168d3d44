"""All images of a data set in parts of about the same size and mix of classes, one of which is the test."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import SplitOptions, UserError
from . import Data, Split


def regrouped(data: Data, options: SplitOptions, of_file: dict[str, str] | None) -> Data:
    """``data`` with the splits "train" and "test": part ``options.fold`` of ``options.folds``, and all other images.

    With the group ``of_file``, images of one group are all in one part.

    Raises:
        UserError: an image without a group, or a class without an image in train.
    """
    splits = list(data.splits.values())
    if len({split.images.shape[1:] for split in splits}) > 1 or len({split.labels.dim() for split in splits}) > 1:
        raise UserError("split.folds: got splits with images or labels of different shapes, expected the same")
    names = tuple(name for split in splits for name in split.names)
    digests = tuple(digest for split in splits for digest in split.digests)
    whole = Split(torch.cat([s.images for s in splits]), torch.cat([s.labels for s in splits]), names, digests)
    groups = list(range(len(whole.labels))) if of_file is None else _groups(options.groups, of_file, names)
    part = parts(whole.hard, groups, options.folds)
    train, test = ((part != options.fold).nonzero()[:, 0], (part == options.fold).nonzero()[:, 0])
    chosen = {"train": whole.at(train), "test": whole.at(test)}
    counts = chosen["train"].counts(len(data.classes))
    if 0 in counts:
        raise UserError(f"split.folds: got {options.folds}, with no image of {data.classes[counts.index(0)]} in train")
    note = f"part {options.fold} of {options.folds} parts of all {len(whole.labels)} images is the test"
    return data._replace(splits=chosen, notes=(*data.notes, note))


def parts(labels: Tensor, groups: list, number: int) -> Tensor:
    """(K,) int64: the part of each image; those of one group are together.

    Groups, the largest first, go to the part that then has the least of their classes, each class weighed by one over
    its number of images.

    >>> parts(torch.tensor([0, 0, 0, 1, 1, 0]), ["a", "a", "b", "b", "c", "d"], 2)
    tensor([0, 0, 1, 1, 0, 1])
    """
    num_classes = int(labels.max()) + 1
    share = 1 / labels.bincount(minlength=num_classes).clamp(min=1).double()
    members: dict = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    counts = {group: labels[rows].bincount(minlength=num_classes) * share for group, rows in members.items()}
    filled = torch.zeros(number, num_classes, dtype=torch.double)
    part = torch.empty(len(labels), dtype=torch.int64)
    for group in sorted(members, key=lambda g: (-float(counts[g].max()), members[g])):
        target = int((filled * counts[group]).sum(1).argmin())
        filled[target] += counts[group]
        part[members[group]] = target
    return part


def read_groups(name: str) -> dict[str, str]:
    """File -> its group, by the first two columns of a CSV with a header.

    Raises:
        UserError: a file that can't be read.
    """
    path = Path(name).expanduser()
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row][1:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"split.groups: got {path}, which can't be read: {error}") from error
    if bad := next((row for row in rows if len(row) < 2), None):
        raise UserError(f"split.groups: got the row {bad} in {path}, expected a file and its group")
    return {row[0]: row[1] for row in rows}


def _groups(path: str, known: dict[str, str], names: tuple[str, ...]) -> list[Any]:
    if not names:
        raise UserError(f"split.groups: got {path} for data whose images come from no files")
    if missing := [name for name in names if name not in known]:
        raise UserError(f"split.groups: got {path}, which lacks {len(missing)} images, such as {missing[0]}")
    return [known[name] for name in names]
