"""The operators every fused backend implements, and their autograd.

Schemas and fakes live here; a backend only registers implementations: ``head_forward_cpu`` is served by
``csrc/cpu``, ``head_forward_triton`` by the Triton kernels, and so on, one operator per backend. An output that was not
asked for is None, as PyTorch's own operators have it (``convolution_backward``).

The ``autograd.Function`` stands outside the operators: 26 us per forward and backward against 37 us for the same by
``torch.library.custom_op`` with ``register_autograd``.

The head's is there in C++ too (``csrc/autograd``), for the calls that torch.compile does not trace.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .backend import BACKENDS
from .reference import compute_dtype

_EXACT_STRIDES = (torch.Tag.needs_exact_strides,)


class HeadOptions(NamedTuple):
    """What the head's forward needs besides tensors and lambda."""

    p: int  #: of Eq. 5, 1 or 2
    twin_map: int  #: of TWIN_MAPS, undoes the twin's transform; a list would cost a call more time
    both_views: bool  #: the twin is classified too (Eq. 1)
    mean: bool  #: losses are means over the batch, not per sample


class Wanted(NamedTuple):
    """The outputs of the head's forward that not every call needs."""

    maps: bool
    gradients: bool  #: map_grad and, with targets, logit_grad
    pooled: bool  #: only beside gradients, as the next
    cam_grad: bool


class Recorded(NamedTuple):
    """How a call reaches the C++ autograd, ``csrc/autograd``."""

    head: Any  #: calls the operators and records the backward
    options: int  #: HeadOptions, Wanted and the backend in one number, as every argument costs a call time
    described: Any  #: describes later calls for signatures.py


def recorded(backend: str, options: HeadOptions, wanted: Wanted) -> Recorded | None:
    """None where the C++ autograd is absent, or cannot be built: there HeadLossFunction serves."""
    module = native.autograd()
    if module is None:
        return None
    flags = (options.both_views, options.mean, *wanted)
    number = options.p + 4 * sum(flag << i for i, flag in enumerate(flags)) + 256 * options.twin_map
    return Recorded(module.head, number + 2**14 * module.backend_number(backend), module.described)


class HeadPlan(NamedTuple):
    """All that a call of the head's operators needs besides tensors and lambda."""

    backend: str
    layout: str  #: as in Request
    as_served: bool  #: the tensors already have the layouts and dtypes that the backend reads
    compiled: bool  #: by torch.compile
    recorded: Recorded | None  #: None where HeadLossFunction records the backward
    dtype: torch.dtype  #: of the features
    options: HeadOptions
    wanted: Wanted


# Kept by the namespace, which outlives this module, so that a reload finds the operators defined.
_namespace: Any = torch.ops.rebalfer_kernels
if not hasattr(_namespace, "library"):
    _namespace.library = torch.library.Library("rebalfer_kernels", "DEF")
_library = _namespace.library

