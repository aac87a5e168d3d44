"""Kernels of a cubin for sm_90, executed on a CPU: what they issue, what they access, and what waits for what."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "emulator")]

import emulate  # noqa: E402
import numpy as np  # noqa: E402
from cubin import Instruction  # noqa: E402
from torch import Tensor  # noqa: E402

#: Of machine.h's Wait.
WAITS = (
    "start", "global memory", "L2 cache", "L1 cache", "shared memory", "distributed shared memory", "bulk copy",
    "asynchronous copy", "atomic", "special unit", "constant", "operands read", "barrier", "cluster barrier", "fence",
)  # fmt: skip
COUNTS = ("issued", "lanes", "wavefronts", "sectors", "read", "written", "cold")

#: Cycles of an H100 or H200 from the issue of an instruction until what waits for its result may issue; bench/model.py
#: says where they come from.
LATENCIES = {
    "shared": 29, "wavefront": 2, "distributed": 200, "l1": 40, "l2": 281, "dram": 690, "bulk": 200, "special": 24,
    "constant": 40, "barrier": 20, "cluster_barrier": 200, "fence": 500, "read": 12,
    "product": 32,
}  # fmt: skip

FLAGS = "-std=c++20 -O3 -fPIC -shared -frounding-math -ffp-contract=off -Wall -Wextra -Werror".split()


class Link(NamedTuple):
    """A wait of the critical path."""

    place: int  #: of the instruction that was waited for
    wait: str
    issue: int  #: cycle
    ready: int


class Run(NamedTuple):
    counts: np.ndarray  #: (instructions, COUNTS)
    cycles: int  #: until the slowest warp exits
    path: list[Link]  #: what that took, in order


@functools.cache
def _library() -> ctypes.CDLL:
    directory = tempfile.TemporaryDirectory(prefix="rebalfer-sass-")
    out = Path(directory.name) / "machine.so"
    command = [emulate.COMPILER, *FLAGS, str(HERE / "machine.cpp"), "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-6000:])
    library = ctypes.CDLL(str(out))
    library.directory = directory
    library.sass_parse.restype = library.sass_run.restype = ctypes.c_char_p
    return library


class Program:
    """A kernel's instructions."""

    def __init__(self, instructions: Sequence[Instruction]):
        self.instructions = instructions
        lines = "\n".join(
            f"{16 * k:x} {i.control:x} {i.immediate:x}|{i.guard}|{i.text}" for k, i in enumerate(instructions)
        )
        self._program = ctypes.c_void_p()
        _check(_library().sass_parse(lines.encode(), ctypes.byref(self._program)))

    def run(
        self,
        launch: emulate.Launch,
        tensors: Iterable[Tensor],
        *,
        latencies: dict[str, int] = LATENCIES,
        cold: Iterable[Tensor] = (),
        blocks: tuple[int, int] | None = None,
    ) -> Run:
        """Executes ``blocks`` (the first and their number), else all, on what the tensors hold.

        ``cold``: which of them are not in the L2 cache. Raises RuntimeError for what the machine does not know, for
        accesses outside the tensors and for deadlocks.
        """
        cold_places = {t.untyped_storage().data_ptr() for t in cold}
        ranges = []
        for t in tensors:
            begin = t.untyped_storage().data_ptr()
            ranges += [begin, begin + t.untyped_storage().nbytes(), int(begin in cold_places)]
        first, number = blocks or (0, launch.blocks)
        counts = np.zeros((len(self.instructions), len(COUNTS)), np.uint64)
        path, room = np.zeros((100_000, 5), np.int64), 100_000
        length, finish = ctypes.c_uint64(), ctypes.c_int64()
        _check(
            _library().sass_run(
                self._program, (ctypes.c_int64 * len(latencies))(*latencies.values()),
                (ctypes.c_uint32 * 4)(launch.blocks, launch.threads, launch.cluster, launch.shared_bytes),
                launch.parameters, ctypes.c_uint64(len(launch.parameters)), ctypes.c_uint32(first),
                ctypes.c_uint32(number), (ctypes.c_uint64 * len(ranges))(*ranges), ctypes.c_uint64(len(ranges) // 3),
                ctypes.c_void_p(counts.ctypes.data), ctypes.c_void_p(path.ctypes.data), ctypes.c_uint64(room),
                ctypes.byref(length), ctypes.byref(finish),
            )
        )  # fmt: skip
        links = [
            Link(place, WAITS[wait], issue, ready) for _, place, wait, issue, ready in path[: length.value].tolist()
        ]
        return Run(counts.astype(np.int64), finish.value, links[::-1])


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())
