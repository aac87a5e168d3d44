"""Checkpoints: state dicts and plain values, never whole modules, with a checksum of every byte."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .config import UserError, one_line

MARK = b"\nsha256 "
TAIL = len(MARK) + 64


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file that becomes ``path`` when all is written and on the disk: nobody ever meets half of it.

    What it replaces is then called ``keep``, if that is given; there is a whole file at ``path`` at every moment.

    Raises:
        UserError: the disk is full or the folder can't be written; what was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            _copy(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """A file of text, atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def _copy(path: Path, to: Path) -> None:
    """A hard link, where the file system has them."""
    temporary = to.with_name(f".{to.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, to)


def save(path: Path, state: dict, keep: Path | None = None) -> None:
    """Atomically: the file of ``torch.save`` and then its checksum, which torch.load ignores; see :func:`replacing`."""
    content = io.BytesIO()
    torch.save(state, content)
    with replacing(path, keep) as file:
        file.write(content.getbuffer())
        file.write(_tail(content.getbuffer()))


def read(path: Path) -> dict[str, Any]:
    """The state on the CPU; runs no code of the file.

    Raises:
        UserError: no such file, or one that is damaged or no checkpoint of this program.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a checkpoint of a run")
    content = path.read_bytes()
    state, tail = content[:-TAIL], content[-TAIL:]
    if not tail.startswith(MARK):
        problem = "it does not end with a checksum, so it was cut off or another program wrote it"
    elif tail != _tail(state):
        problem = "its checksum differs, so bytes of it have changed"
    else:
        try:
            return torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")
        except Exception as error:  # the bytes are as they were written, so another program or version wrote them
            problem = one_line(error)
    raise UserError(f"{path}: not a whole checkpoint of this program: {problem}")


def _tail(content: bytes | memoryview) -> bytes:
    return MARK + hashlib.sha256(content).hexdigest().encode()
