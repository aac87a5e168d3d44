"""Finding, building and loading a library."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import logging
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from . import cache
from .recipe import Recipe, present_architectures, recipes
from .tools import BuildError, CompileError, ToolMissing, find_ninja

logger = logging.getLogger(__package__)

#: Part -> what is built, how long that takes, and what it means that it is absent.
_PARTS = {
    "cpu": ("CPU kernels", "about a minute", "the cpu backend is absent"),
    "cuda": ("CUDA kernels", "some minutes", "the cuda backend is absent"),
    "autograd": ("C++ autograd", "about half a minute", "the C++ autograd is absent, so small calls take longer"),
}


@functools.cache
def load(part: str) -> tuple[bool, str]:
    """Whether a part is there, built and loaded if need be, and "available" or the reason why not."""
    try:
        if part == "cuda" and not torch.cuda.is_available():
            return False, "no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"
        _load(part)
        if part == "cuda" and (problem := torch.ops.rebalfer_kernels.cuda_problem()):
            architectures = " ".join(present_architectures())
            raise BuildError(
                f"the CUDA kernels cannot run here: {problem} (built for other GPUs? "
                f"`python -m rebalfer_kernels build cuda --arch {architectures}` builds for those of this machine)"
            )
    except (OSError, RuntimeError, ValueError) as error:  # whatever the machine lacks; the reference serves
        expected = part == "cuda" and isinstance(error, ToolMissing)
        if part == "autograd":  # it only saves time: worth a warning once, where its compilation fails
            expected = not isinstance(error, CompileError)
        logger.log(logging.INFO if expected else logging.WARNING, "%s: %s", _PARTS[part][2], error)
        return False, (str(error) or repr(error)).splitlines()[0]
    return True, "available"


def autograd() -> ModuleType | None:
    """The Python module of the part "autograd" (csrc/autograd/module.cpp), built and loaded if need be."""
    return _modules["autograd"] if load("autograd")[0] else None


#: Part -> its Python module, once it is loaded.
_modules: dict[str, ModuleType] = {}


def _load(part: str) -> None:
    """Load the library; if the system refuses what the cache has, build it anew, but only once."""
    library = build(part, retry=False)
    refusal = _refusal(part, library)
    if refusal is None:
        return
    refused_anew = library.with_suffix(".refused")
    if library.parent == cache.SHIPPED:
        raise BuildError(f"{refusal} (it is part of the installed package: install that anew)")
    if os.environ.get("REBALFER_BUILD") == "0":
        raise BuildError(f"{refusal} (not built anew: REBALFER_BUILD=0; REBALFER_CACHE_DIR names another cache)")
    if refused_anew.exists():
        raise BuildError(
            f"{refusal} (built anew before; `python -m rebalfer_kernels doctor --clear-cache` forgets that)"
        )
    logger.warning("%s", refusal)
    try:
        refusal = _refusal(part, build(part, anew=True))
    except BuildError as error:
        raise BuildError(f"{refusal}; building it anew: {error}") from None
    if refusal is not None:
        refused_anew.touch()
        raise BuildError(f"{refusal} (just built)")


def _refusal(part: str, library: Path) -> str | None:
    """Load it, or say what the dynamic linker said."""
    try:
        if _truncated(library):
            raise OSError(f"{library}: truncated")
        if part == "autograd":
            _modules[part] = _imported(part, library)
        else:
            torch.ops.load_library(str(library))
    except (OSError, ImportError) as error:
        return f"the library cannot be loaded: {error.__cause__ or error}"  # torch names only the path
    return None


def _imported(name: str, library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _truncated(library: Path) -> bool:
    """Whether an ELF file ends before its last part, the section headers; the dynamic linker would die of SIGBUS."""
    with open(library, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return False
    offset, size, count = struct.unpack_from("=Q10xHH", header, 40)
    return library.stat().st_size < offset + size * count


def build(
    part: str = "cpu", architectures: Sequence[str] | None = None, *, anew: bool = False, retry: bool = True
) -> Path:
    """Path of the library: the one that the package ships, else from the cache, else (or ``anew``) built now.

    For "cuda", ``architectures`` such as "90a" or "90+ptx"; None for the present GPUs, unless only a library that was
    made ahead of time is stored. ``retry`` also where its compilation failed before.

    Raises:
        BuildError: the sources are missing or the cache cannot be used. CompileError: the compiler's message.
        ToolMissing: no compiler, no ninja.
    """
    wanted = recipes(part, architectures)
    if not anew and (stored := _stored(wanted)):
        return stored
    directory = cache.cache_directory()
    try:
        return _build(wanted[0], directory, retry)
    except OSError as error:  # not readable, not writable, full, without locks, ...
        raise BuildError(f"{directory} cannot be used ({error}): set REBALFER_CACHE_DIR to another directory") from None


def _stored(wanted: list[Recipe]) -> Path | None:
    """The first that is stored, of the preferred recipe if possible."""
    paths = (place / recipe.name() for recipe in wanted for place in cache.places())
    return next((path for path in paths if os.path.exists(path)), None)  # unlike exists(), False if it is unreadable


def _build(recipe: Recipe, directory: Path, retry: bool) -> Path:
    """Build it, also where it is stored already, unless another process does so while this one waits."""
    library, part = directory / recipe.name(), recipe.part
    before = _identity(library)
    if os.environ.get("REBALFER_BUILD") == "0":
        raise BuildError(f"not built, and REBALFER_BUILD=0 (`python -m rebalfer_kernels build {recipe.arguments}`)")
    recipe.compiler()  # where it is missing, no folder is made
    with cache.lock(directory, part):
        if _identity(library) not in (None, before):
            return library
        for leftover in directory.glob(f"build-{part}-*/build.ninja"):  # of a build that was killed: the lock is ours
            shutil.rmtree(leftover.parent, ignore_errors=True)
        failed = library.with_suffix(".failed")
        if failed.exists() and not retry:
            raise BuildError(
                f"building it failed before (`python -m rebalfer_kernels build {recipe.arguments}` retries)"
            )
        with tempfile.TemporaryDirectory(dir=directory, prefix=f"build-{part}-") as work:
            recipe.prepare(Path(work))
            try:
                _run_ninja(recipe, work)
            except CompileError:
                if part == "autograd":  # all works without it, so no other process needs to try
                    failed.touch()
                raise
            if directory / recipe.name() != library:
                raise BuildError("the sources changed while they were built; build again")
            os.replace(Path(work) / "library.so", library)
            failed.unlink(missing_ok=True)
    return library


def _identity(library: Path) -> tuple[int, int] | None:
    if not library.exists():
        return None
    status = library.stat()
    return status.st_ino, status.st_mtime_ns


def _run_ninja(recipe: Recipe, work: str) -> None:
    command = [find_ninja(), "-C", work]
    # No warning, but what a user who waits should see: without any configuration, Python shows only warnings.
    what, duration, _ = _PARTS[recipe.part]
    logger.warning("building the %s in %s, once; this takes %s", what, Path(work).parent, duration)
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if run.returncode:
        raise CompileError(
            f"building the {what} failed; repeat it with "
            f"`python -m rebalfer_kernels build {recipe.arguments}`\n" + run.stdout[-4000:] + run.stderr[-2000:]
        )
