"""What the data sets share whose labels are rows of a file: from rows to splits, and the official counts."""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..config import UserError
from . import TRAIN, Data, Split, decode, imagefolder, listed
from .labels import CANONICAL, canonical

T = TypeVar("T")
R = TypeVar("R")
Label = int | tuple[float, ...]  # a class, or a share of each class
Part = tuple[dict[str, Split], list[str]]  # splits, and notes on them
SIDE = 48  # pixels of an image that is in a row


class Row(NamedTuple):
    """An image and its label, as a file of the data set names them."""

    split: str
    image: str  #: its name
    label: Label = 0
    left_out: str = ""  #: why the row is not used, such as "no face"
    box: decode.Box | None = None  #: of the face
    pixels: bytes = b""  #: SIDE x SIDE, where the row has the image itself


def folder_of(path: str) -> Path:
    """``--data.path`` as a folder that exists."""
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        raise UserError(f"data.path: got {path!r}, which is no folder; expected the folder of the data set")
    return folder


def nearest(root: Path, *names: str) -> Path | None:
    """The file or folder of one of the ``names`` in ``root`` or up to two folders below, the nearest one.

    Raises:
        UserError: two of the same name are equally near.
    """
    for name in names:
        for above in ("", "*/", "*/*/"):
            found = sorted(f for f in root.glob(above + name) if not any(map(decode.hidden, f.relative_to(root).parts)))
            if len(found) > 1:
                raise UserError(f"data.path: got {str(root)!r}, which holds {found[0]} and {found[1]}, expected one")
            if found:
                return found[0]
    return None


def unknown_layout(root: Path, expected: str) -> UserError:
    """What ``root`` holds in place of what was ``expected``."""
    inside = listed(sorted(f.name for f in root.iterdir() if not decode.hidden(f.name)), 8) or "nothing"
    return UserError(f"data.path: got {str(root)!r}, which holds {inside}; expected {expected}")


def table(file: Path, columns: Sequence[str]) -> list[tuple[int, list[str]]]:
    """Line number and the fields in the order of ``columns`` of each row of a CSV file with a header.

    Spaces around names and fields do not count; a row that ends early has empty fields.
    """
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
        reader = csv.reader(text)
        header = [name.strip() for name in next(reader, [])]
        if missing := [name for name in columns if name not in header]:
            raise UserError(f"{file}: got the columns {', '.join(header)}, expected {', '.join(missing)} too")
        places = [header.index(name) for name in columns]
        rows = []
        try:
            for fields in reader:
                if fields:
                    rows.append((reader.line_num, [fields[i].strip() if i < len(fields) else "" for i in places]))
        except csv.Error as error:
            rows.append((reader.line_num, [f"{error}", *[""] * (len(columns) - 1)]))
    return rows


def parse(file: Path, lines: Iterable[tuple[object, T]], one: Callable[[T], R]) -> list[R]:
    """What ``one`` makes of each line.

    Raises:
        UserError: it raised ValueError for some; all of them are counted and the first 20 named.
    """
    rows, bad = [], []
    for where, line in lines:
        try:
            rows.append(one(line))
        except ValueError as error:
            bad.append(f"line {where}: {error}" if isinstance(where, int) else f"{where}: {error}")
    if bad:
        more = [f"and {len(bad) - 20} more"] if len(bad) > 20 else []
        raise UserError("\n  ".join([f"{file}: got {len(bad)} rows that can't be used:", *bad[:20], *more]))
    return rows


def whole_number(name: str, text: str, low: int, high: int) -> int:
    """Raises ValueError unless ``text`` is a whole number from ``low`` to ``high``."""
    value = text.strip()
    if not value.isdecimal() or not low <= int(value) <= high:
        raise ValueError(f"{name} {text!r}, expected a number from {low} to {high}")
    return int(value)


