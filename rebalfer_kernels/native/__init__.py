"""Building csrc with ninja and loading it, ahead (``python -m rebalfer_kernels build``) or on first use.

Two libraries, ``cpu`` and ``cuda``, by one recipe, against PyTorch's stable ABI for torch 2.11 and later. A library
lies in a cache, under a name made of a hash of the sources, torch's version, the compiler and the flags, so that
nothing stale is ever loaded; processes that build at the same moment take turns at a lock, and the finished file
appears by an atomic rename. With ``REBALFER_BUILD=0`` nothing is built, only what the cache has is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .cache import cache_directory, cache_files, clear_cache
from .tools import BuildError, ToolMissing, find_compiler, find_ninja, find_nvcc

__all__ = [
    "BuildError",
    "ToolMissing",
    "build",
    "cache_directory",
    "cache_files",
    "clear_cache",
    "find_compiler",
    "find_ninja",
    "find_nvcc",
    "load",
]

logger = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parents[1]
#: In a wheel the sources lie in the package, in a checkout beside it.
SOURCES = next((p for p in (_HERE / "csrc", _HERE.parent / "csrc") if (p / "head_math.h").exists()), None)

SUMMARY = "compile native kernels into the cache, unless they are there"
#: What a CUDA library made ahead of time is compiled for; on first use it is the present GPUs' architectures alone.
#: "+ptx" is code that later GPUs translate when it is loaded.
AHEAD = ("80", "90a", "100a", "90+ptx")

_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
#: Instruction set -> flags; one source, compiled for each, chosen where it runs.
_ISAS = (
    {
        "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512",
        "avx2": "-mavx2 -mfma -mf16c",
        "baseline": "",
    }
    if platform.machine() in ("x86_64", "AMD64")
    else {"baseline": ""}
)


@functools.cache
def load(part: str) -> tuple[bool, str]:
    """Whether "cpu" or "cuda" is there, built and loaded if need be, and "available" or the reason why not."""
    try:
        if part == "cuda" and not torch.cuda.is_available():
            return False, "no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"
        torch.ops.load_library(str(build(part)))
        if part == "cuda" and (problem := torch.ops.rebalfer_kernels.cuda_problem()):
            architectures = " ".join(_present_architectures())
            raise BuildError(
                f"the CUDA kernels cannot run here: {problem} (built for other GPUs? "
                f"`python -m rebalfer_kernels build cuda --arch {architectures}` builds for those of this machine)"
            )
    except (BuildError, OSError) as error:
        level = logging.INFO if isinstance(error, ToolMissing) and part == "cuda" else logging.WARNING
        logger.log(level, "the %s backend is absent: %s", part, error)
        return False, str(error).splitlines()[0]
    return True, "available"


class Recipe(NamedTuple):
    """One library: ``$csrc`` and ``$torch`` stand for directories, so that a recipe is the same wherever they lie."""

    part: str
    compiler: str
    flags: str
    objects: dict[str, tuple[str, str]]  #: object -> its source and flags of its own
    libraries: str
    repeat: str  #: the arguments of the command that builds it

    def key(self) -> str:
        """Hash of everything the library is made of."""
        version = subprocess.run([self.compiler, "--version"], capture_output=True, text=True).stdout
        digest = hashlib.sha256(repr((torch.__version__, version, self, sys.platform)).encode())
        assert SOURCES is not None
        for file in sorted([*SOURCES.glob("*.h"), *(SOURCES / self.part).glob("*.[ch]*")]):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:20]

    def ninja(self) -> str:
        """The recipe as a build.ninja that makes ``library.so``."""
        lines = [
            f"csrc = {SOURCES}",
            f"torch = {Path(torch.__file__).parent}",
            f"rule compile\n  command = {self.compiler} {self.flags} $own -c $in -o $out",
            f"rule link\n  command = {self.compiler} -shared $in -L$torch/lib {self.libraries} -o $out",
        ]
        for name, (source, own) in self.objects.items():
            lines.append(f"build {name}: compile $csrc/{self.part}/{source}\n  own = {own}")
        lines.append(f"build library.so: link {' '.join(self.objects)}")
        return "\n".join(lines) + "\n"


def _cpu_recipe() -> Recipe:
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if compiler is None:
        raise ToolMissing(f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r}, g++, c++)")
    flags = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -Wno-ignored-attributes -Wno-psabi"
    objects = {"ops.o": ("ops.cpp", f"{_STABLE_ABI} -I$torch/include")}
    for isa, own in _ISAS.items():
        objects[f"{isa}.o"] = ("kernels.cpp", f"{own} -DREBALFER_ISA=kernels_{isa}")
    return Recipe("cpu", compiler, flags, objects, "-ltorch_cpu -lc10", "cpu")


def _cuda_recipe(architectures: Sequence[str]) -> Recipe:
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else []
    compiler = next(filter(None, map(shutil.which, [*places, "nvcc", "/usr/local/cuda/bin/nvcc"])), None)
    if compiler is None:
        raise ToolMissing(f"no nvcc found (CUDA_HOME={home or ''!r}, PATH, /usr/local/cuda)")
    code = []
    for architecture in architectures:
        virtual, _, ptx = architecture.partition("+")
        code.append(f"-gencode=arch=compute_{virtual},code={'compute' if ptx else 'sm'}_{virtual}")
    host = f"-ccbin {os.environ['CXX']} " if os.environ.get("CXX") else ""
    flags = (
        f"{host}-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wno-psabi -Xfatbin -compress-all "
        f"{' '.join(code)} -DUSE_CUDA {_STABLE_ABI} -I$torch/include -I$csrc"
    )
    assert SOURCES is not None
    # nvcc compiles a .cu for each architecture and leaves a .cpp (torch's headers, 10 s a time) to the C++ compiler.
    sources = sorted(p for p in (SOURCES / "cuda").iterdir() if p.suffix in (".cu", ".cpp"))
    objects = {f"{p.stem}.o": (p.name, "") for p in sources}
    if not objects:
        raise BuildError("the CUDA kernels are not part of this version")
    repeat = "cuda" if tuple(architectures) == AHEAD else f"cuda --arch {' '.join(architectures)}"
    return Recipe("cuda", compiler, flags, objects, f"{' '.join(code)} -ltorch_cuda -ltorch_cpu -lc10", repeat)


def _present_architectures() -> tuple[str, ...]:
    """Of the visible GPUs; 9.0 and 10.0 have instructions that only their own "a" target knows."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = {(9, 0): "90a", (10, 0): "100a"}
    if not any(c >= (8, 0) for c in capabilities):
        raise BuildError("no GPU of compute capability 8.0 or later")
    return tuple(names.get(c, f"{c[0]}{c[1]}") for c in sorted(capabilities) if c >= (8, 0))


