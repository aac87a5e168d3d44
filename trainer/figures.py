"""The confusion matrix, and every class's activation map for faces and their mirror images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from PIL import Image
from torch import Tensor

from . import checkpoint, metrics
from .data import Split
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
    _save(figure, path)


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
    features = backbone(backbone.views(backbone.coloured(images.to(device)), both=True)).float()
    maps, predicted = method.head.maps(features).cpu(), method.head(features).argmax(1).tolist()
    _draw_maps(images, maps, labels, predicted, legible(classes), title, path)


def _draw_maps(
    images: Tensor,
    maps: Tensor,  # (2K, L, h, w) of the images, then of their mirror images
    labels: list[int] | None,
    predicted: list[int],  # of the 2K
    classes: tuple[str, ...],
    title: str,
    path: Path,
) -> None:
    k, columns = len(images), 2 * (1 + len(classes))
    pair = torch.cat([images, images.flip(2)])
    large = torch.nn.functional.interpolate(maps.float(), images.shape[1:3], mode="bilinear", align_corners=False)
    limit = large.abs().amax().item() or 1.0
    figure = Figure(figsize=(0.95 * columns + 0.8, 1.12 * k + 0.9), layout="constrained")
    grid = figure.subplots(k, columns, squeeze=False)
    for axis in grid.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for i in range(2 * k):
        label = None if labels is None else labels[i % k]
        first, *rest = grid[i % k][: columns // 2] if i < k else grid[i % k][columns // 2 :]
        first.imshow(pair[i].expand(-1, -1, 3).numpy())
        tone = "black" if label is None else RIGHT if label == predicted[i] else WRONG
        first.set_title(f"→ {classes[predicted[i]]}", fontsize=8, color=tone)
        if i < k and label is not None:
            first.set_ylabel(classes[label], fontsize=8)
        for c, axis in enumerate(rest):
            axis.imshow(pair[i].float().mean(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            shown = axis.imshow(large[i, c].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.6)
            if i % k == 0:
                axis.set_title(classes[c], fontsize=8)
            if c == label:
                for spine in axis.spines.values():
                    spine.set(linewidth=2, color=RIGHT)
    figure.colorbar(shown, ax=grid, label="evidence for the class, before the mean", shrink=0.8, fraction=0.02)
    what = "class activation maps of images (left) and of their mirror images (right); red = evidence for a class"
    figure.suptitle(f"{title}\n{what}", fontsize=9)
    _save(figure, path)


def one_of_each(split: Split, only: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
    """The first image of each class that the split has, or of ``only`` these, and the classes."""
    labels = [c for c in split.hard.cpu().unique().tolist() if only is None or c in only]
    rows = torch.tensor([(split.hard.cpu() == c).nonzero()[0, 0].item() for c in labels])
    return split.images[rows].cpu(), labels


def legible(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, with a font for their letters made known to matplotlib; "class 3" where no installed font has them."""
    shown, families = [], list(matplotlib.rcParams["font.family"])
    for i, name in enumerate(names):
        family = next((f for f in (*families, *_other_fonts()) if _has(f, name)), None)
        if family and family not in families:
            families.append(family)
        shown.append(name if family else f"class {i}")
    matplotlib.rcParams["font.family"] = families
    return tuple(shown)


def _other_fonts() -> list[str]:
    """Installed fonts, without one whose letters are all boxes."""
    return sorted({font.name for font in fontManager.ttflist} - {"Last Resort High-Efficiency"})


def _has(family: str, text: str) -> bool:
    letters = get_font(findfont(FontProperties(family=[family]))).get_charmap()
    return all(ord(letter) in letters for letter in text)


def _save(figure: Figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80, format="png")
    with Image.open(drawn) as picture, checkpoint.replacing(path) as file:
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(file, "png", optimize=True)
