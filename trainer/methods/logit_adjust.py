"""Logit adjustment (Menon et al., 2021): while training, tau log(share of the class) is added to its logit."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import option
from . import MethodOptions, prior
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """logit-adjusted cross-entropy on one view"""

    tau: float = option(1.0, "strength; 0 is the baseline", low=0)

    def build(self, backbone, task) -> TableMethod:
        return TableMethod(backbone, task, shift=self.tau * prior(task.counts).log())
