"""The CUDA kernels of csrc/cuda, for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import torch

from .. import native
from . import Backend, Request, Verdict
from .triton import BACKEND as TRITON
from .triton import too_old

#: Layout of the maps (strided ones are copied to nchw) -> whether CUDA comes before Triton where both serve, and why.
#: C, H W, L, dtype and architecture make no difference yet.
_FIRST = {
    "rows": (True, "one launch each way"),
    "nchw": (True, "a row of 7 x 7 is no whole number of vectors: CUDA copies slabs of channels, Triton elements"),
    "channels_last": (False, "both read 16 bytes at a time, and Triton fits its tiles to the shape"),
}
_NOT_MEASURED = "by design, not yet measured"


class Cuda(Backend):
    name = "cuda"
    preference = 10
    lacks = ("views",)
    limits = {"classes": 16, "positions": 64}  # kMaxClasses and kMaxPositions of csrc/cuda/kernels.cuh

    def devices(self) -> tuple[str, ...]:
        return ("cuda",)

    def available(self) -> Verdict:
        return Verdict(*native.load("cuda"))

    def serves(self, request: Request) -> Verdict:
        if request.dtype == torch.float64:
            return Verdict(False, "serves no float64")
        if reason := too_old(request.device_index):
            return Verdict(False, reason)
        first, why = _FIRST["nchw" if request.layout == "strided" else request.layout]
        if not request.forced and not first and TRITON.answer(request).ok:
            return Verdict(False, f"Triton comes first: {why} ({_NOT_MEASURED})")
        available, reason = self.available()
        return Verdict(available, f"{why} ({_NOT_MEASURED})" if available and first else reason)

    def feature_reads(self, *, maps: bool, cam_weight_gradient: bool) -> int:
        return 1 + maps


BACKEND = Cuda()
