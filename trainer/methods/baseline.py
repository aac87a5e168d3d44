"""Cross-entropy on one view."""

from __future__ import annotations

from dataclasses import dataclass

from . import MethodOptions
from .tables import TableMethod


@dataclass(frozen=True)
class Options(MethodOptions):
    """cross-entropy on one view: no options"""

    def build(self, backbone, task) -> TableMethod:
        return TableMethod(backbone, task)
