"""What the signature of a call decides, decided once: arguments like those of an earlier call are not checked again."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

from torch import Tensor

from . import dispatch

T = TypeVar("T")

#: Signatures remembered before all are forgotten. Each batch size has its own.
LIMIT = 1024

_decided: dict[tuple[Any, ...], Any] = {}
_read = attrgetter("shape", "dtype", "device", "requires_grad")


def once(decide: Callable[..., T], tensors: tuple[Any, ...], options: tuple[Any, ...]) -> T:
    """``decide(*tensors, *options)``, or what that was for an earlier call of the same signature.

    The signature is what follows here, and ``decide`` may look at nothing else: shape, strides, dtype, device and
    requires_grad of tensors, the class of what is none, value and class of options, and the default
    backend. Numbers that are stored in tensors are no part of it. What raises is decided, and so raises, at every call.
    """
    if not dispatch.ordinary():
        return decide(*tensors, *options)
    try:
        signature = decide, options, tuple(map(type, options)), dispatch.default_entry(), _described(tensors)
        decision = _decided.get(signature)
    except (TypeError, RuntimeError):  # an option that is a list, a tensor without strides
        return decide(*tensors, *options)
    if decision is None:
        decision = decide(*tensors, *options)
        if len(_decided) >= LIMIT:
            _decided.clear()
        _decided[signature] = decision
    return decision


def _described(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        return tuple(map(_read, tensors)), tuple(map(Tensor.stride, tensors))  # faster than a loop in Python
    except (AttributeError, TypeError):  # one is None, or no tensor and will be refused
        return tuple((*_read(x), x.stride()) if isinstance(x, Tensor) else type(x) for x in tensors)
