"""Bilateral-Branch Network (Zhou et al., 2020): one branch sees images as they are, one sees rare classes more often.

The backbone is shared but for its last block, of which each branch has its own. A share a, which falls from 1 to 0 over
the run, weighs the features and the losses of the branches.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..config import UserError
from . import Method, MethodOptions, Task, soft

#: Where timm's models keep their blocks.
PLACES = ("layer4", "stages", "layers", "blocks")


@dataclass(frozen=True)
class Options(MethodOptions):
    """two branches, one of them for rare classes (BBN): no options"""

    def build(self, backbone, task) -> Bbn:
        return Bbn(backbone, task)


class Bbn(Method):
    paired, follows_progress = False, True

    def __init__(self, backbone, task: Task) -> None:
        super().__init__(backbone, nn.Linear(2 * backbone.channels, len(task.counts)))
        self.place, block = last_block(backbone.model)
        self.rebalancing, self.epochs = copy.deepcopy(block), task.epochs
        counts = torch.tensor(task.counts, dtype=torch.float64)
        self.register_buffer("upper", (counts.max() / counts).cumsum(0).float(), persistent=False)
        self.by_class: tuple[Tensor, Tensor] | None = None

    upper: Tensor  #: (L,) cumulated weights n_max / n_l of the reversed sampler

    def branches(self, conventional: Tensor, rebalanced: Tensor) -> tuple[Tensor, Tensor]:
        """Mean features (M, C) of images in each branch."""
        of_block = {**dict(self.rebalancing.named_parameters()), **dict(self.rebalancing.named_buffers())}
        swapped = {f"model.{self.place}.{name}": tensor for name, tensor in of_block.items()}
        first = self.backbone(conventional)
        second = functional_call(self.backbone, swapped, (rebalanced,))
        return first.float().mean((2, 3)), second.float().mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.cat(self.branches(images, images), 1))

    def maps(self, images: Tensor) -> Tensor:
        raise UserError("method: got bbn, which has no class activation maps of one backbone")

    def losses(self, batch) -> dict[str, Tensor]:
        reversed_ = batch.at(self.reversed_rows(batch))
        share = 1 - (batch.epoch / self.epochs) ** 2
        first, second = self.branches(batch.view(), reversed_.view())
        log_p = self.head(2 * torch.cat([share * first, (1 - share) * second], 1)).log_softmax(1)
        targets = [soft(b.labels, log_p.shape[1]) for b in (batch, reversed_)]
        conventional, rebalanced = (-(target * log_p).sum(1).mean() for target in targets)
        loss = share * conventional + (1 - share) * rebalanced
        return {"loss": loss, "conventional": conventional, "rebalanced": rebalanced}

    def reversed_rows(self, batch) -> Tensor:
        """(N,) training images: a class with a probability in proportion to n_max / n_l, then one of its images."""
        if self.by_class is None:
            labels = soft(batch.source.labels, len(self.upper)).argmax(1)
            self.by_class = labels.argsort(stable=True), labels.bincount(minlength=len(self.upper))
        order, counts = self.by_class
        u = batch.uniform(0)
        classes = torch.searchsorted(self.upper, u[:, 0] * self.upper[-1], right=True).clamp(max=len(self.upper) - 1)
        within = (u[:, 1] * counts[classes]).long()
        return order[counts.cumsum(0)[classes] - counts[classes] + within]


def last_block(model: Any) -> tuple[str, nn.Module]:
    """Its name and the last block of a timm model.

    Raises:
        UserError: it keeps its blocks nowhere that is known.
    """
    place = next((name for name in PLACES if hasattr(model, name)), None)
    if place is None:
        raise UserError(f"method: got bbn, whose last block is doubled, but {type(model).__name__} has none by name")
    block = getattr(model, place)
    while True:
        if isinstance(block, (nn.Sequential, nn.ModuleList)):
            place, block = f"{place}.{len(block) - 1}", block[-1]
        elif isinstance(getattr(block, "blocks", None), (nn.Sequential, nn.ModuleList)):
            place, block = f"{place}.blocks", block.blocks
        else:
            return place, block
