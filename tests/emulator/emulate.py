"""CUDA kernel sources as plain C++ against the emulator, called from Python.

An entry point is an ``extern "C" const char* name(...)`` that returns ``rebalfer::emulator::attempt([&] {...})``, with
a launch inside. With ``asan_variables`` every access outside a heap buffer, NumPy's and torch's too, is reported.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = "-x c++ -std=c++20 -O1 -g1 -fPIC -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas".split()
COUNTERS = (
    "launches", "mma",
    "streamed_stores", "cp_async_copies", "bulk_copies",  # bytes
    "blocks", "threads", "cluster", "shared_bytes",  # of the last launch
)  # fmt: skip

_directory = tempfile.TemporaryDirectory(prefix="rebalfer-emulator-")


class Launch(NamedTuple):
    """What a launch was given, as a GPU would be."""

    kernel: str  #: its mangled name
    parameters: bytes
    blocks: int
    threads: int
    cluster: int
    shared_bytes: int


class Library:
    """The sources, compiled with g++ (once a process); ``sm80`` emulates the time before bulk copies and clusters."""

    def __init__(self, *sources: Path, sm80: bool = False):
        flags = ["-DREBALFER_EMULATE_SM80"] if sm80 else []
        if os.environ.get("REBALFER_EMULATOR_ASAN") == "1":
            flags.append("-fsanitize=address")
        key = hashlib.sha256(repr((sources, flags)).encode()).hexdigest()[:16]
        out = Path(_directory.name) / f"{sources[0].stem}-{key}.so"
        if not out.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: _compile(source, flags, key), sources))
            _run([COMPILER, "-shared", *flags, *map(str, objects), "-o", str(out)])
        self._library = ctypes.CDLL(str(out))

    def __call__(self, function: str, *arguments: Any, order: str = "forward") -> dict[str, int]:
        """Calls an entry point: integers as int64, floats as float, arrays and tensors as addresses, None as null.

        Blocks and threads run in ``order``, "forward" or "reverse". Returns COUNTERS.
        Raises RuntimeError with what the emulator found wrong.
        """
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_char_p
        self._library.rebalfer_emulator_begin({"forward": 0, "reverse": 1}[order])
        error = entry(*map(_argument, arguments))
        if error is not None:
            raise RuntimeError(error.decode())
        counters = (ctypes.c_uint64 * len(COUNTERS))()
        self._library.rebalfer_emulator_counters(counters)
        self.counters = dict(zip(COUNTERS, counters, strict=True))
        return self.counters

    @contextmanager
    def only_recording(self) -> Iterator[None]:
        """Inside, a launch checks its configuration and runs nothing."""
        self._library.rebalfer_emulator_only_record(1)
        try:
            yield
        finally:
            self._library.rebalfer_emulator_only_record(0)

    def launch(self) -> Launch:
        """The last one. Its parameters hold the addresses of the tensors of that call."""
        size, address = ctypes.c_uint64(), ctypes.c_void_p()
        recorded = self._library.rebalfer_emulator_recorded
        recorded.restype = ctypes.c_char_p
        kernel = recorded(ctypes.byref(size), ctypes.byref(address)).decode()
        shape = (self.counters[x] for x in ("blocks", "threads", "cluster", "shared_bytes"))
        return Launch(kernel, ctypes.string_at(address.value or 0, size.value), *shape)


def _compile(source: Path, flags: list[str], key: str) -> Path:
    out = Path(_directory.name) / f"{source.stem}-{key}.o"
    _run([COMPILER, *FLAGS, *flags, f"-I{HERE}", f"-I{CSRC}", "-c", str(source), "-o", str(out)])
    return out


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{run.stderr[-6000:]}")


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_void_p(value.data_ptr())


def asan_variables() -> dict[str, str]:
    """Environment variables of a Python process in which ``Library`` builds with AddressSanitizer."""
    find = ["g++", "-print-file-name=libasan.so"]
    return {
        "REBALFER_EMULATOR_ASAN": "1",
        "LD_PRELOAD": subprocess.run(find, capture_output=True, text=True).stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
