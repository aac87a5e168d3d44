"""Files to pixels: every decoder that Pillow has, one meaning of 16 bits, alpha and orientation, odd files named."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..config import UserError, printable
from . import Split, cache
from .labels import natural

SYSTEM = {"@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini"}
RECORD, SHEET = "align.csv", "contact_sheet.png"  # what `align` writes beside its crops
Image.init()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # LARGEST is what holds here
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
Box = tuple[float, float, float, float]  # left, upper, width and height in pixels
SMALLEST, LONGEST, LARGEST = 8, 8, 100_000_000  # pixels of the short side; long side over short; pixels in all


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files below ``folder`` that are or should be images, and the rest; dot files and system files are in neither.

    A file is one by its suffix, or because Pillow knows how it begins.
    """
    files = sorted(_walk(folder, set()), key=lambda f: [natural(part) for part in f.relative_to(folder).parts])
    is_image = [f.suffix.lower() in SUFFIXES or _opens(f) for f in files]
    return list(compress(files, is_image)), [f for f, yes in zip(files, is_image, strict=True) if not yes]


def found(names: Sequence[str]) -> list[Path]:
    """The image files of these names, and those in the folders of these names.

    Raises:
        UserError: there is no such file or folder, or no image in a folder.
    """
    files: list[Path] = []
    for path in (Path(name).expanduser() for name in names):
        if not path.exists():
            raise UserError(f"images: got {path}, expected a file or folder that exists")
        inside = image_files(path)[0] if path.is_dir() else [path]
        if not inside:
            raise UserError(f"images: got the folder {path}, which has no images")
        files += inside
    return files


def hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system or to this program, and not to the data."""
    return name.startswith(".") or name in SYSTEM or name in (RECORD, SHEET)


def _walk(folder: Path, seen: set[str]) -> list[Path]:
    """Through links too, but into no folder twice."""
    if (real := os.path.realpath(folder)) in seen:
        return []
    seen.add(real)
    inside = [f for f in folder.iterdir() if not hidden(f.name)]
    return [f for f in inside if not f.is_dir()] + [g for f in inside if f.is_dir() for g in _walk(f, seen)]


def _opens(file: Path) -> bool:
    try:
        with Image.open(file):
            return True
    except Exception:  # whatever a decoder makes of a file that is no image
        return False


def decode(content: bytes, size: int, box: Box | None = None) -> np.ndarray:
    """(size, size, 3) uint8 RGB of a file's content or of its part in ``box``; see :func:`upright`."""
    image = upright(content)
    return _resized(image.crop(_inside(box, image)) if box else image, size)


def upright(content: bytes) -> Image.Image:
    """The RGB image of a file's content, upright by its EXIF orientation.

    16 bits become the upper 8; transparent pixels show mid-grey, which is 0 to the network; of an animation the first
    picture counts.

    Raises:
        ValueError: an image too small, too long or too large, or of floating-point pixels. Whatever Pillow raises for
        content that it can't decode.
    """
    with _open(content) as image:
        short, long = sorted(image.size)
        if short < SMALLEST or long > LONGEST * short or short * long > LARGEST:
            raise ValueError(
                f"{image.width} x {image.height} pixels, expected a side of at least {SMALLEST}, "
                f"sides within 1 to {LONGEST} and at most {LARGEST // 1_000_000} million pixels"
            )
        image.load()
        turned = _eight_bits(ImageOps.exif_transpose(image))
    if "A" in turned.getbands() or "transparency" in turned.info:
        rgba = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", rgba.size, (128, 128, 128, 255)), rgba)
    return turned.convert("RGB")


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("no image, or of a kind that Pillow does not read" if content else "empty") from None


def _resized(image: Image.Image, size: int) -> np.ndarray:
    return np.atleast_3d(np.array(image.resize((size, size), Image.Resampling.BILINEAR)))


def _inside(box: Box, image: Image.Image) -> tuple[float, float, float, float]:
    """Left, upper, right and lower end of ``box`` in the image, most of which must be inside."""
    left, upper, width, height = box
    ends = max(left, 0), max(upper, 0), min(left + width, image.width), min(upper + height, image.height)
    seen = max(ends[2] - ends[0], 0) * max(ends[3] - ends[1], 0)
    if min(ends[2] - ends[0], ends[3] - ends[1]) < SMALLEST or 2 * seen < width * height:
        raise ValueError(
            f"the face box at ({left:g}, {upper:g}) of {width:g} x {height:g} pixels, expected one inside the image's "
            f"{image.width} x {image.height}; is the image cropped already?"
        )
    return ends


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected whole numbers of 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of 32 bits, expected 8 or 16")
    return Image.fromarray((values >> 8).astype(np.uint8))


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def read(
    root: Path, part: str, files: Sequence[Path], labels: Tensor, size: int, boxes: Sequence[Box | None] = ()
) -> Split:
    """The split of ``files`` under ``root``, each image cropped to its box if there are ``boxes``.

    Args:
        part: what the cache calls them.

    Raises:
        UserError: too little memory; or files that can't be read, all of them counted and the first 20 named.
    """

    def box_of(i: int) -> Box | None:
        return boxes[i] if boxes else None

    def decoded(i: int) -> tuple[np.ndarray, str]:
        content = files[i].read_bytes()
        return decode(content, size, box_of(i)), digest(content)

    def stamp(i: int) -> str:
        try:
            found = files[i].stat()
        except OSError:
            return "missing"  # which decoded says
        return f"{found.st_size} {found.st_mtime_ns} {box_of(i) or ''}"

    def unchanged(i: int) -> str:
        return "" if boxes else digest(files[i].read_bytes())

    names = tuple(printable(f.relative_to(root).as_posix()) for f in files)
    place = printable(str(root.resolve()))  # the same however it was spelt
    stamps = [stamp(i) for i in range(len(files))]
    sources = cache.Sources([os.path.join(place, name) for name in names], stamps, decoded, unchanged)
    kept = cache.Part(root, f"{part}-cropped" if boxes else part, size, 3)  # the same files have other pixels then
    images, digests = cache.read(kept, sources)
    return Split(images, labels, names, digests)


def read_unlabelled(files: Sequence[Path], size: int) -> Tensor:
    """(K, size, size, 3) uint8 of files whose labels are not known, as :func:`read` decodes them."""
    labels = torch.zeros(len(files), dtype=torch.int64)
    return read(Path("/"), "predict", [file.absolute() for file in files], labels, size).images


def read_grey(
    source: Path, part: str, names: Sequence[str], pixels: Sequence[bytes], side: int, labels: Tensor, size: int
) -> Split:
    """The split of grey images that are no files but rows of ``source``: ``side`` x ``side`` bytes each."""

    def resized(i: int) -> tuple[np.ndarray, str]:
        return _resized(Image.frombytes("L", (side, side), pixels[i]), size), digest(pixels[i])

    stamps = [digest(content) for content in pixels]
    images, digests = cache.read(
        cache.Part(source, part, size, 1), cache.Sources(names, stamps, resized, lambda i: stamps[i])
    )
    return Split(images, labels, tuple(names), digests)
