"""Re-balanced attention consistency, Eq. 5, with each of its choices as an option, to see what each of them does."""

from __future__ import annotations

from dataclasses import dataclass

import rebalfer_kernels as rk

from ..config import option
from . import MethodOptions
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced attention consistency, part by part"""

    consistency_weight: float = option(2.0, "lambda of Eq. 6; the paper: 2", low=0)
    views: str = option("both", "which are classified; original: the image alone", choices=("both", "original"))
    power: float = option(0.5, "of the class weights B on a map; 0: all classes alike, the paper: 0.5", low=0, high=2)
    detach: bool = option(True, "the consistency gives the classifier's weight no gradient")
    beta: float = option(0.9999, "of the class weights, Eq. 4; the paper: 0.9999", low=0, high=1 - 1e-9)

    def build(self, backbone, task) -> TableMethod:
        return TableMethod(
            backbone,
            task,
            map_weights=rk.effective_number_weights(task.counts, self.beta) ** self.power,
            consistency_weight=self.consistency_weight,
            views=self.views,
            detach=self.detach,
        )