def build(part: str = "cpu", architectures: Sequence[str] | None = None) -> Path:
    """Path of the built library, from the cache or built now.

    For "cuda", ``architectures`` such as "90a" or "90+ptx"; None for the present GPUs, unless the cache has no library
    for them and one that was made ahead of time.

    Raises:
        BuildError: the sources are missing, or the compiler's message. ToolMissing: no compiler, no ninja.
    """
    if SOURCES is None:
        raise BuildError("the C++ sources (csrc) are missing")
    directory = cache_directory()
    if part == "cpu":
        recipe = _cpu_recipe()
    elif architectures is not None:
        recipe = _cuda_recipe(architectures)
    else:
        ahead, recipe = _cuda_recipe(AHEAD), _cuda_recipe(_present_architectures())
        if not _library(directory, recipe).exists() and _library(directory, ahead).exists():
            recipe = ahead
    library = _library(directory, recipe)
    if library.exists():
        return library
    if os.environ.get("REBALFER_BUILD") == "0":
        raise BuildError(f"not built, and REBALFER_BUILD=0 (`python -m rebalfer_kernels build {recipe.repeat}`)")
    ninja = shutil.which("ninja") or _ninja_of_this_environment()
    if ninja is None:
        raise ToolMissing("ninja is not installed (python -m pip install ninja)")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _lock(directory / f"{part}.lock"):
        if library.exists():  # another process built it while this one waited
            return library
        for leftover in directory.glob(f"build-{part}-*/build.ninja"):  # of a build that was killed: the lock is ours
            shutil.rmtree(leftover.parent, ignore_errors=True)
        logger.info("building the %s kernels into %s", part.upper(), directory)
        with tempfile.TemporaryDirectory(dir=directory, prefix=f"build-{part}-") as work:
            (Path(work) / "build.ninja").write_text(recipe.ninja())
            run = subprocess.run([ninja, "-C", work], capture_output=True, text=True)
            if run.returncode:
                raise BuildError(
                    f"building the {part.upper()} kernels failed; repeat it with "
                    f"`python -m rebalfer_kernels build {recipe.repeat}`\n" + run.stdout[-4000:] + run.stderr[-2000:]
                )
            if _library(directory, recipe) != library:
                raise BuildError("the sources changed while they were built; build again")
            os.replace(Path(work) / "library.so", library)
    return library


def _library(directory: Path, recipe: Recipe) -> Path:
    return directory / f"rebalfer_{recipe.part}_{recipe.key()}.so"


def _ninja_of_this_environment() -> str | None:
    try:
        import ninja
    except ImportError:
        return None
    return str(Path(ninja.BIN_DIR) / "ninja")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command ``build``."""
    parser.add_argument("part", nargs="?", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--arch", nargs="+", default=AHEAD, metavar="ARCH",
        help=f"of cuda: architectures such as 90a, or 90+ptx for later GPUs (default: {' '.join(AHEAD)})",
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Builds what was asked for and prints where it lies; returns the exit status."""
    try:
        print(build(options.part, tuple(options.arch)))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
