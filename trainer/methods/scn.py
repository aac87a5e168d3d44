"""Self-Cure Network (Wang et al., 2020): each image has a weight, and labels that look wrong are replaced.

With a = sigmoid(w . f + b) the logits are a FC(f). The mean weight of the 70 % of a batch that weigh the most is to
exceed that of the rest by a margin. From an epoch on, the label of an image becomes the predicted class where that is
more probable by another margin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import distributed
from ..config import option
from . import Method, MethodOptions, Task, soft
from .tables import TableHead


@dataclass(frozen=True)
class Options(MethodOptions):
    """self-cure network: weighted images and replaced labels, on one view"""

    share: float = option(0.7, "of a batch that is to weigh more", low=0, high=1, above=True)
    margin: float = option(
        0.07, "between the weights of the two parts; the authors: 0.15 at 1024 images, 0.07 at 64", low=0
    )
    relabel_from: int = option(10, "epoch from which labels are replaced, counted from 0", low=0)
    relabel_margin: float = option(0.2, "by which another class must be more probable than the label", low=0, high=1)

    def build(self, backbone, task) -> Scn:
        return Scn(backbone, task, self)


class Scn(Method):
    """``replaced`` (K,) has the new label of each training image, -1 where it is the old one."""

    paired, capturable = False, False
    replaced: Tensor

    def __init__(self, backbone, task: Task, options: Options) -> None:
        n = len(task.counts)
        super().__init__(
            backbone, TableHead(backbone.channels, torch.eye(n), torch.ones(n), torch.zeros(n), task.backend)
        )
        self.attention, self.options = nn.Linear(backbone.channels, 1), options
        self.register_buffer("replaced", torch.full((sum(task.counts),), -1))
        self.seen: list[tuple[Tensor, Tensor]] = []  #: rows and probabilities of the parts of this step

    def weighted(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (M,) and logits (M, L) of features (M, C, H, W)."""
        weight = self.attention(features.float().mean((2, 3)))[:, 0].sigmoid()
        return weight, weight[:, None] * self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.weighted(self.backbone(images))[1]

    def losses(self, batch) -> dict[str, Tensor]:
        weight, z = self.weighted(self.backbone(batch.view()))
        target = soft(batch.labels, z.shape[1])
        new = self.replaced[batch.rows]
        target = torch.where((new >= 0)[:, None], soft(new.clamp(min=0), z.shape[1]), target)
        self.seen.append((batch.rows, z.detach().softmax(1)))
        classification = -(target * z.log_softmax(1)).sum(1).mean()
        order = weight.sort(descending=True).values
        first = max(1, min(len(order) - 1, int(self.options.share * len(order))))
        ranking = (self.options.margin - (order[:first].mean() - order[first:].mean())).clamp(min=0)
        if len(order) < 2:
            ranking = ranking * 0
        return {"loss": classification + ranking, "classification": classification, "ranking": ranking}

    def after_step(self, batch) -> None:
        rows, p = map(torch.cat, zip(*self.seen, strict=True))
        self.seen = []
        if batch.epoch < self.options.relabel_from:
            return
        old = torch.where(
            self.replaced[rows] >= 0, self.replaced[rows], soft(batch.source.labels[rows], p.shape[1]).argmax(1)
        )
        best = p.max(1)
        wrong = best.values - p.gather(1, old[:, None])[:, 0] > self.options.relabel_margin
        found = torch.zeros_like(self.replaced)
        found[rows] = torch.where(wrong, best.indices + 1, 0)
        found = distributed.total(found)  # each process has looked at other images
        self.replaced.copy_(torch.where(found > 0, found - 1, self.replaced))