class Images:
    """The images below a folder by the last ``parts`` parts of their paths.

    Another case or suffix, or a folder in between, does not matter as long as one image remains.
    """

    def __init__(self, folder: Path, parts: int = 1) -> None:
        self.folder = folder
        self.files, self.others = decode.image_files(folder)
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        for file in self.files:
            name = "/".join(file.parts[-parts:])
            for key in {name, loose(name)}:
                self.by_name[key].append(file)

    def find(self, *names: str) -> Path | None:
        """The image that has the first of the ``names`` under which one is stored, or None.

        Raises:
            ValueError: two images have that name.
        """
        for name in names:
            found = self.by_name.get(name) or self.by_name.get(loose(name)) or []
            if len(found) > 1:
                raise ValueError(f"{name} could be {found[0]} or {found[1]}, expected one image of that name")
            if found:
                return found[0]
        return None


def loose(name: str) -> str:
    """A name without its case and suffix."""
    return os.path.splitext(name.replace("\\", "/"))[0].lower() + "."


def read_files(
    root: Path,
    source: Path,
    rows: Sequence[Row],
    images: Images,
    size: int,
    spellings: Callable[[str], tuple[str, ...]] = lambda name: (name,),
) -> Part:
    """The splits of the ``rows`` of ``source``, and notes of what was left out because it lacks an image or a row.

    Args:
        spellings: the names under which a row's image may be stored, in the order of preference.

    Raises:
        UserError: no row has an image, two images have the name of one, or images can't be read.
    """
    found = parse(source, ((row.image, row) for row in rows), lambda row: images.find(*spellings(row.image)))
    by_file: dict[Path, list[Row]] = defaultdict(list)
    for file, row in zip(found, rows, strict=True):
        if file:
            by_file[file].append(row)
    if not by_file:
        expected = " or ".join(spellings(rows[0].image)) if rows else "some rows"
        raise UserError(f"{source}: got {len(rows)} rows, none with an image in {images.folder}; expected {expected}")
    contradicted = {file for file, same in by_file.items() if len({row._replace(image="") for row in same}) > 1}
    kept = {file: same[0] for file, same in by_file.items() if file not in contradicted}
    missing = [row.image for row, file in zip(rows, found, strict=True) if not file and not row.left_out]
    notes = [
        *_note(missing, f"rows of {source.name} have no image in {images.folder}"),
        *_note([f.name for f in images.files if f not in by_file], f"images in {images.folder} have no row"),
        *_note([f.name for f in images.others if f != source], f"files in {images.folder} are no images"),
        *_note([f.name for f in contradicted], f"images have rows in {source.name} that contradict each other"),
        *_reasons(source, list(kept.values())),
    ]
    splits = {}
    for split in dict.fromkeys(row.split for row in rows):
        used = {file: row for file, row in kept.items() if row.split == split and not row.left_out}
        boxes = [row.box for row in used.values()]
        splits[split] = decode.read(root, split, list(used), _targets(used.values()), size, boxes if any(boxes) else ())
    return splits, notes


def read_pixels(source: Path, rows: Sequence[Row], size: int) -> Part:
    """The splits of ``rows`` that have their images with them, and notes of what was left out."""
    splits = {}
    for split in dict.fromkeys(row.split for row in rows):
        used = [row for row in rows if row.split == split and not row.left_out]
        names, pixels = [row.image for row in used], [row.pixels for row in used]
        splits[split] = decode.read_grey(source, split, names, pixels, SIDE, _targets(used), size)
    return splits, _reasons(source, rows)


def data_of(classes: Sequence[str], folders: Sequence[str], *parts: Part) -> Data:
    """The data set of all ``parts``; a split that is to be evaluated may lack a class.

    Raises:
        UserError: "train" has no image of a class.
    """
    splits = {name: split for found, _ in parts for name, split in found.items() if len(split.labels)}
    counts = splits["train"].counts(len(classes)) if "train" in splits else [0] * len(classes)
    if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise UserError(f"data: got no training image of {', '.join(missing)}, expected some of every class")
    splits = {"train": splits["train"], **splits}
    return Data(tuple(classes), splits, tuple(folders), tuple(note for _, notes in parts for note in notes))


def _note(names: Sequence[str], what: str) -> list[str]:
    return [f"{len(names)} {what} and are left out: {listed(names, 3)}"] if names else []


