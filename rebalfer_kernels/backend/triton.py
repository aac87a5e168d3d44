"""The Triton kernels of ../triton, for NVIDIA and AMD GPUs, and for a CPU through Triton's interpreter."""

from __future__ import annotations

import functools
import os

import torch

from . import AVAILABLE, Backend, Request, Verdict


class Triton(Backend):
    name = "triton"
    preference = 20
    limits = {"elements": 2**31 - 1}

    def devices(self) -> tuple[str, ...]:
        return ("cpu",) if _interpreted() else ("cuda",)

    def available(self) -> Verdict:
        if not _interpreted() and not torch.cuda.is_available():
            return Verdict(False, "no NVIDIA or AMD GPU (under TRITON_INTERPRET=1 it serves CPU tensors)")
        if reason := too_old(None):
            return Verdict(False, reason)
        return _load(_interpreted())

    def serves(self, request: Request) -> Verdict:
        if _interpreted() and not request.forced:
            return Verdict(False, "Triton's interpreter serves CPU tensors only where it is asked for by name")
        if request.dtype == torch.float64:
            return Verdict(False, "serves no float64")
        if reason := too_old(request.device_index):
            return Verdict(False, reason)
        return _load(_interpreted())

    def interpreted(self) -> bool:
        return _interpreted()

    def feature_reads(self, *, maps: bool, cam_weight_gradient: bool) -> int:
        return 1 + cam_weight_gradient


BACKEND = Triton()


def too_old(device_index: int | None) -> str | None:
    """Why the kernels cannot run on an NVIDIA GPU of an early generation; None where they can."""
    if _interpreted() or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device_index)
    return None if (major, minor) >= (8, 0) else f"needs compute capability 8.0, got {major}.{minor}"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _load(interpreted: bool) -> Verdict:
    """Import the Triton kernels, which registers them."""
    try:
        from ..triton import host
    except ImportError as error:
        return Verdict(False, f"Triton is not installed ({error})")
    if host.INTERPRETED != interpreted:
        return Verdict(False, "TRITON_INTERPRET was changed after the Triton kernels were imported")
    try:
        host.probe()
    except Exception as error:  # no C compiler, no Python.h, a driver that is too old, ...
        return Verdict(False, f"Triton cannot launch a kernel here: {type(error).__name__}: {error}".splitlines()[0])
    return AVAILABLE
