"""Relative Uncertainty Learning (Zhang et al., 2021): images are mixed by how uncertain they are.

Two heads on the features give a mean mu and a logarithm of the variance; u is the mean variance. With a partner j,
mu~ = (u_i mu_i + u_j mu_j) / (u_i + u_j) is to be classified as both images.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..config import UserError, option
from . import Method, MethodOptions, Task, soft


@dataclass(frozen=True)
class Options(MethodOptions):
    """relative uncertainty: pairs of images mixed in feature space, on one view"""

    size: int = option(64, "numbers that describe an image; the authors: 64", low=1)
    dropout: float = option(0.4, "of the features; the authors: 0.4", low=0, high=1)

    def build(self, backbone, task) -> Rul:
        return Rul(backbone, task, self)


class Rul(Method):
    paired = False
    rates = {"head.": 10.0}  #: the authors: 2e-3 where the rest has 2e-4

    def __init__(self, backbone, task: Task, options: Options) -> None:
        super().__init__(backbone, nn.Linear(options.size, len(task.counts)))
        self.mean, self.log_variance = (self._branch(backbone, options) for _ in range(2))

    @staticmethod
    def _branch(backbone, options: Options) -> nn.Module:
        height, width = backbone.map_size
        return nn.Sequential(
            nn.BatchNorm2d(backbone.channels, eps=2e-5, affine=False),
            nn.Dropout(options.dropout),
            nn.Flatten(),
            nn.Linear(backbone.channels * height * width, options.size),
            nn.BatchNorm1d(options.size),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.mean(self.backbone(images).float()))

    def maps(self, images: Tensor) -> Tensor:
        raise UserError("method: got rul, which has no class activation maps: its logits are not linear in a mean")

    def losses(self, batch) -> dict[str, Tensor]:
        features = self.backbone(batch.view()).float()
        mean, uncertainty = self.mean(features), self.log_variance(features).exp().mean(1, keepdim=True)
        partner = batch.uniform(0)[:, 0].argsort()
        mixed = (uncertainty * mean + uncertainty[partner] * mean[partner]) / (uncertainty + uncertainty[partner])
        log_p = self.head(mixed).log_softmax(1)
        target = soft(batch.labels, log_p.shape[1])
        return {"loss": -(0.5 * (target + target[partner]) * log_p).sum(1).mean()}
