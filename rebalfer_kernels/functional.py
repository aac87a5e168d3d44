"""The public functions: check the arguments, choose a backend, call its operators."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, ops, reference, signatures
from .ops import HeadOptions, HeadPlan, Wanted
from .reference import HeadLoss, compute_dtype
from .transforms import TWIN_MAPS


def class_activation_maps(features: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Class activation maps of every class, Eq. 2: A[m, l, h, w] = sum_c weight[l, c] features[m, c, h, w].

    Args:
        features: (M, C, H, W), NCHW or channels_last; float32, bfloat16, float16 or float64.
        weight: (L, C), the classifier's, float32 or the features' dtype.
        backend: None chooses; a name forces it.

    Returns:
        (M, L, H, W) float32 (float64 for float64), NCHW; differentiable in both arguments.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, shape or device. RuntimeError: the forced backend cannot serve.

    >>> features, weight = torch.ones(1, 4, 2, 3), torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, -1]])
    >>> class_activation_maps(features, weight)[0, :, 0]
    tensor([[ 4.,  4.,  4.],
            [-1., -1., -1.]])
    """
    name, layout = signatures.once(_cam_plan, (features, weight), (backend,))
    if name == "reference":
        return reference.class_activation_maps(features, weight)
    features = features.contiguous() if layout == "strided" else features
    return ops.ClassActivationMapsFunction.apply(features, weight.contiguous(), name, layout == "channels_last")[0]


def _cam_plan(features: Tensor, weight: Tensor, backend: str | None) -> tuple[str, str]:
    """The backend and the layout of the features."""
    checks.features_and_weight(features, weight, pair=False)
    request = dispatch.request("cam", features, weight)
    return dispatch.choose(request, backend), request.layout


