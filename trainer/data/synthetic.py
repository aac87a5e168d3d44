"""Parametric faces whose brows, eyes, nose and mouth move with the expression.

Expressions share features as people's do: fear and surprise the open mouth and the raised brows, anger and disgust the
lowered brows. Identity moves the same features, so that no single one decides; pose, light and noise vary. Everything
is drawn from |x|, so a mirrored face keeps its expression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import EXPRESSIONS, Data, Split

TRAIN_COUNTS = (1290, 281, 717, 4772, 1982, 705, 2524)  # RAF-DB basic
TEST_COUNTS = (329, 74, 160, 1185, 478, 162, 680)

# brow height, brow slope (inner end up), eye opening, mouth opening, mouth curve (up), mouth width, nose wrinkle
_MEANS = torch.tensor(
    [
        [0.9, 0.0, 0.8, 0.9, 0.0, -0.3, 0.0],
        [0.7, 0.6, 0.6, 0.5, -0.4, 0.2, 0.0],
        [-0.5, -0.3, -0.4, 0.2, -0.5, 0.0, 0.9],
        [0.1, 0.0, -0.2, 0.3, 0.9, 0.5, 0.0],
        [0.1, 0.7, -0.3, 0.0, -0.7, -0.2, 0.0],
        [-0.7, -0.7, 0.2, 0.1, -0.5, -0.1, 0.3],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)
_IDENTITY = 0.24  # standard deviation of a person's own features, in the units of the expression


def load(*, image_size: int, seed: int, train_size: int) -> Data:
    """A training split of about ``train_size`` in RAF-DB's proportions, and RAF-DB's test counts."""
    total = sum(TRAIN_COUNTS)
    counts = [max(1, round(train_size * n / total)) for n in TRAIN_COUNTS]
    tests = TEST_COUNTS if train_size >= 1000 else [max(1, n // 20) for n in TEST_COUNTS]
    return Data(EXPRESSIONS, draw(counts, image_size, 2 * seed), draw(tests, image_size, 2 * seed + 1))


def draw(counts: list[int] | tuple[int, ...], image_size: int, seed: int) -> Split:
    """``counts[l]`` faces of each expression, shuffled; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=g)]
    images = torch.cat([_draw(chunk, image_size, g) for chunk in labels.split(256)])
    return Split(images, labels)


def _draw(labels: Tensor, size: int, g: torch.Generator) -> Tensor:
    n = len(labels)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(n, 1, 1, generator=g)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=g)

    parameters = _MEANS[labels] * uniform(0.45, 1.0)[:, 0] + _IDENTITY * torch.randn(n, 7, generator=g)
    brow, slope, eye, opening, curve, width, wrinkle = (p[:, None, None] for p in parameters.unbind(1))

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle, zoom = normal(0.08), 1 / (1 + normal(0.06))
    x, y = x - normal(0.05), y - normal(0.05)
    x, y = zoom * (x * angle.cos() + y * angle.sin()), zoom * (y * angle.cos() - x * angle.sin())
    u = x.abs()
    soft = 2.5 / size

    def inside(distance: Tensor) -> Tensor:  # 1 where the distance is negative, with an antialiased edge
        return (0.5 - distance / soft).clamp(0, 1)

    face = inside((x / uniform(0.72, 0.85)).square() + (y / 0.95).square() - 1)
    skin = uniform(0.45, 0.85)
    image = uniform(0.1, 0.4) * (1 - face) + skin * face

    def paint(mask: Tensor, tone: Tensor | float) -> None:
        nonlocal image
        image = image * (1 - mask) + tone * mask

    dark = skin * 0.35
    eye_y, eye_height = -0.2 + normal(0.02), (0.075 + 0.05 * eye).clamp(0.015)
    eyes = ((u - 0.35) / 0.15).square() + ((y - eye_y) / eye_height).square() - 1
    paint(inside(eyes * eye_height), 0.95)
    paint(inside(((u - 0.35).square() + (y - eye_y).square()).sqrt() - 0.06) * inside(eyes * eye_height), 0.1)
    brow_line = -0.42 - 0.08 * brow + 0.35 * slope * (u - 0.35) + 0.6 * (u - 0.35).square()
    paint(inside((y - brow_line).abs() - uniform(0.02, 0.04)) * inside((u - 0.36).abs() - 0.19), dark)
    nose = inside((u - 0.07 - 0.12 * (y - 0.0)).abs() - 0.015) * inside((y - 0.03).abs() - 0.14)
    paint(0.5 * nose, dark)
    wrinkles = inside((((y + 0.02) * 14 - 3 * u).sin().abs() - 0.25) * 0.07) * inside((u - 0.12).abs() - 0.05)
    paint(wrinkles * inside((y + 0.02).abs() - 0.13) * (0.8 * wrinkle).clamp(0, 1), dark)
    half = 0.27 + 0.09 * width
    t = (u / half).square()
    line = 0.48 + 0.13 * curve * (0.4 - t)
    height = (0.025 + 0.15 * opening.clamp(0)) * (1 - t).clamp(0)
    paint(inside((y - line).abs() - height - 0.012) * inside(u - half), dark)
    paint(inside((y - line).abs() - height + 0.03) * inside(u - half), 0.08)

    light = 1 + uniform(-0.3, 0.3) * x + uniform(-0.2, 0.2) * y
    image = image * light + 0.06 * torch.randn(n, size, size, generator=g)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)[:, None]
