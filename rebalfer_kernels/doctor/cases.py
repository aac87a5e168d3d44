"""What the self-check checks: operations, dtypes, layouts and sizes, with random inputs that no machine changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..backend import Request
from ..class_balance import effective_number_weights, target_table


class Size(NamedTuple):
    """N images with their N twins, C channels, maps of H x W, L classes."""

    N: int
    C: int
    H: int
    W: int
    L: int


#: The paper's batch; a small one for interpreted kernels; an odd one that no vector width divides.
PAPER, SMALL, ODD = Size(32, 512, 7, 7, 7), Size(2, 64, 7, 7, 7), Size(3, 37, 5, 3, 11)


class Inputs(NamedTuple):
    """The arguments of the head, in the order in which it takes them, and logits for the cross-entropy."""

    features: Tensor  #: (2N, C, H, W), not negative, as after a ReLU
    weight: Tensor  #: (L, C)
    bias: Tensor  #: (L,)
    targets: Tensor  #: (N,) int64
    target_table: Tensor  #: (L, L)
    map_weights: Tensor  #: (L,)
    logits: Tensor  #: (N, L)


def random_inputs(
    size: Size,
    dtype: torch.dtype,
    layout: str = "nchw",
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> Inputs:
    """Random inputs, by default the same numbers on every device; losses and gradients are of order one.

    Features and logits have ``dtype``, the others float32 as under autocast (float64 for float64). Features, weight,
    bias and logits require a gradient. ``layout`` is "nchw" or "channels_last". The numbers are drawn where the
    ``generator`` is; None is one on the CPU with the seed 0.

    >>> x = random_inputs(ODD, torch.bfloat16, "channels_last")
    >>> x.features.shape, x.features.stride(1), x.weight.dtype
    (torch.Size([6, 37, 5, 3]), 1, torch.float32)
    """
    g = generator or torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=g, device=g.device)
    features = normal(2 * size.N, size.C, size.H, size.W).relu_()
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    weight, bias, logits = normal(size.L, size.C) / size.C**0.5, normal(size.L), normal(size.N, size.L)
    targets = torch.randint(0, size.L, (size.N,), generator=g, device=g.device)
    B = effective_number_weights([round(1000 * 0.01 ** (i / size.L)) for i in range(size.L)])  # imbalance of about 100
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        features=features.to(device, dtype).requires_grad_(),
        weight=weight.to(device, wide).requires_grad_(),
        bias=bias.to(device, wide).requires_grad_(),
        targets=targets.to(device),
        target_table=target_table(B).to(device, wide),
        map_weights=B.sqrt().to(device, wide),
        logits=logits.to(device, dtype).requires_grad_(),
    )


class Operation(NamedTuple):
    kind: str  #: what dispatch calls it
    outputs: Callable[..., dict[str, Tensor]]  #: of (functional or reference, inputs, keywords); the first is timed
    leaves: tuple[str, ...]  #: the inputs by which it is differentiated

    def request(self, x: Inputs) -> Request:
        """What a backend is asked to serve."""
        if self.kind == "cross_entropy":
            return dispatch.request_of_rows(x.logits)
        return dispatch.request(self.kind, x.features, x.weight)


def _head(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    tables = {"target_table": x.target_table, "map_weights": x.map_weights}
    out = functions.rebalanced_head_loss(
        x.features, x.weight, x.bias, x.targets, **tables, return_maps=True, **keywords
    )
    return out._asdict()


def _consistency(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    return {"consistency": functions.attention_consistency(x.features, x.weight, x.map_weights, **keywords)}


def _maps(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    return {"maps": functions.class_activation_maps(x.features, x.weight, **keywords)}


def _cross_entropy(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    return {"loss": functions.rebalanced_cross_entropy(x.logits, x.targets, x.target_table, **keywords)}


_per_sample = functools.partial(_head, reduction="none", detach_cam_weight=False, transform="vflip")

OPERATIONS = {
    "head": Operation("head", _head, ("features", "weight", "bias")),
    "head, per sample, not detached": Operation("head", _per_sample, ("features", "weight", "bias")),
    "consistency": Operation("head", _consistency, ("features",)),
    "maps": Operation("cam", _maps, ("features", "weight")),
    "cross-entropy": Operation("cross_entropy", _cross_entropy, ("logits",)),
}


class Combination(NamedTuple):
    """One row of the report."""

    backend: str
    device: str
    op: str  #: a name of OPERATIONS
    dtype: torch.dtype
    layout: str  #: "nchw" or "channels_last", "rows" for the cross-entropy

    def __str__(self) -> str:
        return f"{self.op}, {str(self.dtype).removeprefix('torch.')}, {self.layout} on {self.device}"


def combinations(backend: str, device: str, dtypes: Iterable[torch.dtype]) -> list[Combination]:
    """Every operation in every layout, dtype by dtype."""
    return [
        Combination(backend, device, op, dtype, layout)
        for dtype in dtypes
        for op, operation in OPERATIONS.items()
        for layout in (("rows",) if operation.kind == "cross_entropy" else ("nchw", "channels_last"))
    ]
