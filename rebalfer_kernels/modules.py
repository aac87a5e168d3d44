"""The classification head as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from . import checks, class_balance, reference
from .class_balance import PerClass, effective_number_weights, target_table
from .functional import class_activation_maps, rebalanced_head_loss
from .reference import HeadLoss, compute_dtype

_MADE = torch.device("cpu"), torch.float32


def _is_traced() -> bool:
    """Whether a tensor made now may belong to a trace or a transform, which it must not outlive."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


class ClassTables:
    """The constants of a head, Eq. 4 and Eq. 8: what they are made of, and those beside each kind of weight in use."""

    def __init__(self, class_counts: tuple[int, ...], beta: float, alpha: float, spread: str, p: int) -> None:
        self.class_counts = class_counts
        self.beta = beta
        self.alpha = alpha
        self.spread = spread
        self.p = p
        with torch.inference_mode(False), unset_fake_temporarily():
            weights = effective_number_weights(class_counts, beta)
            self.copies = {_MADE: (target_table(weights, alpha, spread=spread), weights.pow(1 / p))}

    def beside(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The target table and the map weights on the weight's device, in the dtype of the losses."""
        place = weight.device, weight.dtype
        tables = self.copies.get(place)
        if tables is None:
            with torch.inference_mode(False):
                table, map_weights = self.copies[_MADE]
                beside = weight.device, compute_dtype(weight.dtype)
                tables = table.to(*beside), map_weights.to(*beside)
            if not _is_traced():
                self.copies[place] = tables
        return tables

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassTables:
        return self  # nothing changes them

    def __reduce__(self) -> tuple[Any, ...]:  # without the tensors, which torch.load(map_location=...) would move
        return ClassTables, (self.class_counts, self.beta, self.alpha, self.spread, self.p)


class RebalancedHead(nn.Module):
    """A drop-in for the last ``nn.Linear`` of a classifier that trains with RAC and RSL (Eq. 6).

    Its parameters ``weight`` (L, C) and ``bias`` (L,) are named, shaped and initialised as those of ``nn.Linear`` and
    are its whole state. ``target_table`` (L, L) and ``map_weights`` (L,) are constants made from the class counts, on
    the weight's device, float32 (float64 with a float64 weight), however the parameters are cast, moved or loaded.

    Args:
        in_features: C, channels of the last feature maps.
        num_classes: L >= 2.
        class_counts: L training images per class, for Eq. 4 and Eq. 8, as in :func:`effective_number_weights`.
        beta: of Eq. 4. alpha: of Eq. 8. consistency_weight: lambda of Eq. 6, a plain attribute that may be
            changed between steps. p, transform, views, detach_cam_weight, backend: as in
            :func:`rebalanced_head_loss`; the map weights are B^(1/p). spread: as in :func:`target_table`.

    Called with packed features (2N, C, H, W) and targets it returns a :class:`HeadLoss`; with features (M, C, H, W)
    only, logits (M, L), of the same dtype as in training. A symbolic trace of a model (``torch.fx``) calls the head and
    does not trace into it.

    Raises:
        TypeError, ValueError: an argument of another kind or outside its range.
        AttributeError: class_counts, beta, alpha, spread or p assigned later, which the tables are made of.

    >>> import torch
    >>> head = RebalancedHead(8, 3, class_counts=[900, 90, 10])
    >>> images, twins = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    >>> out = head(torch.cat([images, twins]), torch.tensor([0, 2]))
    >>> out.loss.backward()
    >>> head(images).shape, head.maps(images).shape
    (torch.Size([2, 3]), torch.Size([2, 3, 4, 4]))
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        class_counts: PerClass,
        *,
        beta: float = 0.9999,
        alpha: float = 0.1,
        consistency_weight: float | Tensor = 2.0,
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
        checks.consistency_options(p, transform, detach_cam_weight, None)
        checks.option("views", views, ("both", "original"))
        checks.consistency_weight(consistency_weight, None)
        self.in_features = checks.whole_number("in_features", in_features, 1)
        self.num_classes = checks.whole_number("num_classes", num_classes, 2)
        with unset_fake_temporarily():  # in a FakeTensorMode only the parameters are fake
            counts = tuple(map(int, class_balance.counts(class_counts).tolist()))
        if len(counts) != num_classes:
            raise ValueError(f"class_counts: got {len(counts)} counts, expected num_classes = {num_classes}")
        self._tables = ClassTables(counts, beta, alpha, spread, p)
        self.consistency_weight = (
            consistency_weight if isinstance(consistency_weight, Tensor) else float(consistency_weight)
        )
        self.transform = transform
        self.views = views
        self.detach_cam_weight = detach_cam_weight
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self._tables.beside(self.weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of ``nn.Linear``: weight and bias uniform in +-1/sqrt(C)."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, features: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> HeadLoss | Tensor:
        if targets is None:
            return head_logits(self, features)
        return head_loss(self, features, targets, reduction)

    def maps(self, features: Tensor) -> Tensor:
        """Class activation maps (M, L, H, W) of features (M, C, H, W), Eq. 2."""
        return class_activation_maps(features, self.weight, backend=self.backend)

    # What the tables are made of, to be read.
    class_counts = property(lambda self: self._tables.class_counts)
    beta = property(lambda self: self._tables.beta)
    alpha = property(lambda self: self._tables.alpha)
    spread = property(lambda self: self._tables.spread)
    p = property(lambda self: self._tables.p)

    @property
    def target_table(self) -> Tensor:
        """(L, L), Eq. 8, on the weight's device; row y is the soft label of class y."""
        return self._tables.beside(self.weight)[0]

    @property
    def map_weights(self) -> Tensor:
        """(L,) B^(1/p) for the class weights B of Eq. 4, on the weight's device."""
        return self._tables.beside(self.weight)[1]

    def _apply(self, fn: Any, recurse: bool = True) -> RebalancedHead:
        super()._apply(fn, recurse)
        self._tables.beside(self.weight)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tables.beside(self.weight)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}, "
            f"beta={self.beta}, alpha={self.alpha}, consistency_weight={self.consistency_weight}, p={self.p}, "
            f"transform={self.transform!r}, views={self.views!r}, detach_cam_weight={self.detach_cam_weight}"
        )


# A symbolic trace records a call of these and does not look inside, as with nn.Linear. The head itself is an argument,
# so that the traced model keeps it as a submodule, with its state and its tables.
torch.fx.wrap("class_activation_maps")


@torch.fx.wrap
def head_logits(head: RebalancedHead, features: Tensor) -> Tensor:
    """Logits (M, L) of features (M, C, H, W)."""
    weight = head.weight
    checks.features_and_weight(features, weight, pair=False)
    return reference.logits_of(features, weight, head.bias)


@torch.fx.wrap
def head_loss(head: RebalancedHead, features: Tensor, targets: Tensor, reduction: str) -> HeadLoss:
    """Eq. 6 of packed features (2N, C, H, W)."""
    weight = head.weight
    target_table, map_weights = head._tables.beside(weight)
    return rebalanced_head_loss(
        features,
        weight,
        head.bias,
        targets,
        target_table=target_table,
        map_weights=map_weights,
        consistency_weight=head.consistency_weight,
        p=head.p,
        transform=head.transform,
        views=head.views,
        detach_cam_weight=head.detach_cam_weight,
        reduction=reduction,
        backend=head.backend,
    )
