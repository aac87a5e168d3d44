"""The confusion matrix, and every class's activation map for faces and their mirror images."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def confusion_matrix(path: Path, matrix: Tensor, classes: tuple[str, ...]) -> None:
    """``matrix`` (L, L) counts; drawn as percent of each true class."""
    total = matrix.sum(1, keepdim=True)
    percent = 100 * matrix / total.clamp(min=1)
    side = 2.2 + 0.6 * len(classes)
    figure, axes = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
    shown = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    for i in range(len(classes)):
        for j in range(len(classes)):
            tone = "white" if percent[i, j] > 55 else "black"
            axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=tone, fontsize=8)
    rows = [f"{name} ({n})" for name, n in zip(classes, total[:, 0].tolist(), strict=True)]
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), rows)
    axes.set(xlabel="predicted", ylabel="true (test images)")
    figure.colorbar(shown, label="% of the true class", shrink=0.8)
    _save(figure, path)


def activation_maps(
    path: Path, faces: Tensor, maps: Tensor, labels: list[int], predicted: list[int], classes: tuple[str, ...]
) -> None:
    """``faces`` (K, 1 or 3, H, W) uint8; ``maps`` (2K, L, h, w) of the faces, then of their mirror images.

    A row for each face: itself and the maps of all classes, then its mirror image and its maps, all on one scale. The
    true class is framed; the title of a face is the predicted class.
    """
    k, num_classes = len(faces), len(classes)
    views = torch.cat([faces, faces.flip(-1)]).movedim(1, -1).expand(-1, -1, -1, 3)
    large = torch.nn.functional.interpolate(maps.float(), faces.shape[-2:], mode="bilinear", align_corners=False)
    limit = large.abs().amax().item() or 1.0
    columns = 2 * (1 + num_classes)
    figure, axes = plt.subplots(k, columns, figsize=(0.95 * columns, 1.12 * k), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for i in range(2 * k):
        row = axes[i % k][: columns // 2] if i < k else axes[i % k][columns // 2 :]
        for c, axis in enumerate(row, start=-1):
            axis.imshow(views[i].numpy())
            if c < 0:
                axis.set_title(f"→ {classes[predicted[i]]}", fontsize=8)
                continue
            axis.imshow(large[i, c].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.6)
            if i % k == 0:
                axis.set_title(classes[c], fontsize=8)
            if c == labels[i % k]:
                for spine in axis.spines.values():
                    spine.set(linewidth=2, color="tab:green")
        if i < k:
            row[0].set_ylabel(classes[labels[i]], fontsize=8)
    figure.suptitle(
        "class activation maps of faces (left) and their mirror images (right); red = evidence for the class"
    )
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=80)
    plt.close(figure)
    with Image.open(temporary) as picture:
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(temporary, optimize=True)
    os.replace(temporary, path)
