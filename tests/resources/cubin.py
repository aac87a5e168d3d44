"""What resources and instructions a compiled NVIDIA kernel uses, read with NVIDIA's own tools.

The tools come from the CUDA toolkit on the PATH or from the Triton wheel, which carries them.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """Of one thread (registers, stack, local) or block (shared); dynamic shared memory is not in the cubin."""

    registers: int
    stack: int  #: bytes; spilled registers are stored here
    shared: int  #: bytes known at compile time
    local: int  #: bytes


@functools.cache
def tool(name: str) -> str | None:
    """Path of ``cuobjdump`` or ``nvdisasm``, or None."""
    on_path = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if on_path is None and triton is not None and triton.origin is not None:
        on_path = shutil.which(name, path=str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return on_path


def missing() -> str | None:
    """Why a cubin can't be read here, or None."""
    absent = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return f"no {' and no '.join(absent)}, neither on the PATH nor in a Triton wheel" if absent else None


def release(program: str) -> tuple[int, ...]:
    """CUDA's version of one of its programs, (13, 0)."""
    printed = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(x) for x in re.search(r"release ([\d.]+)", printed)[1].split("."))


def usage(cubin: bytes | Path) -> dict[str, Usage]:
    """kernel -> what it uses."""
    with _file(cubin) as path:
        text = _run("cuobjdump", "-res-usage", path)
    found = {}
    for kernel, figures in re.findall(r"Function ([^\s:]+):\s*\n\s*(REG:.*)", text):
        figure = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", figures)}
        found[kernel] = Usage(figure["REG"], figure["STACK"], figure["SHARED"], figure["LOCAL"])
    if not found:
        raise ValueError(f"no kernel in what cuobjdump printed:\n{text}")
    return found


def sass(cubin: bytes | Path) -> dict[str, list[str]]:
    """kernel -> its instructions in order, each as "OPCODE.MODIFIERS operands", predicates left out."""
    with _file(cubin) as path:
        text = _run("nvdisasm", "-c", path)
    found: dict[str, list[str]] = {}
    kernel = None
    for line in text.splitlines():
        if match := re.match(r"\s*\.text\.(\S+):", line):
            kernel = match[1]
            found[kernel] = []
        elif kernel and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", line)):
            found[kernel].append(match[1])
    if not any(found.values()):
        raise ValueError(f"no instruction in what nvdisasm printed:\n{text[:2000]}")
    return found


@contextmanager
def _file(cubin: bytes | Path) -> Iterator[str]:
    if isinstance(cubin, Path):
        yield str(cubin)
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


def _run(name: str, *arguments: str) -> str:
    path = tool(name)
    if path is None:
        raise FileNotFoundError(missing())
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
