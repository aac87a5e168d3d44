"""Parametric faces whose brows, eyes, nose and mouth move with the expression.

Expressions share features as people's do: fear and surprise the open mouth and the raised brows, anger and disgust the
lowered brows, sadness and fear the inner brows pulled up. A person's own features and the strength of the expression,
which differs between the halves of a face, blur the classes; pose, light, hair, a covering patch and noise vary. Left
and right are drawn alike, so a mirror image keeps its expression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import option
from . import Data, DataOptions, Split
from .labels import EXPRESSIONS

TRAIN_COUNTS = (1290, 281, 717, 4772, 1982, 705, 2524)  # RAF-DB basic, in the order of EXPRESSIONS
TEST_COUNTS = (329, 74, 160, 1185, 478, 162, 680)

# Full strength: brow height, inner brows up, eye opening, mouth opening, mouth corners up, mouth width, nose wrinkle.
MEANS = torch.tensor(
    [
        [0.9, 0.0, 0.8, 0.9, 0.0, -0.3, 0.0],  # surprise
        [0.7, 0.6, 0.6, 0.5, -0.4, 0.2, 0.0],  # fear
        [-0.5, -0.3, -0.4, 0.2, -0.5, 0.0, 0.9],  # disgust
        [0.1, 0.0, -0.2, 0.3, 0.9, 0.5, 0.0],  # happiness
        [0.1, 0.7, -0.3, 0.0, -0.7, -0.2, 0.0],  # sadness
        [-0.7, -0.7, 0.2, 0.1, -0.5, -0.1, 0.3],  # anger
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # neutral
    ]
)
IDENTITY = 0.24  # standard deviation of a person's own features, in units of MEANS
CHUNK = 128  # faces drawn at a time: a bound on memory


@dataclass(frozen=True)
class Options(DataOptions):
    """synthetic faces in RAF-DB's proportions"""

    train_size: int = option(12271, "training images; RAF-DB has 12271", low=1)
    test_size: int = option(3068, "test images; RAF-DB has 3068", low=1)

    def read(self, image_size: int, seed: int) -> Data:
        train = draw(in_proportion(TRAIN_COUNTS, self.train_size), image_size, 2 * seed)
        test = draw(in_proportion(TEST_COUNTS, self.test_size), image_size, 2 * seed + 1)
        return Data(EXPRESSIONS, {"train": train, "test": test})


def in_proportion(sizes: tuple[int, ...], total: int) -> list[int]:
    """About ``total`` in the proportions of ``sizes``, at least one each."""
    return [max(1, round(total * n / sum(sizes))) for n in sizes]


def draw(counts: list[int], size: int, seed: int) -> Split:
    """``counts[l]`` grey faces of each expression, shuffled; the same for the same arguments."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=random)]
    images = torch.cat([_faces(chunk, size, random) for chunk in labels.split(CHUNK)])
    return Split(images, labels)


def _faces(labels: Tensor, size: int, random: torch.Generator) -> Tensor:
    """(n, size, size, 1) uint8, painted from back to front; lengths are in half image sides."""
    n = len(labels)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(n, 1, 1, generator=random)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=random)

    # Pose: x, y are the coordinates of each pixel on the upright, centred face.
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    angle, zoom = normal(0.08), 1 + normal(0.06)
    x, y = (columns - normal(0.05)) / zoom, (rows - normal(0.05)) / zoom
    x, y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    turn = normal(0.08)
    x = x - turn * (1 - x.square()).clamp(0)  # features move on a turned head, its outline hardly
    u = x.abs()

    # Expression: each half of a face at its own strength, over the person's own features.
    strength, asymmetry = uniform(0.45, 1.0), normal(0.12)
    sided = strength + asymmetry * torch.tanh(8 * x)
    own = IDENTITY * torch.randn(n, MEANS.shape[1], generator=random)
    parameters = MEANS[labels][:, :, None, None] * sided[:, None] + own[:, :, None, None]
    brow, inner_up, eye, opening, corners, width, wrinkle = parameters.unbind(1)

    def inside(distance: Tensor) -> Tensor:
        """1 where a signed distance is negative, with an antialiased edge of about a pixel."""
        return (0.5 - distance * size / 2.5).clamp(0, 1)

    outline = (x / uniform(0.72, 0.85)).square() + (y / 0.95).square() - 1
    skin = uniform(0.45, 0.85)
    dark = skin * 0.35
    image = uniform(0.1, 0.4).expand(n, size, size)

    def paint(mask: Tensor, tone: Tensor | float) -> None:
        nonlocal image
        image = image + mask * (tone - image)

    paint(inside(outline), skin)
    parting = -0.66 + 0.1 * normal(1) * x + 0.25 * x.square()
    paint(inside(outline) * inside(y - parting), uniform(0.05, 0.7))

    eye_y, half_height = -0.2 + normal(0.02), (0.075 + 0.05 * eye).clamp(0.015)
    lids = inside((((u - 0.35) / 0.15).square() + ((y - eye_y) / half_height).square() - 1) * half_height)
    paint(lids, 0.95)
    paint(lids * inside(((u - 0.35).square() + (y - eye_y).square()).sqrt() - 0.06), 0.1)

    brow_y = -0.42 - 0.08 * brow + 0.35 * inner_up * (u - 0.35) + 0.6 * (u - 0.35).square()
    paint(inside((y - brow_y).abs() - uniform(0.02, 0.04)) * inside((u - 0.36).abs() - 0.19), dark)

    paint(0.5 * inside((u - 0.07 - 0.12 * y).abs() - 0.015) * inside((y - 0.03).abs() - 0.14), dark)
    lines = inside((((y + 0.02) * 14 - 3 * u).sin().abs() - 0.25) * 0.07) * inside((u - 0.12).abs() - 0.05)
    paint(lines * inside((y + 0.02).abs() - 0.13) * (0.8 * wrinkle).clamp(0, 1), dark)

    half_width = 0.27 + 0.09 * width
    along = (u / half_width).square()
    mouth_y = 0.48 + 0.13 * corners * (0.4 - along)
    lip = (0.025 + 0.15 * opening.clamp(0)) * (1 - along).clamp(0)
    paint(inside((y - mouth_y).abs() - lip - 0.012) * inside(u - half_width), dark)
    paint(inside((y - mouth_y).abs() - lip + 0.03) * inside(u - half_width), 0.08)

    covered = (uniform(0, 1) < 0.4) * inside(
        ((columns - uniform(-0.8, 0.8)).square() + (rows - uniform(-0.8, 0.8)).square()).sqrt() - uniform(0.1, 0.28)
    )
    paint(covered, uniform(0.1, 0.9))
    image = image * (1 + uniform(-0.3, 0.3) * columns + uniform(-0.2, 0.2) * rows)
    image = image + 0.06 * torch.randn(n, size, size, generator=random)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)[..., None]
