"""Plain PyTorch: the truth, and what serves where nothing else can."""

from __future__ import annotations

import torch

from . import AVAILABLE, Backend, Request, Verdict


class Reference(Backend):
    name = "reference"
    preference = 100
    fused = False

    def devices(self) -> tuple[str, ...]:
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def available(self) -> Verdict:
        return AVAILABLE

    def answer(self, request: Request) -> Verdict:
        return AVAILABLE  # on every device that PyTorch has


BACKEND = Reference()
