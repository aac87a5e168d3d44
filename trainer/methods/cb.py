"""The class-balanced loss of Cui et al. (2019): cross-entropy times the weight of its class, Eq. 4, divided by N."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import rebalfer_kernels as rk

from ..config import expect_number, option
from . import MethodOptions
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """class-balanced cross-entropy on one view"""

    beta: float = option(0.9999, "of the class weights, Eq. 4")

    def __post_init__(self) -> None:
        expect_number("method.beta", self.beta, 0, 1 - 1e-9)

    def build(self, backbone, task) -> TableMethod:
        weights = rk.effective_number_weights(task.counts, self.beta)
        return TableMethod(backbone, task, target_table=torch.diag(weights))
