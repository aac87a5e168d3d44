"""What the public functions demand of their arguments; each error names the argument, what came, what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from . import transforms

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _known(condition: bool) -> bool:
    """The condition; False where it depends on a batch whose size torch.compile cannot know, as after ``x[mask]``."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def tensor(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor {expected}")


def same_device(name: str, value: Tensor, features: Tensor) -> None:
    if value.device != features.device:
        raise ValueError(f"{name}: got device {value.device}, expected {features.device}, as the features (or logits)")


def no_gradient(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires grad, expected one that does not: it gets no gradient")


def features_and_weight(features: Tensor, weight: Tensor, *, pair: bool) -> None:
    expected = "(2N, C, H, W)" if pair else "(M, C, H, W)"
    tensor("features", features, expected)
    tensor("weight", weight, "(L, C)")
    if features.dim() != 4:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected {expected}")
    if pair and _known(features.shape[0] % 2 != 0):
        raise ValueError(
            f"features: got a batch of {features.shape[0]}, expected an even one: the N images, then their N twins"
        )
    if features.shape[1] < 1 or features.shape[2] < 1 or features.shape[3] < 1:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected C, H, W >= 1")
    if features.dtype not in FEATURE_DTYPES:
        raise TypeError(f"features: got dtype {features.dtype}, expected float32, bfloat16, float16 or float64")
    if weight.dim() != 2 or weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (L, {features.shape[1]}) with the C of the features"
        )
    if weight.shape[0] < 2:
        raise ValueError(f"weight: got {weight.shape[0]} classes, expected L >= 2")
    if weight.dtype != features.dtype and (weight.dtype != torch.float32 or features.dtype == torch.float64):
        raise TypeError(
            f"weight: got dtype {weight.dtype}, expected {features.dtype} as the features"
            + (" or float32" if features.dtype in (torch.bfloat16, torch.float16) else "")
        )
    same_device("weight", weight, features)


def bias_vector(bias: Tensor | None, weight: Tensor) -> None:
    if bias is None:
        return
    tensor("bias", bias, "(L,) or None")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias: got dtype {bias.dtype}, expected {weight.dtype} as the weight")
    same_device("bias", bias, weight)


def map_weight_vector(map_weights: Tensor, weight: Tensor) -> None:
    tensor("map_weights", map_weights, "(L,)")
    if map_weights.shape != weight.shape[:1]:
        raise ValueError(f"map_weights: got shape {tuple(map_weights.shape)}, expected ({weight.shape[0]},)")
    _constant("map_weights", map_weights, weight)


def table_matrix(target_table: Tensor, num_classes: int, features: Tensor) -> None:
    tensor("target_table", target_table, "(L, L)")
    if target_table.shape != (num_classes, num_classes):
        raise ValueError(
            f"target_table: got shape {tuple(target_table.shape)}, expected ({num_classes}, {num_classes})"
        )
    _constant("target_table", target_table, features)


def targets_of(targets: Tensor, rows: int, num_classes: int, features: Tensor) -> None:
    tensor("targets", targets, "(N,) of classes or (N, L) of label distributions")
    if targets.is_floating_point():
        if targets.dim() != 2 or targets.shape[1] != num_classes or _known(targets.shape[0] != rows):
            raise ValueError(
                f"targets: got {targets.dtype} of shape {tuple(targets.shape)}, expected label distributions of shape "
                f"({rows}, {num_classes}), or integer classes of shape ({rows},)"
            )
        no_gradient("targets", targets)
    elif targets.dtype == torch.bool or targets.is_complex():
        raise TypeError(f"targets: got dtype {targets.dtype}, expected integer classes or floating distributions")
    elif targets.dim() != 1 or _known(targets.shape[0] != rows):
        raise ValueError(
            f"targets: got {targets.dtype} of shape {tuple(targets.shape)}, expected integer classes of shape "
            f"({rows},), or floating label distributions of shape ({rows}, {num_classes})"
        )
    same_device("targets", targets, features)


def head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    target_table: Tensor | None,
    map_weights: Tensor | None,
    lam: float | Tensor,
    p: int,
    transform: str,
    views: str,
    detach_cam_weight: bool,
    reduction_: str,
    return_maps: bool,
) -> None:
    """The arguments of the head's loss; what is None is not checked."""
    features_and_weight(features, weight, pair=True)
    bias_vector(bias, weight)
    if target_table is not None:
        table_matrix(target_table, weight.shape[0], features)
    if map_weights is not None:
        map_weight_vector(map_weights, weight)
    if targets is not None:
        targets_of(targets, features.shape[0] // 2, weight.shape[0], features)
    consistency_weight(lam, features)
    consistency_options(p, transform, detach_cam_weight, features)
    option("views", views, ("both", "original"))
    reduction(reduction_)
    flag("return_maps", return_maps)


def option(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def reduction(value: str) -> None:
    option("reduction", value, ("mean", "none"))


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def consistency_options(p: int, transform: str, detach_cam_weight: bool, features: Tensor | None) -> None:
    option("p", p, (1, 2))
    option("transform", transform, transforms.NAMES)
    flag("detach_cam_weight", detach_cam_weight)
    if features is not None and transform in transforms.SQUARE_ONLY and features.shape[2] != features.shape[3]:
        raise ValueError(
            f"transform: got {transform!r} with a {features.shape[2]} x {features.shape[3]} map, expected a square map"
        )


def consistency_weight(value: float | Tensor, features: Tensor | None) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"consistency_weight: got {value.dtype} of shape {tuple(value.shape)}, "
                "expected a number or a 0-d float tensor"
            )
        if features is not None and value.device.type != "cpu":  # from the CPU PyTorch takes a number along
            same_device("consistency_weight", value, features)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"consistency_weight: got {value!r}, expected a number or a 0-d float tensor")


def _constant(name: str, value: Tensor, features: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating dtype")
    no_gradient(name, value)
    same_device(name, value, features)
