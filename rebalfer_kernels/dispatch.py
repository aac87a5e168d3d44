"""Which backend serves a call, and why the others do not.

A backend is a name in ``BACKENDS`` and a predicate that answers ``(ok, reason)`` from a :class:`Request`; the first
that can serve is taken. The batch size is no part of a request: it never changes the choice, and never recompiles.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native

logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """What a predicate may look at."""

    op: str  #: "head", "cam" or "cross_entropy"
    device: str  #: device type
    device_index: int | None
    dtype: torch.dtype  #: of the features (or logits)
    weight_dtype: torch.dtype
    layout: str  #: "nchw", "channels_last" or "strided" (which is copied to nchw first)
    channels: int
    height: int
    width: int
    classes: int
    functorch: bool  #: called under torch.func (vmap, grad, jvp, ...)
    forced: bool = False  #: asked for by name


class Verdict(NamedTuple):
    ok: bool
    reason: str  #: "available", or why not


def layout_of(features: Tensor) -> str:
    """ "nchw", "channels_last", or "strided" for any other stride order; NCHW where both describe the strides."""
    if features.is_contiguous():
        return "nchw"
    return "channels_last" if features.is_contiguous(memory_format=torch.channels_last) else "strided"


def request(op: str, features: Tensor, weight: Tensor) -> Request:
    channels, height, width = (_static(s) for s in features.shape[1:]) if op != "cross_entropy" else (1, 1, 1)
    device = features.device
    layout = layout_of(features) if op != "cross_entropy" else "nchw"
    return Request(
        op, device.type, device.index, features.dtype, weight.dtype, layout, channels, height, width,
        _static(weight.shape[0] if op != "cross_entropy" else features.shape[1]),
        not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active(),
    )  # fmt: skip


def _static(size: int) -> int:
    """The size; for torch.compile a constant even where it was told that all sizes change, as no range is symbolic."""
    return len(range(size))


def _reference(r: Request | None) -> Verdict:
    return Verdict(True, "available")


def _cpu(r: Request | None) -> Verdict:
    if r is not None and r.device != "cpu":
        return Verdict(False, f"serves CPU tensors, got {r.device}")
    return Verdict(*native.load("cpu"))


def _triton(r: Request | None) -> Verdict:
    """NVIDIA and AMD GPUs; a CPU through Triton's interpreter, which is slow, so only when asked for by name."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if r is not None:
        if r.device != ("cpu" if interpreted else "cuda"):
            return Verdict(False, f"serves GPU tensors, or CPU tensors under TRITON_INTERPRET=1, got {r.device}")
        if interpreted and not r.forced:
            return Verdict(False, "serves CPU tensors, by Triton's interpreter, only where it is asked for by name")
        if r.dtype == torch.float64:
            return Verdict(False, "serves no float64")
        if r.channels * r.height * r.width >= 2**31:
            return Verdict(False, "serves views of fewer than 2^31 elements")
    elif not interpreted and not torch.cuda.is_available():
        return Verdict(False, "no NVIDIA or AMD GPU (under TRITON_INTERPRET=1 a CPU will do)")
    if not interpreted and not torch.version.hip:
        capability = torch.cuda.get_device_capability(None if r is None else r.device_index)
        if capability < (8, 0):
            return Verdict(False, f"needs compute capability 8.0, got {capability[0]}.{capability[1]}")
    return _load_triton(interpreted)


@functools.cache
def _load_triton(interpreted: bool) -> Verdict:
    """Import the Triton kernels, which registers them."""
    try:
        from . import triton_ops
    except ImportError as error:
        return Verdict(False, f"Triton is not installed ({error})")
    if triton_ops.INTERPRETED != interpreted:
        return Verdict(False, "TRITON_INTERPRET was changed after the Triton kernels were imported")
    try:
        triton_ops.probe()
    except Exception as error:  # no C compiler, no Python.h, a driver that is too old, ...
        return Verdict(False, f"Triton cannot launch a kernel here: {type(error).__name__}: {error}".splitlines()[0])
    return Verdict(True, "available")


#: What csrc/cuda/kernels.cuh serves: classes and H W positions of a map.
CUDA_MAX_CLASSES, CUDA_MAX_POSITIONS = 16, 64
#: Layout of the maps (strided ones are copied to nchw) -> whether CUDA comes before Triton where both serve, and why.
#: C, H W, L, dtype and architecture make no difference yet.
_CUDA_FIRST = {
    "cross_entropy": (True, "one launch each way"),
    "nchw": (True, "a row of 7 x 7 is no whole number of vectors: CUDA copies slabs of channels, Triton elements"),
    "channels_last": (False, "both read 16 bytes at a time, and Triton fits its tiles to the shape"),
}
_NOT_MEASURED = "by design, not yet measured"


