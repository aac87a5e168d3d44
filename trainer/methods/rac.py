"""Re-balanced attention consistency without smooth labels, Eq. 5: a row of the paper's Table 6."""

from __future__ import annotations

from dataclasses import dataclass

import rebalfer_kernels as rk

from ..config import option
from . import MethodOptions
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced attention consistency alone"""

    consistency_weight: float = option(2.0, "lambda of Eq. 6; the paper: 2", low=0)
    beta: float = option(0.9999, "of the class weights, Eq. 4; the paper: 0.9999", low=0, high=1 - 1e-9)

    def build(self, backbone, task) -> TableMethod:
        weights = rk.effective_number_weights(task.counts, self.beta)
        return TableMethod(backbone, task, map_weights=weights.sqrt(), consistency_weight=self.consistency_weight)
