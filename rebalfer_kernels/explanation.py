"""What a call would cost and who would serve it, without computing anything."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch
from .backend import BACKENDS
from .functional import HeadInputs
from .reference import compute_dtype


class Explanation(NamedTuple):
    """Which backend serves a call and what it costs; prints as a short report. Bytes are counted, not measured."""

    backend: str
    passed_over: dict[str, str]  #: backend -> why it does not serve
    copies: tuple[str, ...]  #: arguments that are copied first
    bytes_moved: int | None  #: forward and backward, copies and saved tensors included; None for the reference
    bytes_floor: int  #: features read once, their gradient written once
    because: str = ""  #: why it is preferred, where that is a matter of choice

    def __str__(self) -> str:
        moved = "not counted (PyTorch's own operators)" if self.bytes_moved is None else f"{self.bytes_moved:,}"
        lines = [f"backend      {self.backend}"]
        lines += [f"because      {self.because}"] if self.because else []
        lines += [f"passed over  {name}: {reason}" for name, reason in self.passed_over.items()]
        lines += [f"copies       {copy}" for copy in self.copies] or ["copies       none"]
        lines += [f"bytes moved  {moved}", f"bytes floor  {self.bytes_floor:,}"]
        return "\n".join(lines)


def explain(
    features: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    target_table: Tensor | None = None,
    map_weights: Tensor | None = None,
    consistency_weight: float | Tensor = 2.0,
    p: int = 2,
    transform: str = "hflip",
    views: str = "both",
    detach_cam_weight: bool = True,
    reduction: str = "mean",
    return_maps: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Explain the call of :func:`rebalanced_head_loss` (of :func:`attention_consistency` without targets).

    Takes the same arguments and computes nothing. Bytes are those of one forward and backward pass with a gradient
    to features and weight.

    Raises:
        As the explained function; RuntimeError where a forced backend cannot serve.

    >>> print(explain(torch.zeros(64, 512, 7, 7), torch.zeros(7, 512), backend="reference"))
    backend      reference
    copies       none
    bytes moved  not counted (PyTorch's own operators)
    bytes floor  12,845,056
    """
    inputs = HeadInputs(features, weight, bias, targets, target_table, map_weights)
    checks.head(*inputs, p, transform, views, detach_cam_weight, reduction, return_maps, whole=False)
    checks.consistency_weight(consistency_weight, features)
    request = dispatch.request("head", features, weight)
    name = dispatch.choose(request, backend)
    forced, _ = dispatch.forced_by(backend)
    verdicts = {} if forced is not None else dispatch.verdicts(request)
    passed_over = {b: v.reason for b, v in verdicts.items() if b != name}
    because = verdicts[name].reason if name in verdicts and verdicts[name].reason != "available" else ""

    pair_bytes = features.numel() * features.element_size()
    reads = BACKENDS[name].feature_reads(maps=return_maps, cam_weight_gradient=not detach_cam_weight)
    if reads is None:
        return Explanation(name, passed_over, (), None, 2 * pair_bytes, because)
    copies, copied_bytes = _copies(inputs, request.layout)
    moved = (reads + 1) * pair_bytes + copied_bytes + _small_bytes(inputs, not detach_cam_weight, return_maps)
    return Explanation(name, passed_over, copies, moved, 2 * pair_bytes, because)


def _copies(inputs: HeadInputs, layout: str) -> tuple[tuple[str, ...], int]:
    """What the call would copy, and the bytes that this reads and writes; tried on tensors without memory."""
    given = HeadInputs(*map(_without_memory, inputs))
    copies, copied_bytes = [], 0
    for name, before, after in zip(HeadInputs._fields, given, given.as_served(layout), strict=True):
        if before is not None and after is not None and after is not before:
            copies.append(f"{name}: {before.dtype} of strides {before.stride()} to contiguous {after.dtype}")
            both_ways = 2 if name == "features" else 1  # their gradient is copied back
            copied_bytes += both_ways * (before.nbytes + after.nbytes)
    return tuple(copies), copied_bytes


def _without_memory(t: Any) -> Any:
    return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _small_bytes(inputs: HeadInputs, cam_weight_gradient: bool, return_maps: bool) -> int:
    """Bytes of what is saved, written and read once, and of the maps."""
    (m, channels, height, width), classes = inputs.features.shape, inputs.weight.shape[0]
    cams = m * classes * height * width
    saved = cams // 2 + m * (channels + classes) * (inputs.targets is not None)
    saved += m // 2 * classes * channels * cam_weight_gradient
    return (2 * saved + cams * return_maps) * compute_dtype(inputs.features.dtype).itemsize
