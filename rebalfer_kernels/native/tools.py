"""The one place that finds the C++ compiler, nvcc and ninja."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path


class BuildError(RuntimeError):
    """The library cannot be found, built or loaded; the message says why, and what mends it."""


class ToolMissing(BuildError):
    """A compiler or ninja is not installed."""


class CompileError(BuildError):
    """The compiler or the linker failed; the message is theirs."""


def find_compiler() -> list[str]:
    """The C++ compiler as the first words of a command: ``CXX``, such as "ccache g++" or "g++ -m64", else g++ or c++.

    Raises:
        ToolMissing: none is installed, or not the one that ``CXX`` names, which no other replaces.
    """
    words = _cxx()
    if not words:
        return [_first(["g++", "c++"], "no C++ compiler found (g++ or c++ on PATH; CXX names another)")]
    otherwise = f"CXX: got {os.environ['CXX']!r}, but {words[0]!r} is not on PATH or not an executable file"
    return [_first(words[:1], otherwise), *words[1:]]


def compiler_options() -> list[str]:
    """The options in ``CXX``: flags of a library like any other, whichever program takes them."""
    return [word for word in _cxx()[1:] if word.startswith("-")]


def _cxx() -> list[str]:
    value = os.environ.get("CXX", "").strip()
    if shutil.which(value):  # a path with spaces in it
        return [value]
    try:
        return shlex.split(value)
    except ValueError as error:
        raise ToolMissing(f"CXX: got {value!r}, expected a command: {error}") from None


def find_nvcc() -> str:
    """Path of nvcc, in ``CUDA_HOME``, else on ``PATH``, else in /usr/local/cuda. Raises ToolMissing."""
    home = os.environ.get("CUDA_HOME", "")
    places = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return _first(places, f"no nvcc found (CUDA_HOME={home!r}, PATH, /usr/local/cuda)")


def find_ninja() -> str:
    """Path of ninja, on ``PATH`` or of the Python package. Raises ToolMissing."""
    places = ["ninja"]
    try:
        places.append(str(Path(importlib.import_module("ninja").BIN_DIR, "ninja")))
    except ImportError:
        pass
    return _first(places, "ninja is not installed (python -m pip install ninja)")


def find_python_headers() -> str:
    """The folder of Python.h. Raises ToolMissing."""
    folder = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(folder, "Python.h")):
        raise ToolMissing(f"no Python.h in {folder} (Python's headers: a package such as python3-dev has them)")
    return folder


def _first(names: Iterable[str], otherwise: str) -> str:
    """Absolute path of the first of these programs that is installed."""
    for name in names:
        if path := _found(name):
            return path
    raise ToolMissing(otherwise)


def _found(name: str) -> str | None:
    path = shutil.which(name)
    return path and str(Path(path).absolute())
