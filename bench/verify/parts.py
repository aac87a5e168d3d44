"""The three parts of ``gpu-check`` and their pieces, each a process of its own, the most important first.

A part is complete in itself on a machine that has only the checkout: it builds what it needs. racecheck of Triton's
kernels fails: it names a store of equal values (bench/results/gpu/README.md).
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..baselines import FORMULATIONS, fused_backends
from ..goals import BEST, PLAIN
from . import counters

PYTHON = sys.executable
BENCH = [PYTHON, "-m", "bench"]
#: The case whose Triton tiles are searched: Triton comes first there, and all is large.
TUNED = "N512-C2048-channels_last-bfloat16"


class Piece(NamedTuple):
    name: str
    weight: float  #: its share of the time that is left is this over that of the pieces from here on; about its seconds
    command: Callable[[float], list[str]]  #: made from the seconds that it may take
    needs: tuple[str, ...] = ()  #: the builds it must follow; none but these builds anything
    skip: str | None = None  #: why it is not run here
    environment: dict[str, str] = {}


def right(out: Path, rehearse: bool) -> list[Piece]:
    """Are the kernels right: builds, every operation, the tests, the doctor."""
    backends = _backends(rehearse)
    doctor = [PYTHON, "-m", "rebalfer_kernels", "doctor", "--json", str(out / "doctor.json")]
    return [
        _first_build(rehearse),
        *(_piece("every-op", name, 60, [*_module("every_op"), name]) for name in backends),
        *(_tests(name, rehearse) for name in backends),
        *([] if rehearse else [_build("cpu", 90)]),
        _piece("doctor", "", 60, doctor),
    ]


def fast(out: Path, rehearse: bool) -> list[Piece]:
    """How fast are they: the benchmark of the loss with the duration of each kernel, then a search for better tiles."""
    measure = [*_module("every_case"), "--out", str(out), *(["--rehearse"] if rehearse else [])]
    eager = [name for name in FORMULATIONS if name not in ("ours", "identity")]
    if not rehearse:
        eager = [PLAIN, BEST, *eager]
    return [
        _first_build(rehearse),
        *(
            _piece("op", name, 100, [*measure, "ours" if rehearse else name, "identity"])
            for name in _backends(rehearse)
        ),
        _piece("op", "eager", 120, [*measure, *eager, "identity"]),
        _on_gpu(_piece("tune", "triton", 60, [*BENCH, "tune", "--cases", TUNED]), rehearse),
    ]


def deep(out: Path, rehearse: bool) -> list[Piece]:
    """What happens inside: sanitizers, a whole training step, the profiler's counters."""
    first, *others = _backends(rehearse)
    step = [*BENCH, "step", "--out", str(out), *(["--rehearse"] if rehearse else [])]
    return [
        _first_build(rehearse),
        _sanitizer("memcheck", first, rehearse),
        Piece("step", 60, lambda s: [*step, "--seconds", f"{min(0.4 * s, 20):.0f}"], (_first_build(rehearse).name,)),
        _sanitizer("racecheck", first, rehearse),
        _counters(first, rehearse),
        _sanitizer("synccheck", first, rehearse),
        *(
            piece
            for name in others
            for piece in (
                _sanitizer("memcheck", name, rehearse, 80),  # it compiles what the later ones load
                _counters(name, rehearse),
                _sanitizer("racecheck", name, rehearse),
                _sanitizer("synccheck", name, rehearse),
            )
        ),
        _sanitizer("initcheck", first, rehearse),
    ]


PARTS = {"right": right, "fast": fast, "deep": deep}
#: How the files that a part writes begin, and how many it may be.
WRITES = {
    "right": (3, ("right.", "doctor.json")),
    "fast": (5, ("fast.", "op-")),
    "deep": (3, ("deep.", "step-")),
}


def choose(pieces: list[Piece], only: list[str] | None) -> list[Piece]:
    """All, or those of these names with the builds that they need."""
    names = set(only or [piece.name for piece in pieces])
    names |= {need for piece in pieces if piece.name in names for need in piece.needs}
    return [piece for piece in pieces if piece.name in names]


def _backends(rehearse: bool) -> list[str]:
    return ["cpu"] if rehearse else fused_backends("cuda")


def _module(name: str) -> list[str]:
    return [PYTHON, "-m", f"bench.verify.{name}"]


def _first_build(rehearse: bool) -> Piece:
    return (
        _build("cpu", 90) if rehearse else _build("cuda", 240)
    )  # twice of what it needs, so that little time in all is still enough


def _build(part: str, weight: float) -> Piece:
    # Of CUDA only for the present GPU, as on first use: a quarter of what `build cuda` compiles.
    code = f"from rebalfer_kernels import native; print(native.build({part!r})); print(native.load('autograd'))"
    return Piece(f"build-{part}", weight, lambda _: [PYTHON, "-c", code])


def _piece(what: str, backend: str, weight: float, command: list[str]) -> Piece:
    """A command that ends by itself after ``--seconds``, a little before its limit, at which nothing can be said."""
    needs = {"cpu": ("build-cpu",), "cuda": ("build-cuda",), "": ("build-cuda", "build-cpu")}.get(backend, ())
    name = f"{what}-{backend}".rstrip("-")
    return Piece(name, weight, lambda s: [*command, "--seconds", f"{max(0.9 * s - 8, 1):.0f}"], needs)


def _on_gpu(piece: Piece, rehearse: bool, program: str | None = "") -> Piece:
    """A piece that needs a GPU, and a ``program``, None where it is not installed."""
    return piece._replace(skip="needs a GPU" if rehearse else "not installed" if program is None else None)


def _tests(backend: str, rehearse: bool) -> Piece:
    """Few random examples where each compiles kernels of its own."""
    where = ["tests/gpu", "--marker", "not gpu"] if rehearse else []
    profile = "few" if backend == "triton" else "short"
    piece = _piece("tests", backend, 120, [*_module("gpu_tests"), backend, *where])
    return piece._replace(
        environment={"HYPOTHESIS_PROFILE": profile},
        skip=None if importlib.util.find_spec("pytest") else "pytest is not installed",
    )


def _sanitizer(tool: str, backend: str, rehearse: bool, weight: float = 40) -> Piece:
    program = _installed("compute-sanitizer")
    command = [str(program), "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    if tool == "memcheck":  # PyTorch asks the driver for things it may refuse
        command += ["--report-api-errors", "no"]
    piece = _piece(tool, backend, weight, [*command, *_module("every_op"), "--small", backend])
    # Every tensor an allocation of its own, or an access beyond one falls into another.
    piece = piece._replace(environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return _on_gpu(piece, rehearse, program)


def _counters(backend: str, rehearse: bool) -> Piece:
    program = _installed("ncu")
    command = [*counters.profiled(str(program)), *_module("counters"), backend]
    return _on_gpu(_piece("counters", backend, 50, command), rehearse, program)


def _installed(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin")
