"""Fused class-activation-map consistency and re-balanced classification losses for PyTorch."""

from . import reference
from .augment import Augment
from .class_balance import effective_number_weights, inverse_frequency_weights, target_table
from .dispatch import backends
from .explanation import explain
from .functional import (
    attention_consistency,
    class_activation_maps,
    rebalanced_cross_entropy,
    rebalanced_head_loss,
)
from .modules import RebalancedHead
from .reference import HeadLoss
from .version import __version__
from .views import paired_views

__all__ = [
    "Augment",
    "HeadLoss",
    "RebalancedHead",
    "__version__",
    "attention_consistency",
    "backends",
    "class_activation_maps",
    "effective_number_weights",
    "explain",
    "inverse_frequency_weights",
    "paired_views",
    "rebalanced_cross_entropy",
    "rebalanced_head_loss",
    "reference",
    "target_table",
]
