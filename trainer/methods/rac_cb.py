"""Re-balanced attention consistency, Eq. 5, with the class-balanced loss on both views."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import rebalfer_kernels as rk

from ..config import expect_number, option
from . import MethodOptions
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced attention consistency and class-balanced cross-entropy"""

    consistency_weight: float = option(2.0, "lambda of Eq. 6; the paper: 2")
    beta: float = option(0.9999, "of the class weights, Eq. 4; the paper: 0.9999")

    def __post_init__(self) -> None:
        expect_number("method.consistency_weight", self.consistency_weight, 0, above=True)
        expect_number("method.beta", self.beta, 0, 1 - 1e-9)

    def build(self, backbone, task) -> TableMethod:
        weights = rk.effective_number_weights(task.counts, self.beta)
        return TableMethod(
            backbone,
            task,
            target_table=torch.diag(weights),
            map_weights=weights.sqrt(),
            consistency_weight=self.consistency_weight,
        )
