"""Re-balanced attention consistency, Eq. 5, with the class-balanced loss on both views."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import rebalfer_kernels as rk

from ..config import option
from . import MethodOptions
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced attention consistency and class-balanced cross-entropy"""

    consistency_weight: float = option(2.0, "lambda of Eq. 6; the paper: 2", low=0)
    beta: float = option(0.9999, "of the class weights, Eq. 4; the paper: 0.9999", low=0, high=1 - 1e-9)

    def build(self, backbone, task) -> TableMethod:
        weights = rk.effective_number_weights(task.counts, self.beta)
        return TableMethod(
            backbone,
            task,
            target_table=torch.diag(weights),
            map_weights=weights.sqrt(),
            consistency_weight=self.consistency_weight,
        )
