"""Erasing Attention Consistency (Zhang et al., 2022): the image is classified, and all maps weigh the same."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import option
from . import MethodOptions
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """attention consistency without re-balancing"""

    consistency_weight: float = option(
        5.0, "of the mean squared difference of the maps; the authors: 5", low=0, above=True
    )

    def build(self, backbone, task) -> TableMethod:
        return TableMethod(backbone, task, consistency_weight=self.consistency_weight, views="original")
