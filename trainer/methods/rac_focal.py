"""Re-balanced attention consistency and focus (Zhu et al., CMC 2025, 85(1):1585), by our reading.

No program was published, and the exact factor was not obtained. Here the consistency is that of Eq. 5, and each view is
classified by B_y (1 - p_y)^gamma times its cross-entropy, with the class weights B of Eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rebalfer_kernels as rk

from ..config import option
from . import MethodOptions, soft
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced attention consistency and a re-balanced focal loss, by our reading"""

    consistency_weight: float = option(2.0, "lambda of Eq. 6; the paper: 2", low=0)
    beta: float = option(0.9999, "of the class weights, Eq. 4", low=0, high=1 - 1e-9)
    gamma: float = option(2.0, "exponent of the focal factor; 0: none", low=0)

    def build(self, backbone, task) -> TableMethod:
        return RacFocal(backbone, task, self)


class RacFocal(TableMethod):
    class_weights: Tensor

    def __init__(self, backbone, task, options: Options) -> None:
        weights = rk.effective_number_weights(task.counts, options.beta)
        weight = options.consistency_weight
        super().__init__(backbone, task, map_weights=weights.sqrt(), consistency_weight=weight)
        self.register_buffer("class_weights", weights, persistent=False)
        self.gamma = options.gamma

    def losses(self, batch) -> dict[str, Tensor]:
        out = self.loss_of(self.backbone.pair(batch.pair()), batch.labels)
        target = soft(batch.labels, len(self.class_weights))
        log_p = torch.stack(out.logits.chunk(2)).log_softmax(2)  # (2, N, L)
        focal = target * self.class_weights * (1 - log_p.exp()) ** self.gamma * -log_p
        classification = focal.sum(2).mean(1).sum()
        loss = classification + self.consistency_weight * out.consistency
        return {"loss": loss, "classification": classification, "consistency": out.consistency}
