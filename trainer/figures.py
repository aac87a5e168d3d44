"""The confusion matrix, and every class's map for a face and its mirror image."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def confusion_matrix(path: Path, matrix: Tensor, classes: tuple[str, ...]) -> None:
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    figure, axes = plt.subplots(figsize=(6, 5.2), layout="constrained")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(classes)):
        for j in range(len(classes)):
            tone = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", color=tone, fontsize=8)
    axes.set(xticks=range(len(classes)), yticks=range(len(classes)), xlabel="predicted", ylabel="true, row = 100 %")
    axes.set_xticklabels(classes, rotation=45, ha="right")
    axes.set_yticklabels(classes)
    _save(figure, path)


def activation_maps(path: Path, faces: Tensor, maps: Tensor, classes: tuple[str, ...], title: str) -> None:
    """``faces`` (2, H, W) in [0, 1], the face and its mirror image; ``maps`` (2, L, h, w)."""
    figure, axes = plt.subplots(2, 1 + len(classes), figsize=(1.3 * (1 + len(classes)), 3), layout="constrained")
    large = torch.nn.functional.interpolate(maps, faces.shape[-2:], mode="bilinear", align_corners=False)
    limit = large.abs().max().item() or 1.0
    for row, (face, cams) in enumerate(zip(faces, large, strict=True)):
        for column, axis in enumerate(axes[row]):
            axis.imshow(face, cmap="gray", vmin=0, vmax=1)
            if column:
                axis.imshow(cams[column - 1], cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.55)
            if row == 0:
                axis.set_title("face" if column == 0 else classes[column - 1], fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)
