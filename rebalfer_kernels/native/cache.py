"""Where built libraries are stored, what their files are called, and who may write there at one time."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .tools import BuildError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

SHIPPED = Path(__file__).with_name("shipped")  #: the libraries of a wheel that was built with them
_NAME = re.compile(r"rebalfer_(cpu|cuda|autograd)_[0-9a-f]{20}\.(so|refused|failed)|(cpu|cuda|autograd)\.lock")


def cache_directory() -> Path:
    """``REBALFER_CACHE_DIR``, or ``rebalfer_kernels`` in the user's cache directory.

    Raises:
        BuildError: neither that variable nor a home directory is known.
    """
    if named := os.environ.get("REBALFER_CACHE_DIR"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rebalfer_kernels")
    except RuntimeError as error:  # a user id without a passwd entry, and no HOME
        raise BuildError(f"no home directory ({error}): set REBALFER_CACHE_DIR") from None


def places() -> list[Path]:
    """Where libraries are stored: in the package, then in the cache, if there is a directory for it."""
    with contextlib.suppress(BuildError):
        return [SHIPPED, cache_directory()]
    return [SHIPPED]


def cache_files() -> list[Path]:
    """What the native build left in its cache: libraries, locks, what a killed build left; nothing of others.

    Raises:
        BuildError: see :func:`cache_directory`. OSError: the cache cannot be read.
    """
    directory = cache_directory()
    if not directory.is_dir():
        return []
    files = [p for p in directory.iterdir() if p.is_file() and _NAME.fullmatch(p.name)]
    for work in directory.glob("build-*"):
        if (work / "build.ninja").is_file():
            files += [p for p in work.iterdir() if p.is_symlink() or p.is_file()]
    return sorted(files)


def clear_cache() -> tuple[int, int]:
    """Remove :func:`cache_files` and the folders that are then empty; how many files and bytes. Raises as it does."""
    files = cache_files()
    size = sum(p.lstat().st_size for p in files)
    for file in files:
        file.unlink()
    for folder in {*(p.parent for p in files), cache_directory()}:
        with contextlib.suppress(OSError):  # it holds something else
            folder.rmdir()
    return len(files), size


@contextlib.contextmanager
def lock(directory: Path, part: str) -> Iterator[None]:
    """Hold the right to build a part in this directory, once no other process does."""
    if fcntl is None:
        raise BuildError("not built: that needs a POSIX system, and this Python has no fcntl")
    directory.mkdir(parents=True, exist_ok=True)
    if os.statvfs(directory).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError("it is mounted noexec, so no library can be loaded from it")
    with open(directory / f"{part}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
