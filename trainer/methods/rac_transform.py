"""Re-balanced attention consistency with another transformation in place of the mirror image (Table 7).

The second view is the first one enlarged about its centre, or with other brightness. The maps must change as the image
does: those of the first view, enlarged by the same sampling grid, or as they are, must equal those of the second. What
the paper did in detail is not known: the factors here are our choice. The maps are those of the fused operator; their
difference and the sampling are PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

import rebalfer_kernels as rk

from ..config import option
from . import MethodOptions
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """re-balanced attention consistency between an image and itself enlarged, or brighter or darker (Table 7)"""

    transform: str = option("scale", "what is done to the second view", choices=("scale", "intensity"))
    strength: float = option(
        0.25, "largest enlargement, or largest change of brightness, as a part", low=0, high=1, above=True
    )
    alpha: float = option(0.1, "share of the label given away, Eq. 8; the paper: 0.1", low=0, high=1)
    consistency_weight: float = option(2.0, "lambda of Eq. 6; the paper: 2", low=0)
    beta: float = option(0.9999, "of the class weights, Eq. 4", low=0, high=1 - 1e-9)

    def build(self, backbone, task) -> RacTransform:
        return RacTransform(backbone, task, self)


class RacTransform(TableMethod):
    changes_images = True

    def __init__(self, backbone, task, options: Options) -> None:
        weights = rk.effective_number_weights(task.counts, options.beta)
        table = rk.target_table(weights, options.alpha)
        super().__init__(backbone, task, target_table=table, map_weights=weights.sqrt())
        self.paired, self.options = True, options

    def losses(self, batch) -> dict[str, Tensor]:
        view, options = batch.view(), self.options
        share = batch.uniform(0)[:, 0]
        if options.transform == "scale":
            other, change = enlarged(view, 1 + options.strength * share)
        else:
            other, change = self.brighter(view, 1 + options.strength * (2 * share - 1)), lambda maps: maps
        features = self.backbone.pair(torch.cat([view, other]))
        maps = rk.class_activation_maps(features, self.head.weight.detach(), backend=self.head.backend)
        first, second = maps.chunk(2)
        difference = change(first) - second
        consistency = (self.head.map_weights.view(-1, 1, 1) * difference).square().mean()
        classification = 2 * self.head.classification(features, torch.cat([batch.labels] * 2))  # a sum over views
        loss = classification + options.consistency_weight * consistency
        return {"loss": loss, "classification": classification, "consistency": consistency}

    def brighter(self, view: Tensor, factor: Tensor) -> Tensor:
        """Normalised images (N, C, h, w) whose pixels are those of ``view`` times ``factor`` (N,)."""
        # Black is -zero. A grey view has one channel, for which all colours are normalised alike.
        zero = (view.new_tensor(self.backbone.mean) / view.new_tensor(self.backbone.std))[: view.shape[1]].view(
            -1, 1, 1
        )
        return (view + zero) * factor.view(-1, 1, 1, 1).to(view.dtype) - zero


def enlarged(view: Tensor, factor: Tensor):
    """Images (N, C, h, w) larger by ``factor`` (N,) about their centre, and what does the same to maps (N, L, H, W)."""
    theta = torch.zeros(len(view), 2, 3, device=view.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / factor

    def change(of: Tensor) -> Tensor:
        grid = affine_grid(theta.to(of.dtype), list(of.shape), align_corners=False)
        return grid_sample(of, grid, padding_mode="border", align_corners=False)

    return change(view), change
