"""The confusion matrix, and every class's activation map for faces and their mirror images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from . import checkpoint, metrics
from .data.views import views
from .methods import Method

RIGHT, WRONG = "tab:green", "tab:red"


def confusion_matrix(path: Path, matrix: Tensor, classes: tuple[str, ...], title: str, split: str) -> None:
    """``matrix`` (L, L) counts; drawn as percent of each true class, under the run, its epoch and its accuracies."""
    total = matrix.sum(1, keepdim=True)
    percent = 100 * matrix / total.clamp(min=1)
    side = 2.2 + 0.6 * len(classes)
    figure = Figure(figsize=(side + 0.6, side + 0.4), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    for i in range(len(classes)):
        for j in range(len(classes)):
            tone = "white" if percent[i, j] > 55 else "black"
            axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=tone, fontsize=8)
    names = legible(classes)
    axes.set_xticks(range(len(classes)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), [f"{name} ({n})" for name, n in zip(names, total[:, 0].tolist(), strict=True)])
    axes.set(xlabel="predicted", ylabel=f"true ({split} images)")
    scores = metrics.accuracies(matrix)
    axes.set_title(f"{title}\n{split}: overall {scores['overall']:.2f} %, mean {scores['mean']:.2f} %", fontsize=9)
    figure.colorbar(shown, label="% of the true class", shrink=0.8)
    save(figure, path)


@torch.no_grad()
def activation_maps(
    path: Path, method: Method, images: Tensor, labels: list[int] | None, classes: tuple[str, ...], title: str
) -> None:
    """``images`` (K, H, W, 1 or 3) uint8; ``labels`` of them, if known.

    A row for each image: itself and the maps of all classes over its grey copy, then the same of its mirror image, all
    on one scale. The true class is framed; over an image stands what it is classified as, in red if that is wrong.
    """
    method.eval()
    backbone, device = method.backbone, next(method.parameters()).device
    x = views(images.to(device), backbone, both=True)
    maps, predicted = method.maps(x).float().cpu(), method(x).argmax(1).tolist()
    figure = _drawn_maps(images, maps, labels, predicted, legible(classes))
    what = "class activation maps of images (left) and of their mirror images (right); red = evidence for a class"
    figure.suptitle(f"{title}\n{what}", fontsize=9)
    save(figure, path)


def _drawn_maps(
    images: Tensor, maps: Tensor, labels: list[int] | None, predicted: list[int], classes: tuple[str, ...]
) -> Figure:
    """``maps`` (2K, L, h, w) and what is ``predicted`` (2K,): of K images, then of their mirror images.

    All tiles are in one picture: axes of its own for each of them take matplotlib ten times as long.
    """
    k, half = len(images), 1 + len(classes)
    (height, width), gap, margin = images.shape[1:3], images.shape[1] // 4, images.shape[2] // 16
    large = torch.nn.functional.interpolate(maps.float(), (height, width), mode="bilinear", align_corners=False)
    limit = large.abs().amax().item() or 1.0
    scale = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
    pair = torch.cat([images, images.flip(2)])
    grey = pair.float().mean(-1, keepdim=True)[:, None]
    coloured = 0.4 * grey + 0.6 * torch.from_numpy(scale.to_rgba(large.numpy(), bytes=True)[..., :3])
    tiles = torch.cat([pair.expand(-1, -1, -1, 3)[:, None], coloured.round().byte()], 1)  # (2K, 1 + L, H, W, 3)
    tiles = torch.nn.functional.pad(tiles, (0, 0, 0, margin, gap, 0), value=255).unflatten(0, (2, k))
    figure = Figure(figsize=(1.9 * half + 0.8, 1.12 * k + 0.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.imshow(tiles.permute(1, 3, 0, 2, 4, 5).reshape(k * (height + gap), -1, 3).numpy())

    def write(x: float, y: float, text: str, colour: str = "black", **placed: Any) -> None:
        axes.text(x, y, text, fontsize=8, color=colour, **{"ha": "center", "va": "bottom"} | placed)

    for i in range(2 * k):
        label, (half_of, row) = None if labels is None else labels[i % k], divmod(i, k)
        xs = [column * (width + margin) for column in range(half_of * half, (half_of + 1) * half)]
        y = row * (height + gap) + gap
        tone = "black" if label is None else RIGHT if label == predicted[i] else WRONG
        write(xs[0] + width / 2, y, f"→ {classes[predicted[i]]}", tone)
        if label is not None:
            corner = xs[1 + label] - 0.5, y - 0.5
            axes.add_patch(Rectangle(corner, width, height, fill=False, linewidth=2, color=RIGHT))
            if half_of == 0:
                write(xs[0] - width / 16, y + height / 2, classes[label], rotation=90, ha="right", va="center")
        for x, name in zip(xs[1:], classes, strict=True) if row == 0 else ():
            write(x + width / 2, y, name)
    figure.colorbar(scale, ax=axes, shrink=0.8, fraction=0.02).set_label("evidence for the class", fontsize=8)
    return figure


def legible(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, with a font for their letters made known to matplotlib; "class 3" where no installed font has them."""
    families = list(matplotlib.rcParams["font.family"])
    for name in names:
        if not any(_has(family, name) for family in families):
            families += [family for family in _other_fonts() if _has(family, name)][:1]
    matplotlib.rcParams["font.family"] = families
    return tuple(n if any(_has(f, n) for f in families) else f"class {i}" for i, n in enumerate(names))


def _other_fonts() -> list[str]:
    """Installed fonts, without one whose letters are all boxes."""
    return sorted({font.name for font in fontManager.ttflist} - {"Last Resort High-Efficiency"})


def _has(family: str, text: str) -> bool:
    letters = get_font(findfont(FontProperties(family=[family]))).get_charmap()
    return all(ord(letter) in letters for letter in text)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, which is a quarter of the size, whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80, format="png")
    with Image.open(drawn) as picture, checkpoint.replacing(path) as file:
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(file, "png", optimize=True)
