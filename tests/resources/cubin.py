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


class Instruction(NamedTuple):
    """As nvdisasm prints it, and what it encodes besides."""

    guard: str  #: a predicate, such as "!P0", or ""
    text: str  #: "OPCODE.MODIFIERS operands"; a label is "@" and its address
    control: int  #: stall count, yield, scoreboards to set and to wait for
    immediate: int  #: 32 bits, of instructions that have one
    source: tuple[str, ...]  #: "file:line" of each call that was inlined, the outermost first; of -lineinfo


def listing(cubin: bytes | Path) -> dict[str, list[Instruction]]:
    """kernel -> its instructions, 16 bytes each, with those of the functions that it calls."""
    with _file(cubin) as path:
        text = _run("nvdisasm", "-c", "-gi", "-hex", path)
    return {kernel: _instructions(lines) for kernel, lines in _sections(text)}


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    for section in re.split(r"^//-+ (?=\.)", text, flags=re.MULTILINE)[1:]:
        name, *lines = section.splitlines()
        if match := re.match(r"\.text\.(\S+)", name):
            yield match[1], lines


def _instructions(lines: list[str]) -> list[Instruction]:
    found: list[list] = []
    labels: dict[str, int] = {}
    source: list[str] = []
    ended = True  # the innermost call comes first, and one line follows another until an instruction does
    encoded = re.compile(
        r"\s+(?:/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][^;]*?)\s*;)?\s*/\* 0x(\w{16}) \*/"
    ).match
    for line in lines:
        if (match := encoded(line)) is not None:
            ended = True
            if match[3] is None:
                found[-1][2] = int(match[4], 16) >> 41 & 0x1FFFF
            else:
                found.append([match[2] or "", match[3], 0, int(match[4], 16) >> 32, tuple(source)])
        elif match := re.match(r'\s*//## File "([^"]*)", line (\d+)', line):
            source = [f"{Path(match[1]).name}:{match[2]}", *([] if ended else source)]
            ended = False
        elif match := re.match(r"([.$\w]+):", line):
            labels[match[1]] = 16 * len(found)
    for instruction in found:
        instruction[1] = re.sub(r"`\(([^)]+)\)", lambda m: f"@{labels.get(m[1], 0):#x}", instruction[1])
    return [Instruction(*x) for x in found]


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
