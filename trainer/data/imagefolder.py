"""PATH/train/<class>/*.jpg and PATH/val|test|valid/<class>/*.jpg, held in memory as uint8."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from PIL import Image

from . import EXPRESSIONS, Data, Split

logger = logging.getLogger(__name__)

_ALIASES = {
    **{name: name for name in EXPRESSIONS},
    **{str(i + 1): name for i, name in enumerate(EXPRESSIONS)},  # RAF-DB's 1-based folders
    "happy": "happiness", "sad": "sadness", "angry": "anger", "surprised": "surprise", "fearful": "fear",
    "disgusted": "disgust",
}  # fmt: skip
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def class_order(folders: list[str]) -> list[str]:
    """Folder names in the canonical order of expressions, or alphabetical if they are something else."""
    known = {f: _ALIASES.get(f.lower()) for f in folders}
    if all(known.values()) and len(set(known.values())) == len(folders):
        return sorted(folders, key=lambda f: EXPRESSIONS.index(known[f] or ""))
    return sorted(folders)


def load(path: str, *, image_size: int) -> Data:
    root = Path(path)
    train = root / "train"
    test = next((root / s for s in ("val", "test", "valid") if (root / s).is_dir()), None)
    if not train.is_dir() or test is None:
        raise ValueError(f"data: got imagefolder:{path}, expected the folders train and val (or test, valid) in it")
    folders = class_order([f.name for f in train.iterdir() if f.is_dir()])
    if len(folders) < 2:
        raise ValueError(
            f"data: got {len(folders)} class folders in {train}, expected one folder per class, two or more"
        )
    classes = tuple(_ALIASES.get(f.lower(), f) for f in folders)
    data = Data(classes, _read(train, folders, image_size), _read(test, folders, image_size))
    for i, (folder, name) in enumerate(zip(folders, classes, strict=True)):
        logger.info(
            "class %d %s (folder %s): %d train, %d test",
            i, name, folder, int((data.train.labels == i).sum()), int((data.test.labels == i).sum()),
        )  # fmt: skip
    return data


def _read(root: Path, folders: list[str], size: int) -> Split:
    files = [
        (f, i) for i, c in enumerate(folders) for f in sorted((root / c).glob("*")) if f.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise ValueError(f"data: got no images under {root}, expected {', '.join(sorted(_SUFFIXES))}")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for row, (file, _) in zip(images, files, strict=True):
        with Image.open(file) as image:
            pixels = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            row.copy_(
                torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(size, size, 3).movedim(2, 0)
            )
    return Split(images, torch.tensor([i for _, i in files]))
