"""Building csrc with ninja and loading it, ahead (``python -m rebalfer_kernels.native``) or on first use.

Built against PyTorch's stable ABI for torch 2.11 and later. The library lies in a cache, under a name made of a hash
of the sources, torch's version, the compiler and the flags, so that nothing stale is ever loaded; processes that
build at the same moment take turns at a lock, and the finished file appears by an atomic rename.
"""

from __future__ import annotations

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
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
#: In a wheel the sources lie in the package, in a checkout beside it.
SOURCES = next((p for p in (_HERE / "csrc", _HERE.parent / "csrc") if (p / "head_math.h").exists()), None)

_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -Wno-ignored-attributes -Wno-psabi"
_DEFINES = "-DTORCH_TARGET_VERSION=0x020b000000000000"
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


def cache_directory() -> Path:
    """``REBALFER_CACHE_DIR``, or ``rebalfer_kernels`` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("REBALFER_CACHE_DIR") or Path(base) / "rebalfer_kernels")


@functools.cache
def load(part: str) -> tuple[bool, str]:
    """Whether the native part ("cpu") is there, built and loaded if need be, and "available" or the reason why not."""
    if part != "cpu":
        return False, f"the native {part} kernels are not part of this version"
    try:
        library = build()
        torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        logger.warning("the %s backend is absent: %s", part, error)
        return False, str(error).splitlines()[0]
    return True, "available"


class BuildError(RuntimeError):
    """The build could not run or failed; the message says why, and how to repeat it."""


def build() -> Path:
    """Path of the built library, from the cache or built now.

    Raises:
        BuildError: no compiler, no ninja, or the compiler's message.
    """
    if SOURCES is None:
        raise BuildError("the C++ sources (csrc) are missing")
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if compiler is None:
        raise BuildError(f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r}, g++, c++)")
    directory = cache_directory()
    library = directory / f"rebalfer_cpu_{_key(compiler)}.so"
    if library.exists():
        return library
    ninja = shutil.which("ninja") or _ninja_of_this_environment()
    if ninja is None:
        raise BuildError("ninja is not installed (python -m pip install ninja)")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _lock(directory / "lock"):
        if library.exists():  # another process built it while this one waited
            return library
        logger.info("building the CPU kernels into %s", directory)
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as work:
            (Path(work) / "build.ninja").write_text(_recipe(compiler))
            run = subprocess.run([ninja, "-C", work], capture_output=True, text=True)
            if run.returncode:
                raise BuildError(
                    "building the CPU kernels failed; repeat it with `python -m rebalfer_kernels.native`\n"
                    + run.stdout[-4000:]
                    + run.stderr[-2000:]
                )
            os.replace(Path(work) / "rebalfer_cpu.so", library)
    return library


def _ninja_of_this_environment() -> str | None:
    try:
        import ninja
    except ImportError:
        return None
    return str(Path(ninja.BIN_DIR) / "ninja")


def _files() -> list[Path]:
    assert SOURCES is not None
    return sorted([*SOURCES.glob("*.h"), *(SOURCES / "cpu").glob("*")])


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(
        repr((torch.__version__, version, _FLAGS, _DEFINES, sorted(_ISAS.items()), sys.platform)).encode()
    )
    for file in _files():
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


def _recipe(compiler: str) -> str:
    root = Path(torch.__file__).parent
    source = SOURCES
    include = f"-I{root / 'include'} -I{root / 'include/torch/csrc/api/include'}"
    lines = [
        f"cxx = {compiler}",
        f"flags = {_FLAGS} {_DEFINES}",
        "rule compile\n  command = $cxx $flags $extra -c $in -o $out",
        f"rule link\n  command = $cxx -shared $in -L{root / 'lib'} -ltorch_cpu -lc10 -o $out",
    ]
    objects = []
    for isa in ("avx512", "avx2", "baseline"):
        if isa not in _ISAS:
            continue
        objects.append(f"{isa}.o")
        lines.append(f"build {isa}.o: compile {source}/cpu/kernels.cpp")
        lines.append(f"  extra = {_ISAS[isa]} -DREBALFER_ISA=kernels_{isa}")
    lines.append(f"build ops.o: compile {source}/cpu/ops.cpp\n  extra = {include}")
    lines.append(f"build rebalfer_cpu.so: link ops.o {' '.join(objects)}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(build())