# p ... mean are a HeadOptions, with_maps ... save_cam_grad a Wanted; targets is (N,) int64, or (N, L)
# in the compute dtype, or None where only the consistency is asked for.
# What the forward saves for the backward are gradients of each sample's own losses: map_grad (N, L, H, W) of its
# consistency with respect to the image's maps (with respect to the twin's it is the same, negated and moved back by T),
# logit_grad (2N, L) of its classification with respect to the logits of both views, cam_grad (N, L, C) of its
# consistency with respect to the weight of its maps; pooled (2N, C) is what the weight meets in the logits. So the
# backward knows neither targets nor Eq. 5: it only multiplies by upstream gradients and by the weight. All lie in one
# tensor in the compute dtype (Saved), as every tensor costs a small call time.
_SCHEMAS = {
    "head_forward": (
        "(Tensor features, Tensor weight, Tensor? bias, Tensor? targets, Tensor? target_table, Tensor map_weights, "
        "float consistency_weight, int p, int twin_map, bool both_views, bool mean, bool with_maps, "
        "bool save_gradients, bool save_pooled, bool save_cam_grad) -> (Tensor loss, Tensor classification, "
        "Tensor consistency, Tensor logits, Tensor maps, Tensor saved)"
    ),
    "head_backward": (
        "(Tensor? d_loss, Tensor? d_classification, Tensor? d_consistency, Tensor? d_logits, Tensor weight, "
        "Tensor saved, SymInt n, SymInt height, SymInt width, bool with_logit_grad, bool with_pooled, "
        "bool with_cam_grad, float consistency_weight, int twin_map, bool mean, ScalarType dtype, bool channels_last, "
        "bool need_features, bool need_weight, bool need_bias) -> (Tensor d_features, Tensor d_weight, Tensor d_bias)"
    ),
    "cam_forward": "(Tensor features, Tensor weight) -> Tensor",
    "cam_backward": (
        "(Tensor d_maps, Tensor features, Tensor weight, ScalarType dtype, bool channels_last, bool need_features, "
        "bool need_weight) -> (Tensor d_features, Tensor d_weight)"
    ),
    # size ... erase are a ViewPlan of reference.py
    "paired_views": (
        "(Tensor images, Tensor indices, Tensor samples, Tensor? epoch_tensor, SymInt epoch, int seed, SymInt[] size, "
        "float[] mean, float[] std, int[] chances, int[] reach, float[] crop, float brightness, float contrast, "
        "float noise, float[] erase, int twin_map, bool both, ScalarType dtype) -> Tensor"
    ),
    "cross_entropy_forward": "(Tensor logits, Tensor targets, Tensor target_table, bool mean) -> Tensor",
    "cross_entropy_backward": (
        "(Tensor d_loss, Tensor logits, Tensor targets, Tensor target_table, bool mean) -> Tensor"
    ),
}


