"""Crops of faces that are all in the same place, from a folder of images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..config import UserError, expect, option
from ..data import contact_sheet, crops, decode


@dataclass(frozen=True)
class Options(crops.Settings):
    """aligned crops of faces: eyes, nose and mouth of all images at the same pixels"""

    out: str = option("", "the new folder: the crops, align.csv and contact_sheet.png", positional=True)
    workers: int = option(0, "threads; 0: one for each CPU core, 16 at most", low=0)
    resume: bool = option(False, "continue in the folder of an earlier start: images that have no crop yet")

    def run(self) -> None:
        out = Path(self.out).expanduser()
        expect(Path(self.source).expanduser().is_dir(), "source", self.source, "a folder of images")
        settings = self.resolved()
        rows, others = crops.make(settings, out, self.workers or min(16, os.cpu_count() or 1), self.resume)
        contact_sheet.draw(out / decode.SHEET, contact_sheet.chosen(rows), settings)
        print(crops.summary(rows, others))
        print(f"{out}: {self.size} x {self.size} pixels, {decode.RECORD}, {decode.SHEET}")
        if not any(row.crop for row in rows):
            raise UserError(f"source: got {len(rows)} images, none of which could be aligned; {decode.RECORD} says why")
