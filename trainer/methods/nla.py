"""Noise-aware label adaptation (NLA, AAAI 2025): samples weighted by where their two largest probabilities are.

Of each sample p_y and the largest other probability are a point; its weight is the density there of a normal
distribution, one for samples whose label is predicted and one for the others. Both views should predict alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import option
from . import MethodOptions, soft
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """weights by prediction and Jensen-Shannon consistency of the views (NLA)"""

    mix: float = option(
        0.5, "lambda: share of the classification, the rest is the consistency; the authors: 0.5", low=0, high=1
    )
    offset: float = option(0.0, "added to each weight: 0 as in their program, 1 as in their text", low=0)

    def build(self, backbone, task) -> TableMethod:
        return Nla(backbone, task, self)


class Nla(TableMethod):
    follows_progress = True

    def __init__(self, backbone, task, options: Options) -> None:
        super().__init__(backbone, task)
        self.paired, self.epochs, self.options = True, task.epochs, options

    def losses(self, batch) -> dict[str, Tensor]:
        z, z_twin = self.head(self.backbone.pair(batch.pair())).chunk(2)
        target = soft(batch.labels, z.shape[1])
        log_p, log_q = z.log_softmax(1), z_twin.log_softmax(1)
        weight = sample_weights(log_p.detach().exp(), target, batch.epoch / self.epochs) + self.options.offset
        classification = (weight * -(target * log_p).sum(1)).mean()
        consistency = jensen_shannon(log_p, log_q).mean()
        loss = self.options.mix * classification + (1 - self.options.mix) * consistency
        return {"loss": loss, "classification": classification, "consistency": consistency}


def sample_weights(p: Tensor, target: Tensor, progress: float | Tensor) -> Tensor:
    """(N,) densities at (p_y, largest other p) of probabilities (N, L); ``progress`` is epoch / epochs."""
    label = target.argmax(1, keepdim=True)
    of_label = p.gather(1, label)[:, 0]
    other = p.scatter(1, label, -1.0).amax(1)
    epsilon = 1 - torch.exp(torch.as_tensor(-15.0 * progress, device=p.device))
    right = density(of_label, other, (0.5, 0.5), 0.8, -0.5 * epsilon)
    wrong = density(of_label, other, (0.30, 0.15), 0.85, torch.full_like(epsilon, 0.80))
    return torch.where(of_label > other, right, wrong)


def density(x: Tensor, y: Tensor, mean: tuple[float, float], variance: float, covariance: Tensor) -> Tensor:
    """Of the normal distribution with these means, one variance for both and this covariance."""
    determinant = variance**2 - covariance**2
    a, b = x - mean[0], y - mean[1]
    distance = (variance * (a * a + b * b) - 2 * covariance * a * b) / determinant
    return torch.exp(-0.5 * distance) / (2 * math.pi * determinant.sqrt())


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N,) divergences of log probabilities (N, L)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(1) + (log_q.exp() * (log_q - log_m)).sum(1))
