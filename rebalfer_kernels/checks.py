"""What the public functions demand of their arguments; each error names the argument, what came, what was expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import transforms

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_number(value: object) -> bool:
    """A real number of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def whole_number(name: str, value: object, least: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected a whole number >= {least}")
    return int(value)


def number_within(name: str, value: object, low: float, high: float) -> None:
    if not is_number(value):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}: got {value!r}, expected a number from {low} to {high}")


def interval_within(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_number, value)):
        raise TypeError(f"{name}: got {value!r}, expected two numbers")
    if not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name}: got {value!r}, expected {low} <= smallest <= largest <= {high}")


def _known(condition: bool) -> bool:
    """The condition; False where it depends on a batch whose size torch.compile cannot know, as after ``x[mask]``."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def tensor(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor {expected}")
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested" if value.is_nested else f"a {str(value.layout).removeprefix('torch.')}"
        raise TypeError(f"{name}: got {got} tensor, expected a dense one {expected}")


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
    targets: Any,  # as the next two a tensor, or None where not whole
    target_table: Any,
    map_weights: Any,
    p: int,
    transform: str,
    views: str,
    detach_cam_weight: bool,
    reduction_: str,
    return_maps: bool,
    *,
    whole: bool = True,
) -> None:
    """The arguments of the head's loss but lambda; ``whole``: targets, table and map weights must be given."""
    features_and_weight(features, weight, pair=True)
    bias_vector(bias, weight)
    if whole or target_table is not None:
        table_matrix(target_table, weight.shape[0], features)
    if whole or map_weights is not None:
        map_weight_vector(map_weights, weight)
    if whole or targets is not None:
        targets_of(targets, features.shape[0] // 2, weight.shape[0], features)
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
    expected = "a number or a floating tensor of one element"
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"consistency_weight: got {value.dtype} of shape {tuple(value.shape)}, expected {expected}"
            )
        if features is not None and value.device.type != "cpu":  # PyTorch moves one number from the CPU by itself
            same_device("consistency_weight", value, features)
    elif not is_number(value):
        raise TypeError(f"consistency_weight: got {value!r}, expected {expected}")


def _constant(name: str, value: Tensor, features: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating dtype")
    no_gradient(name, value)
    same_device(name, value, features)


def view_size(value: object) -> tuple[int, int]:
    """H and W of ``out_size``."""
    sides = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise TypeError(f"out_size: got {value!r}, expected a whole number or two, (H, W)")
    return whole_number("out_size", sides[0], 1), whole_number("out_size", sides[1], 1)


def views(
    images: Tensor,
    indices: Tensor,
    samples: Tensor | None,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    epoch: int | Tensor,
    transform: str,
    views_: str,
    dtype: torch.dtype,
) -> None:
    """The arguments of paired_views, those of the augmentation excepted."""
    tensor("images", images, "(K, h, w, 1 or 3) of uint8")
    if images.dim() != 4 or images.shape[3] not in (1, 3) or images.shape[1] < 1 or images.shape[2] < 1:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (K, h, w, 1 or 3)")
    if images.dtype != torch.uint8:
        raise TypeError(f"images: got dtype {images.dtype}, expected uint8")
    if not images.is_contiguous():
        raise ValueError(f"images: got strides {images.stride()}, expected a contiguous tensor, which is not copied")
    for name, rows in (("indices", indices), ("samples", samples)):
        if rows is None:
            continue
        tensor(name, rows, "(N,) of int64")
        if rows.dim() != 1 or _known(rows.shape[0] != indices.shape[0]):
            raise ValueError(f"{name}: got shape {tuple(rows.shape)}, expected (N,) with the N of the indices")
        if rows.dtype != torch.int64:
            raise TypeError(f"{name}: got dtype {rows.dtype}, expected int64")
        if rows.device != images.device:
            raise ValueError(f"{name}: got device {rows.device}, expected {images.device}, as the images")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, images.shape[3]) or not all(map(is_number, values)):
            raise ValueError(
                f"{name}: got {values!r}, expected a number, or one for each of {images.shape[3]} channels"
            )
        if not all(map(math.isfinite, values)) or name == "std" and not all(value > 0 for value in values):
            raise ValueError(f"{name}: got {values!r}, expected finite numbers" + (" > 0" if name == "std" else ""))
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {seed!r}, expected a whole number of 64 bits")
    if isinstance(epoch, Tensor):
        if epoch.dim() != 0 or epoch.dtype != torch.int64 or epoch.device != images.device:
            what = f"{epoch.dtype} of shape {tuple(epoch.shape)} on {epoch.device}"
            raise ValueError(f"epoch: got {what}, expected a number or an int64 of shape () on {images.device}")
    else:
        whole_number("epoch", epoch, 0)
        if epoch >= 2**32:
            raise ValueError(f"epoch: got {epoch}, expected a number below 2^32")
    option("transform", transform, transforms.NAMES)
    if transform in transforms.SQUARE_ONLY and size[0] != size[1]:
        raise ValueError(f"transform: got {transform!r} with {size[0]} x {size[1]} pixels, expected a square out_size")
    option("views", views_, ("both", "original"))
    if dtype not in FEATURE_DTYPES[:3]:
        raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16 or float16")
