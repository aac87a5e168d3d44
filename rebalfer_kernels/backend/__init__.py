"""The backends, one file each: its name, when it is asked, what it serves and what it reads.

A file in this folder that defines an instance called ``BACKEND`` is a backend; dispatch, the operators, ``explain``,
the doctor and the benchmark iterate over :data:`BACKENDS` and name none of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import NamedTuple

import torch


class Request(NamedTuple):
    """What a backend may look at. The batch size is no part of it, so it changes neither the choice nor the graph."""

    op: str  #: "head", "cam", "cross_entropy" or "views"
    device: str  #: device type
    device_index: int | None
    dtype: torch.dtype  #: of the features (or logits)
    weight_dtype: torch.dtype
    layout: str  #: "nchw", "channels_last", "strided" (copied to nchw first) or, of a cross-entropy, "rows"
    classes: int = 1  #: L; of a cross-entropy, which has no limits, the three sizes are 1
    positions: int = 1  #: H W
    elements: int = 1  #: C H W
    exact: bool = True  #: False: the sizes are stand-ins that only say which limits are exceeded
    context: str = ""  #: what only the reference serves: a torch.func transform, forward-mode differentiation, export
    forced: bool = False  #: asked for by name


class Verdict(NamedTuple):
    ok: bool
    reason: str  #: "available", why it comes first, or why it cannot serve


AVAILABLE = Verdict(True, "available")


class Backend:
    """What the rest of the package knows of a backend; see ``reference.py`` here for the simplest."""

    name: str
    preference: int  #: the backend with the lowest that serves a call is chosen
    fused = True  #: whether it implements the operators of ``ops.py``
    lacks: tuple[str, ...] = ()  #: the requests, by ``op``, that it has no kernel for
    limits: dict[str, int] = {}  #: the largest "classes", "positions" or "elements" it serves

    def devices(self) -> tuple[str, ...]:
        """The types of device whose tensors it serves on this machine, whether or not it is available."""
        raise NotImplementedError

    def available(self) -> Verdict:
        """Whether it can be used on this machine at all; builds or imports what it needs."""
        raise NotImplementedError

    def serves(self, request: Request) -> Verdict:
        """Whether it serves this request, whose device is one of its own and whose sizes keep its limits."""
        return self.available()

    def interpreted(self) -> bool:
        """Whether its kernels are interpreted on this machine, and so too slow for large sizes."""
        return False

    def feature_reads(self, *, maps: bool, cam_weight_gradient: bool) -> int | None:
        """How often the head reads the features in forward and backward; None: not counted."""
        return None

    def answer(self, request: Request) -> Verdict:
        """:meth:`serves`, after what holds for every backend."""
        if self.fused and request.context and not (request.forced and request.context == EXPORT):
            return Verdict(False, f"the fused backends do not serve {request.context}")
        if request.device not in self.devices():
            return Verdict(False, f"serves {' and '.join(self.devices())} tensors, got {request.device}")
        if request.op in self.lacks:
            return Verdict(False, f"has no kernel for {request.op}")
        for name, limit in self.limits.items():
            if (size := getattr(request, name)) > limit:
                return Verdict(False, f"serves at most {limit} {name}, got {size if request.exact else 'more'}")
        return self.serves(request)


#: The context of torch.export and of the ONNX exporters, in which a fused backend serves only if asked for by name.
EXPORT = "export, unless asked for by name"


def _found() -> dict[str, Backend]:
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    backends = sorted((module.BACKEND for module in modules), key=lambda backend: backend.preference)
    return {backend.name: backend for backend in backends}


#: name -> backend, in order of preference.
BACKENDS = _found()
