"""Which backend serves a call, and why the others do not: the first of ``BACKENDS`` that answers yes."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import BACKENDS, EXPORT, Request, Verdict

logger = logging.getLogger(__name__)

_DEFAULT = os.fsencode("REBALFER_BACKEND") if os.supports_bytes_environ else "REBALFER_BACKEND"


def layout_of(features: Tensor) -> str:
    """ "nchw", "channels_last", or "strided" for any other stride order; NCHW where both describe the strides."""
    if torch.compiler.is_compiling():
        return _compiled_layout(features)
    if features.is_contiguous():
        return "nchw"
    return "channels_last" if features.is_contiguous(memory_format=torch.channels_last) else "strided"


def _compiled_layout(features: Tensor) -> str:
    """The same without the batch size, which torch.compile may not know: ``is_contiguous`` asks whether it is 0."""
    _, c, h, w = features.shape
    for layout, dense in (("nchw", (c * h * w, h * w, w, 1)), ("channels_last", (h * w * c, 1, w * c, c))):
        pairs = zip((2, c, h, w), features.stride(), dense, strict=True)
        if all(size == 1 or stride == expected for size, stride, expected in pairs):
            return layout
    return "strided"


def request(op: str, features: Tensor, weight: Tensor) -> Request:
    """What is asked for: "head" or "cam" of features (2N or M, C, H, W) and weight (L, C)."""
    device, (_, channels, height, width) = features.device, features.shape
    classes, positions, elements = weight.shape[0], height * width, channels * height * width
    exact = not torch.compiler.is_compiling()
    if not exact:
        limits = _limits(device.type)
        classes, positions = _stand_in(classes, limits[0]), _stand_in(positions, limits[1])
        elements = _stand_in(elements, limits[2])
    return Request(
        op, device.type, device.index, features.dtype, weight.dtype, layout_of(features), classes, positions, elements,
        exact, _context(),
    )  # fmt: skip


def request_of_rows(logits: Tensor) -> Request:
    """The cross-entropy of logits (M, L)."""
    device, dtype = logits.device, logits.dtype
    return Request("cross_entropy", device.type, device.index, dtype, dtype, "rows", context=_context())


def request_of_views(images: Tensor, dtype: torch.dtype) -> Request:
    """Views of uint8 images (K, h, w, C) in ``dtype``."""
    device = images.device
    return Request("views", device.type, device.index, dtype, dtype, "rows", context=_context())


def _stand_in(size: int, limits: tuple[int, ...]) -> int:
    """A constant on the same side of each limit: torch.compile then makes one graph for all sizes between them."""
    for limit in limits:
        if size <= limit:
            return limit
    return limits[-1] + 1 if limits else 0


@torch.compiler.assume_constant_result
def _limits(device: str) -> tuple[tuple[int, ...], ...]:
    """The limits on classes, positions and elements that a backend of this device has, each in ascending order."""
    of_device = [backend.limits for backend in BACKENDS.values() if backend.fused and device in backend.devices()]
    names = ("classes", "positions", "elements")
    return tuple(tuple(sorted({limits[name] for limits in of_device if name in limits})) for name in names)


def _context() -> str:
    return EXPORT if torch.compiler.is_exporting() or torch.jit.is_tracing() else ""


def _in_context(r: Request) -> Request:
    """With what is under way that only the reference serves, and that torch.compile cannot ask while it traces."""
    if r.context:
        return r
    if torch._C._are_functorch_transforms_active():
        return r._replace(context="torch.func transforms (vmap, grad, ...)")
    return r._replace(context="forward-mode differentiation") if forward_ad._current_level >= 0 else r


def ordinary() -> bool:
    """Whether the arguments of a call that is not compiled say all there is to a choice: none is traced or transformed.

    csrc/autograd/module.cpp has the same.
    """
    return not (torch._C._is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def backends() -> dict[str, str]:
    """Every backend with "available", or the reason why it is not (building the native ones if need be).

    >>> backends()["reference"]
    'available'
    """
    return {name: backend.available().reason for name, backend in reversed(BACKENDS.items())}


def forced_by(backend: str | None) -> tuple[str | None, str]:
    """The backend that must serve, if any, and who says so: the argument, else ``REBALFER_BACKEND``."""
    if backend is not None:
        return backend, "backend"
    return os.environ.get("REBALFER_BACKEND") or None, "REBALFER_BACKEND"


def default_entry() -> object:
    """What ``REBALFER_BACKEND`` is, only to be compared: os.environ.get decodes it, which a small call notices."""
    try:
        return os.environ._data.get(_DEFAULT)  # type: ignore[attr-defined]
    except AttributeError:  # another mapping in its place
        return os.environ.get("REBALFER_BACKEND")


def choose(r: Request, backend: str | None) -> str:
    """The backend that serves ``r``: the forced one (argument, else ``REBALFER_BACKEND``), else the first able one.

    Raises:
        TypeError, ValueError: no name, an unknown one. RuntimeError: the forced backend cannot serve; says why.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: got {backend!r}, expected None or {_names()}")
    name, error = _choose_while_compiling(backend, *r) if torch.compiler.is_compiling() else _choose(backend, r)
    if error is not None:
        raise (ValueError if name is None else RuntimeError)(error)
    assert name is not None
    return name


@torch.compiler.assume_constant_result
def _choose_while_compiling(backend: str | None, *r: Any) -> tuple[str | None, str | None]:
    """From plain constants, which is all that torch.compile hands over."""
    return _choose(backend, Request(*r))


def _choose(backend: str | None, r: Request) -> tuple[str | None, str | None]:
    return _choose_cached(_in_context(r), *forced_by(backend))


@functools.lru_cache(maxsize=1024)
def _choose_cached(r: Request, forced: str | None, source: str) -> tuple[str | None, str | None]:
    if forced is not None:
        if forced not in BACKENDS:
            return None, f"{source}: got {forced!r}, expected {_names()}"
        verdict = BACKENDS[forced].answer(r._replace(forced=True))
        return forced, None if verdict.ok else f"{source}: {forced!r} cannot serve this call: {verdict.reason}"
    name = next(name for name, verdict in _verdicts(r).items() if verdict.ok)
    logger.debug("%s is served by %s", r, name)
    return name, None


def _names() -> str:
    return f"one of {', '.join(map(repr, reversed(BACKENDS)))}"


def verdicts(r: Request) -> dict[str, Verdict]:
    """Each backend's answer to a request, in order of preference, up to the first that serves."""
    return _verdicts(_in_context(r))


def _verdicts(r: Request) -> dict[str, Verdict]:
    answers = {}
    for name, backend in BACKENDS.items():
        answers[name] = backend.answer(r)
        if answers[name].ok:
            break
    return answers
