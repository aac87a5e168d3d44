"""The classification head as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import checks, reference
from .class_balance import effective_number_weights, target_table
from .functional import class_activation_maps, rebalanced_head_loss
from .reference import HeadLoss


class RebalancedHead(nn.Module):
    """A drop-in for the last ``nn.Linear`` of a classifier that trains with RAC and RSL (Eq. 6).

    The parameters ``weight`` (L, C) and ``bias`` (L,) are named, shaped and initialised as ``nn.Linear``'s, so its
    state dict loads strictly; the tables derived from ``class_counts`` are buffers that are not saved.

    Args:
        in_features: C, channels of the last feature maps.
        num_classes: L >= 2.
        class_counts: L training images per class, for Eq. 4 and Eq. 8.
        beta: of Eq. 4. alpha: of Eq. 8. consistency_weight: lambda of Eq. 6, a plain attribute that may be
            changed between steps (beta, alpha, p and spread may not: the tables are made of them). p, transform,
            views, detach_cam_weight, backend: as in :func:`rebalanced_head_loss`; the map weights are B^(1/p).
            spread: as in :func:`target_table`.

    Called with packed features (2N, C, H, W) and targets it returns a :class:`HeadLoss`; with features (M, C, H, W)
    alone, logits (M, L), of the same dtype as in training. After ``to_empty``, ``reset_parameters`` fills the tables
    too.

    >>> import torch
    >>> head = RebalancedHead(8, 3, class_counts=[900, 90, 10])
    >>> images, twins = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    >>> out = head(torch.cat([images, twins]), torch.tensor([0, 2]))
    >>> out.loss.backward()
    >>> head(images).shape, head.maps(images).shape
    (torch.Size([2, 3]), torch.Size([2, 3, 4, 4]))
    """

    target_table: Tensor
    map_weights: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        class_counts: Sequence[int] | Tensor,
        *,
        beta: float = 0.9999,
        alpha: float = 0.1,
        consistency_weight: float = 2.0,
        p: int = 2,
        transform: str = "hflip",
        views: str = "both",
        detach_cam_weight: bool = True,
        spread: str = "all",
        bias: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(in_features, int) or in_features < 1:
            raise ValueError(f"in_features: got {in_features!r}, expected a whole number >= 1")
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes: got {num_classes!r}, expected a whole number >= 2")
        class_weights = effective_number_weights(class_counts, beta)
        if len(class_weights) != num_classes:
            raise ValueError(f"class_counts: got {len(class_weights)} counts, expected num_classes = {num_classes}")
        checks.consistency_options(p, transform, detach_cam_weight, None)
        checks.option("views", views, ("both", "original"))
        checks.consistency_weight(consistency_weight, None)
        self.in_features = in_features
        self.num_classes = num_classes
        self.beta = beta
        self.alpha = alpha
        self.consistency_weight = consistency_weight
        self.p = p
        self.transform = transform
        self.views = views
        self.detach_cam_weight = detach_cam_weight
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self._tables = target_table(class_weights, alpha, spread=spread), class_weights.pow(1 / p)
        for name, table in zip(("target_table", "map_weights"), self._tables, strict=True):
            self.register_buffer(name, table.to(self.weight.device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.Linear``'s initialisation: uniform in +-1/sqrt(C); the tables from ``class_counts``."""
        self.target_table.copy_(self._tables[0])
        self.map_weights.copy_(self._tables[1])
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, features: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> HeadLoss | Tensor:
        if targets is None:
            checks.features_and_weight(features, self.weight, pair=False)
            return reference.logits_of(features, self.weight, self.bias)
        return rebalanced_head_loss(
            features,
            self.weight,
            self.bias,
            targets,
            target_table=self.target_table,
            map_weights=self.map_weights,
            consistency_weight=self.consistency_weight,
            p=self.p,
            transform=self.transform,
            views=self.views,
            detach_cam_weight=self.detach_cam_weight,
            reduction=reduction,
            backend=self.backend,
        )

    def maps(self, features: Tensor) -> Tensor:
        """Class activation maps (M, L, H, W) of features (M, C, H, W), Eq. 2."""
        return class_activation_maps(features, self.weight, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}, "
            f"beta={self.beta}, alpha={self.alpha}, consistency_weight={self.consistency_weight}, p={self.p}, "
            f"transform={self.transform!r}, views={self.views!r}, detach_cam_weight={self.detach_cam_weight}"
        )
