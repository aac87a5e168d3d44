"""The CUDA kernels of csrc/cuda, for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import torch

from .. import native
from . import Backend, Request, Verdict
from .triton import too_old

#: Measured on an H200 (bfloat16, 7 x 7): a call of Triton's keeps the host busy for four times as long and more, which
#: decides without a CUDA graph. In a graph Triton is ahead where the batch is large and channels_last.
_WHY = "the least time of the host, and one launch each way"


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
        available, reason = self.available()
        return Verdict(available, _WHY if available else reason)

    def feature_reads(self, *, maps: bool, cam_weight_gradient: bool) -> int:
        return 1 + maps


BACKEND = Cuda()
