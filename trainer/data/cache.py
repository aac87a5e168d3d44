"""Decoded images on the disk: each is decoded once, whatever the number of runs.

A part of a data set (its train, its test …) at one size is a folder with ``pixels.npy``, (K, size, size, C) uint8,
which runs map into memory, and ``index.json``: of each image its name, a stamp by which a change of its source is
noticed, the digest of its content and a checksum of its pixels. While a part is built, finished rows are in
``pixels.part`` and ``part.json``, so that a build that was killed at any moment continues; only a complete one takes
the place of the last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import checkpoint
from ..config import UserError, listed, logger, printable

OFF = "off"
VERSION = 1  # of what pixels are made of a file: a change of decode.py that changes them raises it
PIXELS, INDEX, LOCK = "pixels.npy", "index.json", ".lock"
PIXELS_PART, INDEX_PART = "pixels.part", "part.json"  # of a build in progress
CHUNK = 256  # images that are handed to the threads at a time
SAVE_SECONDS = 10.0  # between two notes of what is finished: they name all of it, 38 MB for AffectNet

#: Where decoded images are kept while a data set is read, None for nowhere; see :func:`kept_in`.
_directory: ContextVar[Path | None] = ContextVar("directory", default=None)
_must_keep = ContextVar("must_keep", default=False)


@contextlib.contextmanager
def kept_in(place: str) -> Iterator[Path | None]:
    """Decoded images are kept in the folder ``place``: "" for :func:`default`, "off" for none; which it is."""
    directory = None if place == OFF else Path(place).expanduser() if place else default()
    token = _directory.set(directory)
    try:
        yield directory
    finally:
        _directory.reset(token)


@contextlib.contextmanager
def must_keep() -> Iterator[None]:
    """Where decoded images can't be kept, it is an error and not a note."""
    token = _must_keep.set(True)
    try:
        yield
    finally:
        _must_keep.reset(token)


def default() -> Path:
    """``REBALFER_DATA_CACHE``, or a folder in the user's cache directory."""
    if named := os.environ.get("REBALFER_DATA_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rebalfer_kernels", "data")


class Part(NamedTuple):
    """What of a data set is read: its folder, a name such as "train", the side and the channels of stored images."""

    root: Path
    name: str
    size: int
    channels: int

    @property
    def folder(self) -> str:
        """Name of its folder, the same for the same data."""
        root = self.root.resolve()
        key = hashlib.sha256(os.fsencode(f"{root}\0{self.channels}\0{VERSION}")).hexdigest()[:8]
        return f"{printable(root.name)}-{self.name}-{self.size}px-{key}"


class Sources(NamedTuple):
    """The images of a part."""

    names: Sequence[str]  #: no two are the same
    stamps: Sequence[str]  #: which differ if an image may have changed
    #: (pixels (size, size, channels) uint8, digest of the content) of the image at an index.
    decode: Callable[[int], tuple[np.ndarray, str]]
    digest: Callable[[int], str]  #: of the content alone


class Entry(NamedTuple):
    """What the index says of an image."""

    stamp: str
    digest: str
    checksum: str  #: of its pixels


def read(part: Part, sources: Sources) -> tuple[Tensor, tuple[str, ...]]:
    """The images (K, size, size, channels) uint8 and the digests of their contents, from the cache where it has them.

    Raises:
        UserError: too little memory, or images that can't be decoded: all of them are counted, the first 20 named.
            Within :func:`must_keep`, also a cache that can't be written.
    """
    directory = _directory.get()
    if directory is not None and sources.names:
        folder = directory / part.folder
        try:
            with _locked(folder):
                return _read(part, sources, folder)
        except OSError as error:
            reason = error.strerror or str(error)
            if _must_keep.get():
                raise UserError(f"output.cache: {folder} can't be written: {reason}") from error
            logger.warning("note: decoded images are not kept: %s: %s", folder, reason)
    return _decoded_in_memory(part, sources)


def _read(part: Part, sources: Sources, folder: Path) -> tuple[Tensor, tuple[str, ...]]:
    _finish(folder)
    names, index = list(sources.names), load_index(folder)
    old = {name: (i, entry) for i, (name, entry) in enumerate(index.items())} if index else {}
    unchanged = [name in old and old[name][1].stamp == s for name, s in zip(names, sources.stamps, strict=True)]
    if list(old) != names or not all(unchanged):
        index = _build(part, sources, folder, old)
    pixels = np.load(folder / PIXELS, mmap_mode="c")  # copy on write: the file never changes
    return torch.from_numpy(pixels), tuple(entry.digest for entry in index.values())


