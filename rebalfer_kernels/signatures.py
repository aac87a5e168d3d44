"""What the signature of a call decides, decided once: arguments like those of an earlier call are not checked again."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dispatch

T = TypeVar("T")
Describe = Callable[[tuple[Any, ...], tuple[Any, ...], Any], Any]

#: Signatures remembered before all are forgotten. Each batch size has its own.
LIMIT = 1024

_decided: dict[tuple[Any, ...], Any] = {}
_read = attrgetter("shape", "dtype", "device", "requires_grad")
#: Classes, without their subclasses, of tensors and of options whose values say all that a decision may depend on.
_TENSORS, _OPTIONS = {Tensor, torch.nn.Parameter, type(None)}, {bool, int, str, bytes, type(None)}


def once(decide: Callable[..., T], tensors: tuple[Any, ...], options: tuple[Any, ...]) -> T:
    """``decide(*tensors, *options)``, or what that was for an earlier call of the same signature.

    The signature is what follows here, and ``decide`` may look at nothing else: shape, strides, dtype, device and
    requires_grad of tensors, which of them are None, value and class of options, and the default backend. Numbers that
    are stored in tensors are no part of it. Calls with anything else (a subclass of Tensor, an option that is a list)
    have none, and what raises is decided, and so raises, at every call.
    """
    if torch.compiler.is_compiling():
        return decide(*tensors, *options)
    described = _described(tensors, options, dispatch.default_entry())
    if described is None:
        return decide(*tensors, *options)
    signature = decide, described
    decision = _decided.get(signature)
    if decision is None:
        decision = decide(*tensors, *options)
        if len(_decided) >= LIMIT:
            _decided.clear()
        _decided[signature] = decision
    return decision


def exact(tensors: tuple[Any, ...]) -> bool:
    """Whether these are tensors of no subclass, or None: code that is not Python may take them for what they hold."""
    return {*map(type, tensors)} <= _TENSORS


def described_in_python(tensors: tuple[Any, ...], options: tuple[Any, ...], default: Any) -> Any:
    """The arguments as something to compare; None for a call without a signature."""
    if not (dispatch.ordinary() and exact(tensors) and {*map(type, options), type(default)} <= _OPTIONS):
        return None
    if any(x is not None and (x.layout is not torch.strided or x.is_nested) for x in tensors):
        return None
    seen = tuple([x if x is None else (_read(x), x.stride()) for x in tensors])
    return seen, options, tuple(map(type, options)), default


_described: Describe = described_in_python


def describe_by(described: Describe) -> None:
    """Let a function that is faster take the place of ``described_in_python``."""
    global _described
    _described = described