def _cuda(r: Request | None) -> Verdict:
    if r is None:
        return Verdict(*native.load("cuda"))
    if r.device != "cuda":
        return Verdict(False, f"serves CUDA tensors, got {r.device}")
    if r.dtype == torch.float64:
        return Verdict(False, "serves no float64")
    if r.op != "cross_entropy" and r.classes > CUDA_MAX_CLASSES:
        return Verdict(False, f"serves at most {CUDA_MAX_CLASSES} classes, got {r.classes}")
    if r.op != "cross_entropy" and r.height * r.width > CUDA_MAX_POSITIONS:
        return Verdict(False, f"serves maps of at most {CUDA_MAX_POSITIONS} positions, got {r.height} x {r.width}")
    capability = torch.cuda.get_device_capability(r.device_index)
    if capability < (8, 0):
        return Verdict(False, f"needs compute capability 8.0, got {capability[0]}.{capability[1]}")
    kind = r.op if r.op == "cross_entropy" else r.layout if r.layout == "channels_last" else "nchw"
    first, why = _CUDA_FIRST[kind]
    if not r.forced and not first and _triton(r).ok:
        return Verdict(False, f"Triton comes first: {why} ({_NOT_MEASURED})")
    there, reason = native.load("cuda")
    return Verdict(there, f"{why} ({_NOT_MEASURED})" if there and first else reason)


#: In order of preference. Each answers for a request, or, given None, whether it is there at all.
BACKENDS = {"cuda": _cuda, "triton": _triton, "cpu": _cpu, "reference": _reference}


def backends() -> dict[str, str]:
    """Every backend with "available", or the reason why it is not (building the native ones if need be).

    >>> backends()["reference"]
    'available'
    """
    return {name: BACKENDS[name](None).reason for name in reversed(BACKENDS)}


def forced_by(backend: str | None) -> tuple[str | None, str]:
    """The backend that must serve, if any, and who says so: the argument, else ``REBALFER_BACKEND``."""
    if backend is not None:
        return backend, "backend"
    return os.environ.get("REBALFER_BACKEND") or None, "REBALFER_BACKEND"


def choose(r: Request, backend: str | None) -> str:
    """The backend that serves ``r``: the forced one (argument, else ``REBALFER_BACKEND``), else the first able one.

    Raises:
        TypeError, ValueError: no name, an unknown one. RuntimeError: the forced backend cannot serve; says why.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: got {backend!r}, expected None or one of {', '.join(map(repr, reversed(BACKENDS)))}")
    name, error = _choose(backend, *r)
    if error is not None:
        raise (ValueError if name is None else RuntimeError)(error)
    assert name is not None
    return name


@torch.compiler.assume_constant_result
def _choose(backend: str | None, *r: Any) -> tuple[str | None, str | None]:  # torch.compile hands on plain constants
    asked = Request(*r)
    # torch.compile cannot ask this while it traces, but runs this function then.
    asked = asked._replace(functorch=asked.functorch or torch._C._are_functorch_transforms_active())
    return _choose_cached(asked, *forced_by(backend))


@functools.lru_cache(maxsize=1024)
def _choose_cached(r: Request, forced: str | None, source: str) -> tuple[str | None, str | None]:
    if forced is not None:
        if forced not in BACKENDS:
            return None, f"{source}: got {forced!r}, expected one of {', '.join(map(repr, reversed(BACKENDS)))}"
        verdict = _answer(forced, r._replace(forced=True))
        return forced, None if verdict.ok else f"{source}: {forced!r} cannot serve this call: {verdict.reason}"
    for name, passed_over in verdicts(r).items():
        if passed_over.ok:
            logger.debug("%s is served by %s", r, name)
            return name, None
    raise AssertionError("the reference serves everything")


def _answer(name: str, r: Request) -> Verdict:
    if r.functorch and name != "reference":
        return Verdict(False, "the fused backends do not serve torch.func transforms (vmap, grad, ...)")
    return BACKENDS[name](r)


def verdicts(r: Request) -> dict[str, Verdict]:
    """Each backend's answer to a request, in order of preference, up to the first that serves."""
    answers = {}
    for name in BACKENDS:
        answers[name] = _answer(name, r)
        if answers[name].ok:
            break
    return answers
