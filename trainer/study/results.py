"""What the runs of a study gave: a line of JSON each, in one small file that can be kept and passed on."""

from __future__ import annotations

import json
from pathlib import Path

from .. import checkpoint
from ..config import UserError
from ..data import cache


def read(path: Path) -> list[dict]:
    """The lines of a file of results, none if there is no such file.

    Raises:
        UserError: it can't be read, or is no file of results.
    """
    try:
        lines = path.read_text().splitlines()
        found = [json.loads(line) for line in lines if line]
        if any(not {"row", "seed", "key"} <= set(line) for line in found):
            raise ValueError("a line without row, seed and key")
        return found
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"results: got {path}, which can't be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"results: got {path}, which is no file of results: {error}") from error


def identity(record: dict) -> tuple:
    """Which run a record is of."""
    return record["row"], record["seed"], record["key"]


def add(path: Path, record: dict) -> None:
    """One more line, in place of an older one of the same run; several processes may do so at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with cache.turn(path.parent / f".{path.name}.lock", f"writes {path}"):
            kept = [r for r in read(path) if identity(r) != identity(record)]
            checkpoint.write(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in [*kept, record]))
    except OSError as error:
        raise UserError(f"results: got {path}, which can't be written: {error.strerror}") from error