def load_index(folder: Path) -> dict[str, Entry]:
    """Name -> entry in the order of the rows; empty if the part was never finished, or its files do not fit."""
    try:
        stored = json.loads((folder / INDEX).read_text())
        entries = {name: Entry(*entry) for name, entry in stored["images"].items()}
        shape = np.load(folder / PIXELS, mmap_mode="r").shape
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries if shape == tuple(stored["shape"]) and len(entries) == shape[0] else {}


def _build(part: Part, sources: Sources, folder: Path, old: dict[str, tuple[int, Entry]]) -> dict[str, Entry]:
    """Writes the part anew; what has not changed is copied, what an interrupted build has finished is kept."""
    shape = (len(sources.names), part.size, part.size, part.channels)
    before: Any = np.load(folder / PIXELS, mmap_mode="r") if old else ()
    stamps = dict(zip(sources.names, sources.stamps, strict=True))
    with _rows_file(folder, sources.names, shape) as (file, noted):
        done = {name: entry for name, entry in noted.items() if entry.stamp == stamps[name]}

        def one(i: int) -> Entry | str:
            name, stamp = sources.names[i], sources.stamps[i]
            if name in done:
                return done[name]
            try:
                row, entry = old.get(name, (0, Entry("", "", "")))
                if name in old and (entry.stamp == stamp or sources.digest(i) == entry.digest):
                    pixels, digest = before[row], entry.digest
                else:
                    pixels, digest = sources.decode(i)
            except Exception as error:  # whatever a decoder makes of a bad file
                return _reason(error, name)
            file.write(i, pixels)
            return Entry(stamp, digest, checksum(pixels))

        entries = _in_parallel(sources.names, one, lambda so_far: file.note({**done, **so_far}))
        file.note(entries)
    (folder / INDEX).unlink(missing_ok=True)  # of other pixels than those that follow
    os.replace(folder / PIXELS_PART, folder / PIXELS)
    _finish(folder)
    return entries


def _finish(folder: Path) -> None:
    """The last step of a build, also of one that was killed just before it: its index gets its name."""
    if (folder / INDEX_PART).exists() and not (folder / INDEX).exists() and not (folder / PIXELS_PART).exists():
        os.replace(folder / INDEX_PART, folder / INDEX)


class _Rows:
    """A .npy file that is written row by row, and a note beside it of which rows are finished."""

    def __init__(self, file: BinaryIO, offset: int, row_bytes: int, note: Path, about: dict) -> None:
        self.file, self.offset, self.row_bytes, self.path, self.about = file, offset, row_bytes, note, about

    def write(self, i: int, pixels: np.ndarray) -> None:
        content = np.ascontiguousarray(pixels).tobytes()
        assert len(content) == self.row_bytes
        if os.pwrite(self.file.fileno(), content, self.offset + i * self.row_bytes) < self.row_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def note(self, done: dict[str, Entry]) -> None:
        os.fsync(self.file.fileno())
        try:
            checkpoint.write(self.path, json.dumps({**self.about, "images": done}, ensure_ascii=False))
        except UserError as error:
            raise error.__cause__ or error from None  # the OSError: read says what follows


@contextlib.contextmanager
def _rows_file(folder: Path, names: Sequence[str], shape: tuple[int, ...]) -> Iterator[tuple[_Rows, dict[str, Entry]]]:
    """``pixels.part``, as large as it will be, and the entries that an interrupted build of the same rows finished."""
    path, note = folder / PIXELS_PART, folder / INDEX_PART
    about = {"shape": list(shape), "names": hashlib.sha256("\0".join(names).encode()).hexdigest()}
    done: dict[str, Entry] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(note.read_text())
        if path.is_file() and all(stored[key] == value for key, value in about.items()):
            done = {name: Entry(*entry) for name, entry in stored["images"].items()}
    if not done:
        note.unlink(missing_ok=True)
    for stale in folder.glob(".*.tmp"):  # of a process that was killed while it wrote a note
        stale.unlink()
    with path.open("r+b" if done else "w+b") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        offset, row_bytes = file.tell(), int(np.prod(shape[1:]))
        try:
            os.posix_fallocate(file.fileno(), 0, offset + shape[0] * row_bytes)  # or a full disk would be met late
        except OSError:
            path.unlink()
            raise
        yield _Rows(file, offset, row_bytes, note, about), done
        os.fsync(file.fileno())


