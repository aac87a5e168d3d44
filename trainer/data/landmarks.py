"""Five points of a face in each image, from the files that data sets have them in.

RAF-DB          Annotation/manual/train_00001_manu_attri.txt, five points by hand and three lines of attributes; or
                Annotation/auto/train_00001_auto_attri.txt, 37 points by a program; of the images in Image/original
AffectNet       2017: the column facial_landmarks, "x;y;x;y; ..." of 68 points; 2021: annotations/0_lnd.npy, the same
anything else   a CSV file with the columns file, x1, y1, ... x5, y5, in the order of ``align.TEMPLATE``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config import UserError, listed
from . import decode, rows

Points = np.ndarray | str  #: (5, 2), or why an image has none

PLAIN = ("file", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy"))
AFFECTNET = ("subDirectory_filePath", "facial_landmarks")

#: Number of points -> those of the left eye, the right eye, the nose's tip, the mouth's left and right corner.
FIVE: dict[int, tuple[Sequence[int], ...]] = {
    5: ([0], [1], [2], [3], [4]),
    37: (range(13, 19), range(19, 25), [7], [25], [31]),
    68: (range(36, 42), range(42, 48), [30], [48], [54]),
}


def read(path: Path) -> dict[str, Points]:
    """Name of an image -> its points, of a CSV file or of a folder of a data set.

    Raises:
        UserError: no landmarks there, or columns of other names.
    """
    if path.is_file():
        return _table(path)
    for pattern, ending, one in FILES:
        if found := sorted(f for f in path.rglob(pattern) if not decode.hidden(f.name)):
            return {_image(f.relative_to(path), ending): _tried(one, f) for f in found}
    tables = (
        [f for name in ("training.csv", "validation.csv") if (f := rows.nearest(path, name))] if path.is_dir() else []
    )
    if not tables:
        kinds = ", ".join(pattern for pattern, _, _ in FILES)
        raise UserError(f"landmarks: got {str(path)!r}, expected a CSV file or a folder with {kinds} or training.csv")
    return {name: points for table in tables for name, points in _table(table).items()}


def assign(points: Mapping[str, Points], root: Path, images: Sequence[Path]) -> dict[Path, Points]:
    """Image below ``root`` -> its points: by its path from there, or by as many last parts of it as the name has.

    Another case or suffix does not matter where it leaves one image.
    """
    whole: dict[str, list[Path]] = defaultdict(list)
    ends: dict[str, list[Path]] = defaultdict(list)
    depths = {name.count("/") + 1 for name in points}
    for image in images:
        for names, name in ((whole, image.relative_to(root).as_posix()), *((ends, _end(image, d)) for d in depths)):
            for key in {name, rows.loose(name)}:
                names[key].append(image)
    found: dict[Path, Points] = {}
    for name, value in points.items():
        keys = (name, rows.loose(name))
        same: list[Path] = next((names[key] for key in keys for names in (whole, ends) if key in names), [])
        for image in same:
            if len(same) > 1:
                found[image] = f"{name} could be {listed([str(f) for f in same], 2)}"
            else:
                found[image] = "two rows have its name" if image in found else value
    return found


def _end(file: Path, parts: int) -> str:
    return "/".join(file.parts[-parts:])


def five(values: Sequence[float]) -> np.ndarray:
    """(5, 2) of the x and y of 5, 37 or 68 points.

    Raises:
        ValueError: other numbers of points.
    """
    count, odd = divmod(len(values), 2)
    if odd or count not in FIVE:
        raise ValueError(f"{len(values)} numbers, expected x and y of {', '.join(map(str, FIVE))} points")
    points = np.asarray(values, np.float64).reshape(count, 2)
    return np.stack([points[list(which)].mean(0) for which in FIVE[count]])


def _table(file: Path) -> dict[str, Points]:
    with file.open(encoding="utf-8-sig", errors="replace") as text:
        affectnet = AFFECTNET[1] in text.readline()
    found: dict[str, Points] = {}
    for _, (name, *fields) in rows.table(file, AFFECTNET if affectnet else PLAIN):
        name = name.replace("\\", "/").removeprefix("./")
        points = _tried(_numbers, fields[0].split(";") if affectnet else fields)
        twice = name in found and not np.array_equal(found[name], points)
        found[name] = f"two rows of {file.name} contradict each other" if twice else points
    return found


def _tried(one: Callable, source: object) -> Points:
    try:
        return one(source)
    except (ValueError, OSError, EOFError) as error:
        return f"{source.name}: {error}" if isinstance(source, Path) else str(error)


def _numbers(fields: Sequence[str]) -> np.ndarray:
    for field in fields:
        try:
            float(field)
        except ValueError:
            raise ValueError(f"a coordinate is {field!r}, expected a number") from None
    return five([float(field) for field in fields])


def _by_hand(file: Path) -> np.ndarray:
    return _numbers(file.read_text(errors="replace").split()[:10])  # gender, race and age follow


def _by_program(file: Path) -> np.ndarray:
    return _numbers(file.read_text(errors="replace").split())


def _array(file: Path) -> np.ndarray:
    return five(np.load(file, allow_pickle=False).astype(np.float64).ravel().tolist())


def _image(file: Path, ending: str) -> str:
    """The name of the image of a file of landmarks, whose suffix does not matter."""
    name = file.name.removesuffix(ending) + ".jpg"
    if ending != LND:
        return name  # RAF-DB's images are in a folder of their own, and no two have one name
    return "/".join([*("images" if part == "annotations" else part for part in file.parts[:-1]), name])


LND = "_lnd.npy"
#: What a folder of landmarks is recognised by, in the order of preference; the ending; what reads a file.
FILES: tuple[tuple[str, str, Callable[[Path], np.ndarray]], ...] = (
    ("*_manu_attri.txt", "_manu_attri.txt", _by_hand),
    ("*_auto_attri.txt", "_auto_attri.txt", _by_program),
    (f"*{LND}", LND, _array),
)