def _empty(like: Tensor, shape: tuple[Any, ...], dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
    return torch.empty(shape, dtype=dtype, device=like.device) if wanted else None


def empty_features(
    like: Tensor, shape: tuple[Any, ...], dtype: torch.dtype, channels_last: bool, wanted: bool
) -> Tensor | None:
    if not wanted:
        return None
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


class Saved(NamedTuple):
    """What the head's forward saves for its backward, one behind the other; None what it does not save."""

    pooled: Any  #: (2N, C)
    cam_grad: Any  #: (N, L, C)
    logit_grad: Any  #: (2N, L)
    map_grad: Any  #: (N, L, H, W)

    @classmethod
    def shapes(
        cls, n: int, channels: int, height: int, width: int, classes: int, logit_grad: bool, pooled: bool,
        cam_grad: bool,
    ) -> Saved:  # fmt: skip
        return cls(
            (2 * n, channels) if pooled else None,
            (n, classes, channels) if cam_grad else None,
            (2 * n, classes) if logit_grad else None,
            (n, classes, height, width),
        )

    def size(self) -> int:
        """Elements of tensors of these shapes."""
        return sum(math.prod(shape) for shape in self if shape is not None)

    def of(self, saved: Tensor) -> Saved:
        """The tensors of these shapes."""
        pieces = saved.split([0 if shape is None else math.prod(shape) for shape in self])
        return Saved(*(None if shape is None else x.view(shape) for x, shape in zip(pieces, self, strict=True)))


def _head_forward_fake(
    features, weight, bias, targets, target_table, map_weights, consistency_weight, p, twin_map, both_views, mean,
    with_maps, save_gradients, save_pooled, save_cam_grad,
):  # fmt: skip
    m, c, h, w = features.shape
    n, classes, dtype = m // 2, weight.shape[0], compute_dtype(features.dtype)
    classified = targets is not None
    per_sample = () if mean else (n,)
    saved = Saved.shapes(n, c, h, w, classes, classified, save_pooled, save_cam_grad)
    return (
        _empty(features, per_sample, dtype, classified),
        _empty(features, per_sample, dtype, classified),
        _empty(features, per_sample, dtype),
        _empty(features, (m, classes), dtype, classified),
        _empty(features, (m, classes, h, w), dtype, with_maps),
        _empty(features, (saved.size(),), dtype, save_gradients),
    )


def _head_backward_fake(
    d_loss, d_classification, d_consistency, d_logits, weight, saved, n, height, width, with_logit_grad, with_pooled,
    with_cam_grad, consistency_weight, twin_map, mean, dtype, channels_last, need_features, need_weight, need_bias,
):  # fmt: skip
    classes, c = weight.shape
    return (
        empty_features(weight, (2 * n, c, height, width), dtype, channels_last, need_features),
        _empty(weight, (classes, c), weight.dtype, need_weight),
        _empty(weight, (classes,), weight.dtype, need_bias),
    )


def _cam_forward_fake(features, weight):
    m, _, h, w = features.shape
    return _empty(features, (m, weight.shape[0], h, w), compute_dtype(features.dtype))


def _cam_backward_fake(d_maps, features, weight, dtype, channels_last, need_features, need_weight):
    m, classes, h, w = d_maps.shape
    c = weight.shape[1]
    return (
        empty_features(weight, (m, c, h, w), dtype, channels_last, need_features),
        _empty(weight, (classes, c), weight.dtype, need_weight),
    )


def _cross_entropy_forward_fake(logits, targets, target_table, mean):
    return _empty(logits, () if mean else (logits.shape[0],), compute_dtype(logits.dtype))


def _cross_entropy_backward_fake(d_loss, logits, targets, target_table, mean):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _paired_views_fake(
    images,
    indices,
    samples,
    epoch_tensor,
    epoch,
    seed,
    size,
    mean,
    std,
    chances,
    reach,
    crop,
    brightness,
    contrast,
    noise,
    erase,
    twin_map,
    both,
    dtype,
):
    shape = (indices.shape[0] * (2 if both else 1), images.shape[3], *size)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


_FAKES: dict[str, Any] = {
    "paired_views": _paired_views_fake,
    "head_forward": _head_forward_fake,
    "head_backward": _head_backward_fake,
    "cam_forward": _cam_forward_fake,
    "cam_backward": _cam_backward_fake,
    "cross_entropy_forward": _cross_entropy_forward_fake,
    "cross_entropy_backward": _cross_entropy_backward_fake,
}


def _define(name: str, schema: str, fake: Any = None) -> Any:
    """The operator ``torch.ops.rebalfer_kernels.<name>``."""
    if not hasattr(_namespace, name):
        _library.define(name + schema, tags=_EXACT_STRIDES if fake else ())
        if fake:
            torch.library.register_fake(f"rebalfer_kernels::{name}", fake, lib=_library)
    return getattr(_namespace, name).default


#: OPERATORS[backend][name] is the operator ``torch.ops.rebalfer_kernels.<name>_<backend>``.
OPERATORS: dict[str, dict[str, Any]] = {
    backend.name: {name: _define(f"{name}_{backend.name}", schema, _FAKES[name]) for name, schema in _SCHEMAS.items()}
    for backend in BACKENDS.values()
    if backend.fused
}

# The instruction set that the CPU kernels run on: the widest of the CPU's, or the one REBALFER_CPU_ISA names.
_define("cpu_isa", "() -> str")
# Why the CUDA kernels cannot run on the current device; empty if they can.
_define("cuda_problem", "() -> str")


def register(backend: str, name: str, implementation: Any, dispatch_key: str) -> None:
    """Give operator ``name`` of ``backend`` an implementation written in Python; a later one replaces it."""
    _library.impl(f"{name}_{backend}", implementation, dispatch_key, allow_override=True)


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on the first ``count`` tensors; refuses to be differentiated, whichever input the path leads to."""

    @staticmethod
    def forward(ctx, name: str, count: int, *tensors: Tensor | None):
        ctx.operation = name
        return tuple(t if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.operation}: second-order gradients are not implemented by the fused backends; "
            'use backend="reference" where a gradient must itself be differentiated'
        )


# The features are not saved, so an output stands in for them: a second differentiation reaches them only through the
# node that produced it.
def _first_order(name: str, grads: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]):
    """The gradients, made to refuse a second differentiation if this backward is itself recorded (create_graph)."""
    return _FirstOrderOnly.apply(name, len(grads), *grads, *sources) if torch.is_grad_enabled() else grads


class HeadLossFunction(torch.autograd.Function):
    """``head_forward`` and ``head_backward`` of one backend, returning what ``head_forward`` returns first.

    Saves the weight and a ``Saved``: the gradients of each sample's losses with respect to its maps and logits, the
    pooled features and, when the CAM's weight is not detached, the gradient K of each sample's consistency with respect
    to it; never the features.
    """

    @staticmethod
    def forward(ctx, features, weight, bias, targets, target_table, map_weights, lam: float, plan: HeadPlan):
        outputs = OPERATORS[plan.backend]["head_forward"](
            features, weight, bias, targets, target_table, map_weights, lam, *plan.options, *plan.wanted
        )
        *_, maps, saved = outputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, saved)
        ctx.call = lam, plan, features.shape, targets is not None
        if maps is not None:
            ctx.mark_non_differentiable(maps)
        # What is saved is an output: through it a second differentiation finds this node. No caller sees it, so
        # whatever is done in place to an output that one does see, the gradients stay right.
        return outputs

    @staticmethod
    def backward(ctx, d_loss, d_classification, d_consistency, d_logits, *_):
        weight, saved = ctx.saved_tensors
        lam, plan, (m, _, height, width), classified = ctx.call
        upstream = (d_loss, d_classification, d_consistency, d_logits)
        need = ctx.needs_input_grad[:3]
        grads = OPERATORS[plan.backend]["head_backward"](
            *upstream, weight, saved, m // 2, height, width, classified, plan.wanted.pooled, plan.wanted.cam_grad, lam,
            plan.options.twin_map, plan.options.mean, plan.dtype, plan.layout == "channels_last", *need,
        )  # fmt: skip
        d_features, d_weight, d_bias = _first_order("rebalanced_head_loss", grads, (saved, *upstream))
        return d_features, d_weight, d_bias, *(None,) * 5


class ClassActivationMapsFunction(torch.autograd.Function):
    """``cam_forward`` and ``cam_backward`` of one backend; saves the features only when the weight needs a gradient."""

    @staticmethod
    def forward(ctx, features, weight, backend, channels_last):
        ctx.backend, ctx.channels_last, ctx.dtype = backend, channels_last, features.dtype
        anchor = weight.new_empty(0)
        # Only the weight's gradient reads the features again.
        ctx.save_for_backward(features if weight.requires_grad else None, weight, anchor)
        return OPERATORS[backend]["cam_forward"](features, weight), anchor

    @staticmethod
    def backward(ctx, d_maps, _):
        features, weight, anchor = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        grads = OPERATORS[ctx.backend]["cam_backward"](
            d_maps, weight if features is None else features, weight, ctx.dtype, ctx.channels_last, *need
        )
        d_features, d_weight = _first_order("class_activation_maps", grads, (anchor, weight, d_maps))
        return d_features, d_weight, None, None


class CrossEntropyFunction(torch.autograd.Function):
    """``cross_entropy_forward`` and ``cross_entropy_backward`` of one backend; saves its inputs."""

    @staticmethod
    def forward(ctx, logits, targets, target_table, backend, mean):
        ctx.backend, ctx.mean = backend, mean
        ctx.save_for_backward(logits, targets, target_table)
        return OPERATORS[backend]["cross_entropy_forward"](logits, targets, target_table, mean)

    @staticmethod
    def backward(ctx, d_loss):
        logits, targets, target_table = ctx.saved_tensors
        d_logits = OPERATORS[ctx.backend]["cross_entropy_backward"](d_loss, logits, targets, target_table, ctx.mean)
        (d_logits,) = _first_order("rebalanced_cross_entropy", (d_logits,), (logits, d_loss))
        return d_logits, None, None, None, None