def attention_consistency(
    features: Tensor,
    weight: Tensor,
    map_weights: Tensor,
    *,
    p: int = 2,
    transform: str = "hflip",
    detach_cam_weight: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Re-balanced attention consistency of image and twin, Eq. 5: 1 / (N L H W) sum |v_l S|^p, S = A - T(A~).

    Args:
        features: (2N, C, H, W), the N images' features, then those of their N twins, as they leave one backbone
            call on ``cat([x, twin(x)])``; NCHW or channels_last; float32, bfloat16, float16 or float64.
        weight: (L, C), the classifier's, float32 or the features' dtype.
        map_weights: (L,) v, any float dtype; B^(1/p) for the class weights B of Eq. 4.
        p: 1 or 2. transform: what was done to the twin: "hflip", "vflip", "rot90", "rot180", "rot270",
            "transpose" or "identity". detach_cam_weight: no gradient to ``weight`` (as both released programs).
        reduction: "mean", or "none" for the N samples. backend: None chooses; a name forces it.

    Returns:
        () or (N,) float32 (float64 for float64). N = 0 gives NaN under "mean".

    Raises:
        TypeError, ValueError: a wrong option, dtype, rank, shape or device; an odd batch; a map that is not square
        with a transform that swaps its axes. RuntimeError: the forced backend cannot serve.

    >>> features = torch.arange(4.0).reshape(2, 1, 1, 2)  # maps [0, 1] and, of the twin, [2, 3]
    >>> weight = torch.tensor([[1.0], [2.0]])
    >>> attention_consistency(features, weight, torch.ones(2))  # S = W [0 - 3, 1 - 2]
    tensor(12.5000)
    """
    plan = signatures.once(
        _consistency_plan,
        (features, weight, map_weights),
        (p, transform, detach_cam_weight, reduction, backend, torch.is_grad_enabled()),
    )
    if plan.backend == "reference":
        return reference.attention_consistency(
            features, weight, map_weights, p=p, transform=transform, detach_cam_weight=detach_cam_weight,
            reduction=reduction,
        )  # fmt: skip
    cam_weight = weight.detach() if detach_cam_weight else weight
    return _head((features, cam_weight, None, None, None, map_weights), 0.0, plan).consistency


def _consistency_plan(
    features: Tensor, weight: Tensor, map_weights: Tensor, p: int, transform: str, detach_cam_weight: bool,
    reduction: str, backend: str | None, recording: bool,
) -> HeadPlan:  # fmt: skip
    checks.features_and_weight(features, weight, pair=True)
    checks.map_weight_vector(map_weights, weight)
    checks.consistency_options(p, transform, detach_cam_weight, features)
    checks.reduction(reduction)
    inputs = HeadInputs(features, weight, None, None, None, map_weights)
    options = HeadOptions(p, TWIN_MAPS[transform], True, reduction == "mean")
    weight_gradient = recording and weight.requires_grad and not detach_cam_weight
    gradients = weight_gradient or recording and features.requires_grad
    return _plan(inputs, options, Wanted(False, gradients, False, weight_gradient), backend)


def rebalanced_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    target_table: Tensor,
    *,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy against soft labels from a table, Eq. 1 with Eq. 8: -sum_l t_l log softmax(z)_l.

    Args:
        logits: (M, L), L >= 2; float32, bfloat16, float16 or float64.
        targets: (M,) integer classes, t = target_table[y], or (M, L) label distributions, t = targets @ target_table.
        target_table: (L, L) any float dtype; rows need not sum to 1 (``torch.diag(w)`` is the class-balanced loss).
        reduction: "mean" over the M rows (also where rows do not sum to 1), or "none".
        backend: None chooses; a name forces it.

    Returns:
        () or (M,) float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong option, dtype, rank, shape or device. IndexError: a class outside [0, L), on
        a CPU; on a GPU that sample's loss and gradient are NaN.

    >>> rebalanced_cross_entropy(torch.zeros(1, 4), torch.tensor([2]), torch.eye(4))  # log 4
    tensor(1.3863)
    """
    name = signatures.once(_rows_plan, (logits, targets, target_table), (reduction, backend))
    if name == "reference":
        return reference.rebalanced_cross_entropy(logits, targets, target_table, reduction=reduction)
    dtype = compute_dtype(logits.dtype)
    return ops.CrossEntropyFunction.apply(
        logits.contiguous(), _targets(targets, dtype), target_table.to(dtype).contiguous(), name, reduction == "mean"
    )


def _rows_plan(logits: Tensor, targets: Tensor, target_table: Tensor, reduction: str, backend: str | None) -> str:
    """The backend."""
    checks.tensor("logits", logits, "(M, L)")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected (M, L) with L >= 2")
    if logits.dtype not in checks.FEATURE_DTYPES:
        raise TypeError(f"logits: got dtype {logits.dtype}, expected float32, bfloat16, float16 or float64")
    checks.table_matrix(target_table, logits.shape[1], logits)
    checks.targets_of(targets, logits.shape[0], logits.shape[1], logits)
    checks.reduction(reduction)
    return dispatch.choose(dispatch.request_of_rows(logits), backend)


def rebalanced_head_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    target_table: Tensor,
    map_weights: Tensor,
    consistency_weight: float | Tensor = 2.0,
    p: int = 2,
    transform: str = "hflip",
    views: str = "both",
    detach_cam_weight: bool = True,
    reduction: str = "mean",
    return_maps: bool = False,
    backend: str | None = None,
) -> HeadLoss:
    """The whole head in one pass over the features, Eq. 6: classification + consistency_weight * consistency.

    Args:
        features: (2N, C, H, W), the N images' features, then those of their N twins, as they leave one backbone
            call on ``cat([x, twin(x)])``; NCHW or channels_last; float32, bfloat16, float16 or float64.
        weight, bias: (L, C) and (L,) or None, of the classifier; float32 or the features' dtype.
        targets: (N,) integer classes, or (N, L) label distributions t, used as t @ target_table.
        target_table: (L, L), Eq. 8, see :func:`target_table`; any float dtype, rows need not sum to 1.
        map_weights: (L,) v, B^(1/p) for the class weights B of Eq. 4; any float dtype.
        consistency_weight: lambda, a number or a tensor of one element (which is differentiable).
        p: 1 or 2, of Eq. 5. transform: what was done to the twin: "hflip", "vflip", "rot90", "rot180", "rot270",
            "transpose" or "identity". views: "both" classifies image and twin (Eq. 1, a sum), "original" the image.
        detach_cam_weight: the consistency gives no gradient to ``weight``.
        reduction: "mean", or "none" for per-sample losses. return_maps: also the maps of both views.
        backend: None chooses; a name forces it.

    Returns:
        HeadLoss(loss, classification, consistency, logits, maps), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong option, dtype, rank, shape or device; an odd batch; a map that is not square
        with a transform that swaps its axes; a gradient asked for targets, table or map weights.
        IndexError: a class outside [0, L), on a CPU; on a GPU that sample's classification is NaN.
        RuntimeError: the forced backend cannot serve.

    >>> features = torch.zeros(2, 3, 1, 1)
    >>> out = rebalanced_head_loss(features, torch.ones(2, 3), None, torch.tensor([1]),
    ...                            target_table=torch.eye(2), map_weights=torch.ones(2))
    >>> out.loss  # both views: 2 log 2
    tensor(1.3863)
    """
    inputs = (features, weight, bias, targets, target_table, map_weights)
    plan = signatures.once(
        _head_plan,
        inputs,
        (p, transform, views, detach_cam_weight, reduction, return_maps, backend, torch.is_grad_enabled()),
    )
    if type(consistency_weight) is not float:
        checks.consistency_weight(consistency_weight, features)
    if plan.backend == "reference":
        return reference.rebalanced_head_loss(
            features, weight, bias, targets, target_table=target_table, map_weights=map_weights,
            consistency_weight=consistency_weight, p=p, transform=transform, views=views,
            detach_cam_weight=detach_cam_weight, reduction=reduction, return_maps=return_maps,
        )  # fmt: skip
    # Outside the operator a lambda is differentiable if it is a tensor and, compiled, may change from call to call.
    scheduled = plan.compiled or isinstance(consistency_weight, Tensor)
    out = _head(inputs, 0.0 if scheduled else float(consistency_weight), plan)
    if scheduled:
        out = out._replace(loss=reference.combine(out.classification, out.consistency, consistency_weight))
    return out


