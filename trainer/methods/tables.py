"""Methods that differ only in the tables of one head: soft labels, map weights, views and a shift of the logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import rebalfer_kernels as rk

from . import Method, Task

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..data.batches import Batch


class TableHead(nn.Module):
    """A linear classifier (L, C) of mean features, its tables, and its class activation maps.

    Args:
        channels: C. target_table: (L, L), row y is the target of class y. map_weights: (L,) v of Eq. 5.
        shift: (L,), added to the bias while training only. backend: of the operators.
    """

    def __init__(
        self, channels: int, target_table: Tensor, map_weights: Tensor, shift: Tensor, backend: str | None
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(channels)
        self.weight = nn.Parameter(torch.empty(len(target_table), channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(target_table)).uniform_(-bound, bound))
        for name, table in (("target_table", target_table), ("map_weights", map_weights), ("shift", shift)):
            self.register_buffer(name, table.float(), persistent=False)
        self.backend = backend

    target_table: Tensor
    map_weights: Tensor
    shift: Tensor

    def forward(self, features: Tensor) -> Tensor:
        return rk.reference.logits_of(features, self.weight, self.bias)

    def maps(self, features: Tensor) -> Tensor:
        return rk.class_activation_maps(features, self.weight, backend=self.backend)

    def classification(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of one view against the table's rows."""
        logits = rk.reference.logits_of(features, self.weight, self.bias + self.shift)
        return rk.rebalanced_cross_entropy(logits, labels, self.target_table, backend=self.backend)


class TableMethod(Method):
    """One view and its classification, or, with a consistency weight, both views and the whole head.

    A weight of 0 is one: it shows what classifying both views does alone.
    """

    head: TableHead

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        *,
        target_table: Tensor | None = None,
        map_weights: Tensor | None = None,
        shift: Tensor | None = None,
        consistency_weight: float | None = None,
        views: str = "both",
        detach: bool = True,
    ) -> None:
        num_classes = len(task.counts)
        head = TableHead(
            backbone.channels,
            torch.eye(num_classes) if target_table is None else target_table,
            torch.ones(num_classes) if map_weights is None else map_weights,
            torch.zeros(num_classes) if shift is None else shift,
            task.backend,
        )
        super().__init__(backbone, head)
        self.paired, self.consistency_weight = consistency_weight is not None, consistency_weight or 0.0
        self.views, self.detach = views, detach

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.paired:
            return {"loss": self.head.classification(self.backbone(batch.view()), batch.labels)}
        out = self.loss_of(self.backbone.pair(batch.pair()), batch.labels)
        return {"loss": out.loss, "classification": out.classification, "consistency": out.consistency}

    def loss_of(self, features: Tensor, labels: Tensor) -> rk.HeadLoss:
        """Classification and consistency of packed views (2N, C, H, W) in one pass, Eq. 6."""
        head = self.head
        return rk.rebalanced_head_loss(
            features,
            head.weight,
            head.bias + head.shift,
            labels,
            target_table=head.target_table,
            map_weights=head.map_weights,
            consistency_weight=self.consistency_weight,
            views=self.views,
            detach_cam_weight=self.detach,
            backend=head.backend,
        )
