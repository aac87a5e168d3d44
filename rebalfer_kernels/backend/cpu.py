"""The C++ kernels of csrc/cpu."""

from __future__ import annotations

from .. import native
from . import Backend, Verdict


class Cpu(Backend):
    name = "cpu"
    preference = 30

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def available(self) -> Verdict:
        return Verdict(*native.load("cpu"))

    def feature_reads(self, *, maps: bool, cam_weight_gradient: bool) -> int:
        return 1 + maps


BACKEND = Cpu()