def _head_plan(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, target_table: Tensor, map_weights: Tensor,
    p: int, transform: str, views: str, detach_cam_weight: bool, reduction: str, return_maps: bool,
    backend: str | None, recording: bool,
) -> HeadPlan:  # fmt: skip
    inputs = HeadInputs(features, weight, bias, targets, target_table, map_weights)
    checks.head(*inputs, p, transform, views, detach_cam_weight, reduction, return_maps)
    options = HeadOptions(p, TWIN_MAPS[transform], views == "both", reduction == "mean")
    weight_gradient = recording and weight.requires_grad
    bias_gradient = recording and bias is not None and bias.requires_grad
    gradients = weight_gradient or bias_gradient or recording and features.requires_grad
    wanted = Wanted(return_maps, gradients, weight_gradient, cam_grad=weight_gradient and not detach_cam_weight)
    return _plan(inputs, options, wanted, backend)


class HeadInputs(NamedTuple):
    """The tensors of the head's operator; None where the call has none."""

    features: Tensor  # (2N, C, H, W)
    weight: Tensor  # (L, C)
    bias: Tensor | None  # (L,)
    targets: Tensor | None  # (N,) or (N, L)
    target_table: Tensor | None  # (L, L)
    map_weights: Tensor | None  # (L,)

    def as_served(self, layout: str) -> HeadInputs:
        """In the layouts and dtypes of the fused backends; what has them already is not copied."""
        features, weight, bias, targets, target_table, map_weights = self
        dtype = compute_dtype(features.dtype)
        return HeadInputs(
            features.contiguous() if layout == "strided" else features,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            None if targets is None else _targets(targets, dtype),
            None if target_table is None else target_table.to(dtype).contiguous(),
            None if map_weights is None else map_weights.to(dtype).contiguous(),
        )


def _plan(inputs: HeadInputs, options: HeadOptions, wanted: Wanted, backend: str | None) -> HeadPlan:
    features = inputs.features
    request = dispatch.request("head", features, inputs.weight)
    name = dispatch.choose(request, backend)
    compiled = torch.compiler.is_compiling()
    known = name != "reference" and not compiled
    as_served = known and all(map(operator.is_, inputs, inputs.as_served(request.layout)))
    in_cpp = known and wanted.gradients and signatures.exact(inputs)  # a subclass may have a __torch_function__
    recorded = ops.recorded(name, options, wanted) if in_cpp else None
    if recorded is not None:
        signatures.describe_by(recorded.described)
    return HeadPlan(name, request.layout, as_served, compiled, recorded, features.dtype, options, wanted)


def _head(inputs: tuple[Any, ...], lam: float, plan: HeadPlan) -> HeadLoss:
    """The inputs are a HeadInputs."""
    if not plan.as_served:
        inputs = HeadInputs(*inputs).as_served(plan.layout)
    if plan.recorded is not None:
        head, options, _ = plan.recorded
        return tuple.__new__(HeadLoss, head(*inputs, lam, options))  # a small call notices the time of HeadLoss(*...)
    *out, _ = ops.HeadLossFunction.apply(*inputs, lam, plan)
    return HeadLoss(*out)


def _targets(targets: Tensor, dtype: torch.dtype) -> Tensor:
    return targets.to(dtype if targets.is_floating_point() else torch.int64).contiguous()