def _reasons(source: Path, rows: Sequence[Row]) -> list[str]:
    """A note that counts the rows by the reason why they are not used."""
    reasons = Counter(row.left_out for row in rows if row.left_out)
    counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return [f"{reasons.total()} of {len(rows)} rows of {source} are left out: {counts}"] if reasons else []


def _targets(rows: Iterable[Row]) -> Tensor:
    """(K,) int64 classes, or (K, L) float32 label distributions."""
    labels = [row.label for row in rows]
    soft = any(isinstance(label, tuple) for label in labels)
    return torch.tensor(labels, dtype=torch.float32 if soft else torch.int64)


def from_folders(
    root: Path, layouts: str, numbers: Mapping[str, str | None], classes: Sequence[str], size: int, seed: int
) -> Data:
    """An export with a folder for each class, called by its name or by the data set's ``numbers``.

    Args:
        layouts: the other layouts of the data set, named in the error if ``root`` has none of them.
        numbers: folder -> class, or None for what is no class.
        classes: those of the data set; folders of others are left out.
    """
    inside = (f for f in sorted(root.iterdir()) if f.is_dir() and not decode.hidden(f.name))
    base = next((f for f in (root, *inside) if any(g.name.lower() in TRAIN and g.is_dir() for g in f.iterdir())), None)
    if base is None:
        raise unknown_layout(root, f"{layouts}, or train and test with a folder for each class")
    splits = imagefolder.split_folders(base)
    folders = {name: splits[split] / name for split in splits for name in imagefolder.class_folders(splits[split])}
    meanings = {name: numbers[name] if name in numbers else canonical(name) for name in folders}
    for name, folder in folders.items():
        if name not in numbers and meanings[name] not in CANONICAL:
            expected = f"{', '.join(numbers)} or {', '.join(classes)}"
            raise UserError(f"data: got the folder {folder}, expected one of {expected}; or use --data imagefolder")
    said = {name: meaning if meaning in classes else None for name, meaning in meanings.items()}
    data = imagefolder.Options(str(base), said).read(size, seed)
    if missing := [name for name in classes if name not in data.classes]:
        raise UserError(f"data: got no folder of {', '.join(missing)} in {splits['train']}, expected every class")
    left_out = sorted(name for name, meaning in said.items() if meaning is None)
    note = [f"folders that are left out: {', '.join(left_out)}"] if left_out else []
    return data._replace(notes=(*data.notes, *note))


def only_test(data: Data) -> Data:
    """``data`` with its one split besides "train" called "test", so that the best epoch is not chosen on it."""
    (name, split), *others = data.evaluated.items()
    if name == "test" or others:
        return data
    note = f"{name} is the set that results are published on, so it is called test"
    return data._replace(splits={"train": data.train, "test": split}, notes=(*data.notes, note))


def against_official(data: Data, name: str, official: Mapping[str, Sequence[int]]) -> Data:
    """``data`` with notes of how its counts differ from those of each split, in the order of ``CANONICAL``."""
    notes = []
    for split, counts in official.items():
        if split in data.splits:
            expected = [counts[CANONICAL.index(c)] for c in data.classes]
            notes += differences(f"{split} of {name}", data.classes, data.splits[split].counts(len(expected)), expected)
    return data._replace(notes=(*data.notes, *notes))


def differences(what: str, classes: Sequence[str], got: Sequence[int], official: Sequence[int]) -> list[str]:
    """A note of how ``got`` differs from the ``official`` counts.

    Raises:
        UserError: these are the official counts in another order, so that the labels mean other classes.

    >>> differences("test", ["fear", "anger"], [74, 160], [74, 162])
    ['test: 234 images, officially 236: anger 160 of 162']
    """
    pairs = list(zip(classes, got, official, strict=True))
    differ = [f"{name} {n} of {right}" for name, n, right in pairs if n != right]
    if differ and sorted(got) == sorted(official):
        raise UserError(
            f"data: got the official counts of {what} in another order ({', '.join(differ)}), "
            "expected labels in the order of the data set"
        )
    return [f"{what}: {sum(got)} images, officially {sum(official)}: {', '.join(differ)}"] if differ else []
