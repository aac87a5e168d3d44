"""The paper's method: re-balanced attention consistency and smooth labels, as written or as its authors' program."""

from __future__ import annotations

from dataclasses import dataclass

import rebalfer_kernels as rk

from ..config import UserError, option
from . import MethodOptions, Task
from .tables import TableMethod

#: What each convention takes where the option is left out: alpha and lambda.
DEFAULTS = {"paper": (0.1, 2.0), "released": (0.3, 0.1)}


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced attention consistency and smooth labels"""

    convention: str = option(
        "paper", "paper, or released: as the authors' program weighs", choices=("paper", "released")
    )
    alpha: float | None = option(None, "share of the label given away, Eq. 8; paper 0.1, released 0.3", low=0, high=1)
    consistency_weight: float | None = option(None, "lambda of Eq. 6; paper 2, released 0.1", low=0)
    beta: float = option(0.9999, "of the class weights, Eq. 4; the paper: 0.9999", low=0, high=1 - 1e-9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.convention == "released" and self.beta != type(self).beta:
            raise UserError(f"method.beta: got {self.beta}, which has no effect: the released program uses 1/n_l")

    def build(self, backbone, task) -> TableMethod:
        alpha, consistency_weight = DEFAULTS[self.convention]
        alpha = alpha if self.alpha is None else self.alpha
        tables = self._paper(task, alpha) if self.convention == "paper" else self._released(task, alpha)
        if self.consistency_weight is not None:
            consistency_weight = self.consistency_weight
        return TableMethod(backbone, task, **tables, consistency_weight=consistency_weight)

    def _paper(self, task: Task, alpha: float) -> dict:
        weights = rk.effective_number_weights(task.counts, self.beta)
        return {"target_table": rk.target_table(weights, alpha), "map_weights": weights.sqrt(), "views": "both"}

    def _released(self, task: Task, alpha: float) -> dict:
        """Its weights are (sum n / 10) / n_l, its consistency is summed over classes, and it classifies the image."""
        num_classes = len(task.counts)
        weights = rk.inverse_frequency_weights(task.counts, normalize=False) * num_classes / 10
        return {
            "target_table": rk.target_table(weights, alpha, spread="non_target"),
            "map_weights": (weights * num_classes).sqrt(),
            "views": "original",
        }