def _decoded_in_memory(part: Part, sources: Sources) -> tuple[Tensor, tuple[str, ...]]:
    shape = (len(sources.names), part.size, part.size, part.channels)
    try:
        images = torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        what = f"{len(sources.names)} images need {np.prod(shape) / 1e9:.1f} GB"
        raise UserError(f"image_size: got {part.size}, for which {what}") from error

    def one(i: int) -> Entry | str:
        try:
            pixels, digest = sources.decode(i)
        except Exception as error:  # whatever a decoder makes of a bad file
            return _reason(error, sources.names[i])
        images[i] = torch.from_numpy(pixels)
        return Entry("", digest, "")

    entries = _in_parallel(sources.names, one, lambda done: None)
    return images, tuple(entry.digest for entry in entries.values())


def _reason(error: Exception, name: str) -> str:
    """What an error says of an image, without its name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.replace(name, "").strip() or type(error).__name__


def _in_parallel(
    names: Sequence[str], one: Callable[[int], Entry | str], note: Callable[[dict[str, Entry]], None]
) -> dict[str, Entry]:
    """The entries by name; ``note`` is called with those so far. What ``one`` returns as a text is a bad image.

    Threads are enough: Pillow decodes and resizes without holding Python's lock.
    """
    entries: dict[str, Entry] = {}
    bad, rows, noted = [], range(len(names)), time.monotonic()
    progress = tqdm(total=len(names), desc="reading images", leave=False, disable=None)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress:
        for chunk in (rows[i : i + CHUNK] for i in rows[::CHUNK]):
            for i, entry in zip(chunk, pool.map(one, chunk), strict=True):
                if isinstance(entry, str):
                    bad.append(f"{names[i]}: {entry}")
                else:
                    entries[names[i]] = entry
            progress.update(len(chunk))
            if time.monotonic() - noted > SAVE_SECONDS:
                note(entries)
                noted = time.monotonic()
    if bad:
        note(entries)
        more = [f"and {len(bad) - 20} more"] if len(bad) > 20 else []
        raise UserError("\n  ".join([f"data: got {len(bad)} files that can't be read as images:", *bad[:20], *more]))
    return entries


def checksum(pixels: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=8).hexdigest()


@contextlib.contextmanager
def turn(lock: Path, doing: str) -> Iterator[None]:
    """One process at a time has the file ``lock``; another one waits, and says what for: "reads the images of …"."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process %s: waiting for it", doing)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes ``folder`` if need be; no other process reads or builds it at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    with turn(folder / LOCK, f"reads the images of {folder}"):
        yield


def parts(directory: Path) -> list[Path]:
    """The folders of all parts, finished or not; folders that this program has not made are none."""
    locks = directory.glob(f"*/{LOCK}") if directory.is_dir() else []
    return sorted(f.parent for f in locks if (f.parent / INDEX).exists() or (f.parent / PIXELS_PART).exists())


def damaged(folder: Path) -> list[str]:
    """The names of images whose pixels are not those that were written; [] while a part is unfinished."""
    if not (folder / INDEX).exists():
        return []
    index = load_index(folder)
    if not index:
        return [f"{INDEX}, which does not fit {PIXELS}"]
    pixels = np.load(folder / PIXELS, mmap_mode="r")
    return [name for i, (name, entry) in enumerate(index.items()) if checksum(pixels[i]) != entry.checksum]


def verify(directory: Path) -> None:
    """Prints what is damaged.

    Raises:
        UserError: something is.
    """
    bad = {folder: names for folder in parts(directory) if (names := damaged(folder))}
    for folder, names in bad.items():
        print(f"{folder}: {len(names)} damaged: {listed(names, 20)}")
    if bad:
        raise UserError(f"output.cache: got {len(bad)} damaged parts; delete their folders, runs decode them again")


def delete(directory: Path) -> None:
    """The files of all parts, and the folders that have no others."""
    for folder in parts(directory):
        for file in (PIXELS, INDEX, PIXELS_PART, INDEX_PART, LOCK):
            (folder / file).unlink(missing_ok=True)
        for stale in folder.glob(".*.tmp"):
            stale.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()
        print(f"deleted {folder}")


def listing(directory: Path) -> str:
    """A line for each part: its images and its size."""
    lines = []
    for folder in parts(directory):
        images = f"{len(index):,} images" if (index := load_index(folder)) else "unfinished"
        lines.append(f"{folder}: {images}, {sum(f.stat().st_size for f in folder.iterdir()) / 2**20:,.0f} MiB")
    return "\n".join(lines) or f"{directory}: nothing"
