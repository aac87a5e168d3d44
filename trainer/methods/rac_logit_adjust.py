"""Re-balanced attention consistency, Eq. 5, with logit adjustment (Menon et al., 2021) on both views."""

from __future__ import annotations

from dataclasses import dataclass

import rebalfer_kernels as rk

from ..config import expect_number, option
from . import MethodOptions, prior
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced attention consistency and logit-adjusted cross-entropy"""

    consistency_weight: float = option(2.0, "lambda of Eq. 6; the paper: 2")
    beta: float = option(0.9999, "of the class weights, Eq. 4; the paper: 0.9999")
    tau: float = option(1.0, "strength of the adjustment")

    def __post_init__(self) -> None:
        expect_number("method.consistency_weight", self.consistency_weight, 0, above=True)
        expect_number("method.beta", self.beta, 0, 1 - 1e-9)
        expect_number("method.tau", self.tau, 0)

    def build(self, backbone, task) -> TableMethod:
        return TableMethod(
            backbone,
            task,
            map_weights=rk.effective_number_weights(task.counts, self.beta).sqrt(),
            shift=self.tau * prior(task.counts).log(),
            consistency_weight=self.consistency_weight,
        )
