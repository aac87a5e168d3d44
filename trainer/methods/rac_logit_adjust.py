"""Re-balanced attention consistency, Eq. 5, with logit adjustment (Menon et al., 2021) on both views."""

from __future__ import annotations

from dataclasses import dataclass

import rebalfer_kernels as rk

from ..config import option
from . import MethodOptions, prior
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced attention consistency and logit-adjusted cross-entropy"""

    consistency_weight: float = option(2.0, "lambda of Eq. 6; the paper: 2", low=0)
    beta: float = option(0.9999, "of the class weights, Eq. 4; the paper: 0.9999", low=0, high=1 - 1e-9)
    tau: float = option(1.0, "strength of the adjustment", low=0)

    def build(self, backbone, task) -> TableMethod:
        return TableMethod(
            backbone,
            task,
            map_weights=rk.effective_number_weights(task.counts, self.beta).sqrt(),
            shift=self.tau * prior(task.counts).log(),
            consistency_weight=self.consistency_weight,
        )
