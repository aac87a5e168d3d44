"""The class-balanced losses of Cui et al. (2019): a loss times the weight of its class, Eq. 4, summed and divided by N.

The weights (1 - beta) / (1 - beta^n_y) are scaled so that their sum is L. With logits z, label y and the sign
t_l = 1 for l = y and -1 otherwise, the loss of an image is

- softmax: -log softmax(z)_y;
- sigmoid: -sum_l log sigmoid(t_l z_l);
- focal:   -sum_l (1 - sigmoid(t_l z_l))^gamma log sigmoid(t_l z_l).

For the last two, the bias starts at -log(L - 1), so that every class starts with the probability 1 / L, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rebalfer_kernels as rk

from ..config import UserError, option
from . import MethodOptions, soft
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """class-balanced cross-entropy on one view, or the focal or sigmoid loss"""

    loss: str = option("softmax", "which loss is weighed", choices=("softmax", "focal", "sigmoid"))
    beta: float = option(0.9999, "of the class weights, Eq. 4", low=0, high=1 - 1e-9)
    gamma: float = option(1.0, "exponent of the focal loss; the authors: 0.5, 1 or 2", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "focal" and self.gamma != type(self).gamma:
            raise UserError(f"method.gamma: got {self.gamma}, which has no effect with method.loss {self.loss}")

    def build(self, backbone, task) -> TableMethod:
        weights = rk.effective_number_weights(task.counts, self.beta)
        if self.loss == "softmax":
            return TableMethod(backbone, task, target_table=torch.diag(weights))
        return OneAgainstRest(backbone, task, weights, self.gamma if self.loss == "focal" else 0.0)


class OneAgainstRest(TableMethod):
    """Each class a question of its own; ``gamma`` 0 is the sigmoid loss."""

    class_weights: Tensor

    def __init__(self, backbone, task, class_weights: Tensor, gamma: float) -> None:
        super().__init__(backbone, task)
        self.register_buffer("class_weights", class_weights.float(), persistent=False)
        self.gamma = gamma
        torch.nn.init.constant_(self.head.bias, -math.log(len(task.counts) - 1))

    def losses(self, batch) -> dict[str, Tensor]:
        z = self.head(self.backbone(batch.view()))
        return {"loss": one_against_rest(z, soft(batch.labels, z.shape[1]), self.class_weights, self.gamma)}


def one_against_rest(z: Tensor, target: Tensor, class_weights: Tensor, gamma: float) -> Tensor:
    """Mean over images of logits ``z`` (N, L), targets (N, L) and weights (L,) of the classes."""
    yes = (1 - z.sigmoid()) ** gamma * logsigmoid(z)
    no = z.sigmoid() ** gamma * logsigmoid(-z)
    of_image = -(target * yes + (1 - target) * no).sum(1)
    return ((target @ class_weights) * of_image).mean()
