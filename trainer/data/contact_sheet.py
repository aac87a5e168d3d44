"""One picture of images before and after their alignment, by which a person sees what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .. import checkpoint
from . import align, crops, decode

SIDE, TEXT, COLUMNS = 128, 26, 6  # pixels of a picture and of the lines below it; pairs beside each other
GOOD, WORST, BAD = 24, 12, 24  # images that are shown at most: of all, of those that fit worst, of those without a crop
COLOURS = ("red", "lime", "yellow", "cyan", "magenta")  # of the five points


def chosen(rows: Sequence[crops.Row]) -> list[crops.Row]:
    """Rows at equal distances, those that fit the template worst, and those without a crop."""
    aligned = [row for row in rows if row.status == crops.ALIGNED]
    worst = sorted(aligned, key=lambda row: row.error or 0, reverse=True)[: min(WORST, len(aligned) // 3)]
    rest = [row for row in aligned if row not in worst]
    return _spread(rest, GOOD) + worst + _spread([row for row in rows if row.status != crops.ALIGNED], BAD)


def _spread(rows: Sequence[crops.Row], most: int) -> list[crops.Row]:
    step = max(1, len(rows) / most)
    return [rows[int(i * step)] for i in range(min(most, len(rows)))]


def draw(path: Path, rows: Sequence[crops.Row], settings: crops.Settings) -> None:
    """A pair for each of the ``rows``: the image with its points and its crop's outline, and the crop, beside ``path``.

    Raises:
        UserError: the picture can't be written.
    """
    height, width = SIDE + TEXT, 2 * SIDE + 8
    lines = -(-len(rows) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(rows)) * width, lines * height), "white")
    ink = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        x, y = i % COLUMNS * width, i // COLUMNS * height
        sheet.paste(_before(row, settings), (x, y))
        if row.crop:
            with Image.open(path.parent / row.crop) as crop:
                sheet.paste(crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x + SIDE, y))
        fits = "" if row.error is None else f", error {100 * row.error:.1f} %"
        colour = "black" if row.status == crops.ALIGNED else "red"
        ink.text((x + 2, y + SIDE + 1), _short(row.file, tail=True), colour)
        ink.text((x + 2, y + SIDE + 13), _short(f"{row.status}{fits} {row.reason}"), colour)
    with checkpoint.replacing(path) as file:
        sheet.save(file, "png")


def _before(row: crops.Row, settings: crops.Settings) -> Image.Image:
    """The whole image, its points and where its crop is; grey if it can't be read."""
    picture = Image.new("RGB", (SIDE, SIDE), "grey")
    try:
        image = decode.upright((Path(settings.source) / row.file).read_bytes())
    except Exception:  # as before, which the row says
        return picture
    scale = SIDE / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    ink = ImageDraw.Draw(small)
    if row.points:
        points = np.array(row.points).reshape(5, 2)
        found = align.similarity(points, align.template(settings.size, settings.margin))
        ends = settings.size * np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) - 0.5
        ink.line([(x, y) for x, y in ((found.inverse(ends) + 0.5) * scale).tolist()], "white")
        for colour, (x, y) in zip(COLOURS, ((points + 0.5) * scale).tolist(), strict=True):
            ink.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
    picture.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return picture


def _short(text: str, tail: bool = False) -> str:
    """What fits below a pair, in letters that Pillow's own font has."""
    text, most = text.encode("ascii", "replace").decode(), 2 * SIDE // 6
    return text if len(text) <= most else f"...{text[3 - most :]}" if tail else f"{text[: most - 3]}..."
