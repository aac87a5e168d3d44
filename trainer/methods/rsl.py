"""Re-balanced smooth labels without consistency, Eq. 8: a row of the paper's Table 6, on one view."""

from __future__ import annotations

from dataclasses import dataclass

import rebalfer_kernels as rk

from ..config import option
from . import MethodOptions
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced smooth labels alone, on one view"""

    alpha: float = option(
        0.1, "share of the label given to classes by their weight, Eq. 8; the paper: 0.1", low=0, high=1
    )
    beta: float = option(0.9999, "of the class weights, Eq. 4; the paper: 0.9999", low=0, high=1 - 1e-9)

    def build(self, backbone, task) -> TableMethod:
        weights = rk.effective_number_weights(task.counts, self.beta)
        return TableMethod(backbone, task, target_table=rk.target_table(weights, self.alpha))
