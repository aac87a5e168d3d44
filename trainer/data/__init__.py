"""The data sets, one file each, held in memory as uint8, and what holds for all of them.

A new data set is one file: a frozen dataclass ``Options`` with :class:`DataOptions` as its base, whose fields become
``--data.FIELD`` and whose ``read`` returns a :class:`Data`. ``labels`` maps folders to the canonical classes,
``decode`` turns files into pixels; ``imagefolder`` shows both. What is done to every data set is done by
:func:`prepare`: an artificial imbalance, the held-out part, duplicates across splits.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config, Named, UserError, listed
from . import imbalance

#: What the folder of a split may be called, in the order in which one is chosen to choose the best epoch.
TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev")
TEST = ("test", "testing")
HELD_OUT = "held-out"


class Split(NamedTuple):
    """Images of one purpose."""

    images: Any  #: (K, H, W, 1 or 3) uint8 tensor, or the ``views.Activations`` that take its place
    labels: Tensor  #: (K,) int64 classes, or (K, L) float32 label distributions
    names: tuple[str, ...] = ()  #: of the K files, relative to the data's folder; () if the images come from none
    digests: tuple[str, ...] = ()  #: of the content of each file

    @property
    def hard(self) -> Tensor:
        """(K,) int64: the class, or the most likely one."""
        return self.labels.argmax(1) if self.labels.is_floating_point() else self.labels

    def at(self, rows: Tensor) -> Split:
        """The images ``rows`` (k,) int64 on the CPU."""
        pick = rows.tolist()
        names, digests = (tuple(of[i] for i in pick) if of else () for of in (self.names, self.digests))
        return Split(self.images[rows], self.labels[rows], names, digests)

    def one_of_each(self, only: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """The first image of each class that there is, or of ``only`` these, and the classes."""
        labels = [c for c in self.hard.cpu().unique().tolist() if only is None or c in only]
        rows = torch.tensor([(self.hard.cpu() == c).nonzero()[0, 0].item() for c in labels])
        return self.images[rows].cpu(), labels

    def to(self, device: torch.device) -> Split:
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))

    def counts(self, num_classes: int) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(torch.bincount(self.hard, minlength=num_classes).tolist())


class Data(NamedTuple):
    """A data set as a run uses it."""

    classes: tuple[str, ...]
    splits: dict[str, Split]  #: "train" and those to evaluate, by the names that they have on disk
    folders: tuple[str, ...] = ()  #: what each class is called on disk, where that differs
    notes: tuple[str, ...] = ()  #: what the user should know: files left out, folders unmapped, images twice
    chooser: str = ""  #: the split that chooses the best epoch, set by :func:`prepare`

    @property
    def train(self) -> Split:
        return self.splits["train"]

    @property
    def evaluated(self) -> dict[str, Split]:
        return {name: split for name, split in self.splits.items() if name != "train"}

    @property
    def reported(self) -> str:
        """The name of the split that pictures and studies are of."""
        return "test" if "test" in self.splits else self.chooser

    @property
    def counts(self) -> tuple[int, ...]:
        """Training images of each class."""
        return self.train.counts(len(self.classes))

    def identity(self) -> dict:
        """Plain values that say which images under which labels these are, wherever the folder is."""
        return {
            "classes": list(self.classes),
            "counts": {name: list(split.counts(len(self.classes))) for name, split in self.splits.items()},
            "files": {
                name: "\n".join(f"{n}\t{d}" for n, d in zip(split.names, split.digests, strict=True))
                for name, split in self.splits.items()
            },
        }


class DataOptions(Named, group="data"):
    """Base of each data set's ``Options``."""

    def read(self, image_size: int, seed: int) -> Data:
        """All splits at ``image_size`` pixels a side; "train" has an image of every class.

        Raises:
            UserError: a folder, a class or a file is not what it should be; all bad files are named together.
        """
        raise NotImplementedError


