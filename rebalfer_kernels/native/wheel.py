"""``make wheel``: one wheel with the libraries inside, for every Python and torch that the package supports.

From a checkout: python -m rebalfer_kernels.native.wheel FOLDER
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .library import build
from .recipe import AHEAD
from .tools import BuildError, ToolMissing, compiler_options

_CHECKOUT = Path(__file__).resolve().parents[2]
_PARTS_OF_IT = ("rebalfer_kernels", "csrc", "pyproject.toml", "README.md", "LICENSE")
_GLIBC_OF_TORCH = 28  #: minor version of the oldest glibc that torch 2.11 runs on
#: Minor version of GLIBCXX_3.4 -> that of the oldest glibc whose distributions have it.
_GLIBC_WITH = {25: 28, 28: 31, 29: 34, 30: 35, 33: 39}


def libraries() -> list[Path]:
    """CPU library, autograd of this torch and Python and, where nvcc is installed, CUDA library; built where absent."""
    if options := compiler_options():
        raise BuildError(f"CXX: got the options {options}, which would be a part of the libraries' names")
    made = [build("cpu"), build("autograd")]
    try:
        made.append(build("cuda", AHEAD))
    except ToolMissing as missing:
        print(f"the wheel will have no CUDA library: {missing}", file=sys.stderr)
    return made


def platform_tag(shipped: Sequence[Path]) -> str:
    """Such as "manylinux_2_34_x86_64": the oldest glibc whose distributions have all symbols that these files need.

    Libraries that are built on an older system need an older one.
    """
    needs = "".join(_output("objdump", "-p", str(file)) for file in shipped)
    glibc = {_GLIBC_OF_TORCH, *map(int, re.findall(r"\bGLIBC_2\.(\d+)", needs))}
    for minor in map(int, re.findall(r"\bGLIBCXX_3\.4\.(\d+)", needs)):
        if minor > max(_GLIBC_WITH):
            raise BuildError(f"it is not known which glibc comes with GLIBCXX_3.4.{minor}")
        glibc.add(next(_GLIBC_WITH[known] for known in _GLIBC_WITH if known >= minor))
    return f"manylinux_2_{max(glibc)}_{platform.machine()}"


def make(folder: Path, shipped: Sequence[Path]) -> Path:
    """Build the wheel of this checkout with these libraries into ``folder``; a pure one without any."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:  # setuptools leaves files where it builds
        source, made = Path(work, "source"), Path(work, "made")
        source.mkdir()
        for name in _PARTS_OF_IT:
            copy = shutil.copytree if (_CHECKOUT / name).is_dir() else shutil.copy
            copy(_CHECKOUT / name, source / name)
        inside = source / "rebalfer_kernels/native/shipped"
        inside.mkdir()
        for file in shipped:
            shutil.copy(file, inside)
        tag = [f"--config-settings=--build-option=--plat-name={platform_tag(shipped)}"] if shipped else []
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
        _output(*pip, "--no-build-isolation", *tag, "--wheel-dir", str(made), str(source))
        return Path(shutil.copy(next(made.glob("*.whl")), folder))


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(make(Path(sys.argv[1]), libraries()))
    except BuildError as error:
        sys.exit(f"error: {error}")
