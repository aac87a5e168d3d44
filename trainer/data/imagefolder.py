"""PATH/train/<class>/*.jpg and PATH/val|test|valid/<class>/*.jpg, decoded once and held in memory as uint8."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from . import EXPRESSIONS, Data, Split

if TYPE_CHECKING:
    from ..config import Config

CANONICAL = (*EXPRESSIONS, "contempt")
ALIASES = {name: name for name in CANONICAL} | {
    "surprised": "surprise",
    "fearful": "fear",
    "disgusted": "disgust",
    "happy": "happiness",
    "sad": "sadness",
    "angry": "anger",
    "contemptuous": "contempt",
}
RAFDB = {str(i + 1): name for i, name in enumerate(EXPRESSIONS)}  # the files of RAF-DB count from 1
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def class_names(folders: list[str]) -> dict[str, str]:
    """Folder name to class name, in class order.

    RAF-DB's 1 to 7 and names of expressions (happy, Sad, anger, ...) come in the canonical order; anything else keeps
    its name, in alphabetical order.

    Raises:
        ValueError: two folders mean the same class.
    """
    names = RAFDB if sorted(folders) == sorted(RAFDB) else {f: ALIASES.get(f.lower(), "") for f in folders}
    if not all(names.values()):
        return {f: f for f in sorted(folders)}
    for name in CANONICAL:
        if len(same := sorted(f for f in folders if names[f] == name)) > 1:
            raise ValueError(f"data: got the folders {' and '.join(same)}, expected one folder for {name}")
    return {f: names[f] for f in sorted(folders, key=lambda f: CANONICAL.index(names[f]))}


def load(path: str, config: Config) -> Data:
    """Raises ValueError if a folder is missing, a class has no training image, or a file can't be read."""
    root = Path(path)
    train = root / "train"
    test = next((root / part for part in ("val", "test", "valid") if (root / part).is_dir()), None)
    if not train.is_dir() or test is None:
        found = ", ".join(sorted(f.name for f in root.iterdir())[:8]) if root.is_dir() else "nothing"
        raise ValueError(
            f"data: got 'imagefolder:{path}', which holds {found or 'nothing'}; "
            "expected the folders train and val (or test, or valid), each with a folder for every class"
        )
    names = class_names(_folders(train))
    classes = tuple(names.values())
    tested = class_names(_folders(test))
    if unknown := sorted(set(tested.values()) - set(classes)):
        raise ValueError(f"data: got the classes {unknown} in {test}, expected those of {train}: {sorted(classes)}")
    for folder in names:
        if not _files(train / folder):
            raise ValueError(f"data: got no image in {train / folder}, expected {', '.join(sorted(SUFFIXES))}")

    def split(part: Path, folders: dict[str, str]) -> Split:
        files = [(f, classes.index(name)) for folder, name in folders.items() for f in _files(part / folder)]
        if not files:
            raise ValueError(f"data: got no image in {part}, expected {', '.join(sorted(SUFFIXES))}")
        return _read(files, config.image_size)

    return Data(classes, split(train, names), split(test, tested), folders=tuple(names))


def _folders(root: Path) -> list[str]:
    folders = sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(
            f"data: got {len(folders)} class folders and {len(_files(root))} images in {root}, "
            "expected at least two folders, one for each class, with its images inside"
        )
    return folders


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)


def _read(files: list[tuple[Path, int]], size: int) -> Split:
    def pixels(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"data: got {file}, which can't be read as an image: {error}") from error

    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(4) as pool:
        decoded = pool.map(pixels, (f for f, _ in files))
        for i, array in enumerate(tqdm(decoded, total=len(files), desc="reading images", leave=False)):
            images[i] = torch.from_numpy(array.copy()).movedim(-1, 0)
    return Split(images, torch.tensor([label for _, label in files]))