def prepare(config: Config) -> Data:
    """The data set that ``config`` names, thinned if asked for, with a split that chooses the best epoch."""
    from . import folds  # which imports this file

    groups = folds.read_groups(config.split.groups) if config.split.groups else None
    data = _read(config, lambda: config.data.read(config.image_size, config.seed))
    if config.split.folds:
        data = folds.regrouped(data, config.split, groups)
    train, notes = data.train, list(data.notes)
    if config.split.imbalance:
        rows, note = imbalance.thin(train.hard, data.counts, config.split.imbalance, config.seed)
        train = train.at(rows)
        notes.append(note)
    splits = {**data.splits, "train": train}
    wanted = TEST if config.split.choose_on == "test" else ()
    chooser = next((name for name in (*wanted, *VALIDATION) if name in splits), HELD_OUT)
    if chooser == HELD_OUT:
        kept, held = _hold_out(train.hard, config.split.hold_out, config.seed)
        splits = {
            "train": train.at(kept),
            HELD_OUT: train.at(held),
            **{k: v for k, v in splits.items() if k != "train"},
        }
    notes += duplicates(splits)
    return data._replace(splits=splits, notes=tuple(notes), chooser=chooser)


def _hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out: that share of every class, and at least one image on either side."""
    random = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=random)]
        n = min(max(1, round(share * len(rows))), len(rows) - 1)
        kept.append(rows[n:])
        held.append(rows[:n])
    if not sum(map(len, held)):
        raise UserError("split.hold_out: got one image of each class in train, expected more, or a val folder")
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def evaluated(config: Config, classes: tuple[str, ...]) -> Data:
    """The data set that ``config`` names, or all that a folder without train has, under a checkpoint's classes."""
    if hasattr(config.data, "without_train") and config.data.without_train():
        return _read(config, lambda: config.data.read_evaluated(classes, config.image_size))
    return prepare(config)


def _read(config: Config, read: Callable[[], Data]) -> Data:
    from . import cache  # which imports this file

    try:
        with cache.kept_in(config.output.cache):
            return read()
    except OSError as error:
        raise UserError(f"data: got {error.filename}, which can't be read: {error.strerror}") from error


def duplicates(splits: dict[str, Split]) -> list[str]:
    """A line for each two splits that share files of the same content."""
    lines, names = [], list(splits)
    for i, a in enumerate(names):
        first = dict(zip(splits[a].digests, splits[a].names, strict=True))
        for b in names[i + 1 :]:
            twice = [(n, first[d]) for n, d in zip(splits[b].names, splits[b].digests, strict=True) if d in first]
            if twice:
                lines.append(
                    f"{len(twice)} images of {b} are in {a} too: " + listed([f"{x} = {y}" for x, y in twice], 3)
                )
    return lines


def changes(saved: dict, now: dict) -> list[str]:
    """What differs between two :meth:`Data.identity`, in words."""
    found = []
    if saved["classes"] != now["classes"]:
        found.append(f"classes {saved['classes']} -> {now['classes']}")
    for split in {**saved["counts"], **now["counts"]}:
        was, is_ = (x["counts"].get(split, "none") for x in (saved, now))
        if was != is_:
            found.append(f"images of {split} {was} -> {is_}")
        before, after = (dict(f.split("\t") for f in x["files"].get(split, "").split("\n") if f) for x in (saved, now))
        for word, names in (
            ("new", after.keys() - before.keys()),
            ("missing", before.keys() - after.keys()),
            ("changed", [name for name in after.keys() & before.keys() if after[name] != before[name]]),
        ):
            if names:
                found.append(f"{len(names)} {word} files in {split}: {listed(sorted(names), 3)}")
    return found


def describe(data: Data) -> str:
    """Index, class, folder and image counts of each split, a line for each class; then the notes."""
    folders = data.folders or data.classes
    counts = [split.counts(len(data.classes)) for split in data.splits.values()]
    rows = [("index", "class", "folder", *data.splits)]
    rows += [(str(i), name, folders[i], *(str(c[i]) for c in counts)) for i, name in enumerate(data.classes)]
    notes = [f"note: {note}" for note in data.notes]
    return "\n".join([table(rows, left=(1, 2)), *notes, f"the best epoch is chosen on {data.chooser}"])


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns as wide as their texts, numbers to the right."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - _width(text)) for text, width in zip(row, widths, strict=True)]
        lines.append(
            "  ".join(t + gap if i in left else gap + t for i, (t, gap) in enumerate(zip(row, gaps, strict=True)))
        )
    return "\n".join(line.rstrip() for line in lines)


def _width(text: str) -> int:
    """Columns of a terminal: two for the wide letters of East Asia, none for an accent by itself.

    >>> _width("fear"), _width("恐れ"), _width("e\u0301")
    (4, 4, 1)
    """
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)
