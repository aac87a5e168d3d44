"""The methods, one file each. A method is a module with a backbone, a head, its losses and its inference.

A new method is one file: a frozen dataclass ``Options`` with :class:`MethodOptions` as its base, whose fields become
``--method.FIELD`` and whose ``build`` returns a :class:`Method`. It imports neither the loop nor the data: what it may
know of the images comes with each batch (see ``trainer.data.batches.Batch``). ``baseline.py`` is the shortest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import Config, Named, UserError

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..data.batches import Batch


class Task(NamedTuple):
    """What a method is built for."""

    counts: tuple[int, ...]  #: training images of each of the L classes
    epochs: int = 1  #: of the run
    backend: str | None = None  #: of the fused operators; None chooses


class MethodOptions(Named, group="method"):
    """Base of each method's ``Options``."""

    def build(self, backbone: Backbone, task: Task) -> Method:
        """The method with its head on ``backbone``, random by PyTorch's global generator."""
        raise NotImplementedError


class Method(nn.Module):
    """A backbone and a head that trains on batches and classifies images.

    Everything that must survive an interruption is a parameter or a buffer of it: a checkpoint holds its state dict
    and that of the optimiser.
    """

    #: Whether its losses follow the number of epochs, so that a run with another one is another run.
    follows_progress = False
    #: Whether a step does the same whatever the epoch, but for numbers on the device, so that a graph can replay it.
    capturable = True
    #: Whether it looks at both views of an image.
    paired = True
    #: Whether it changes images itself, so that they can't be replaced by activations of a frozen part of the backbone.
    changes_images = False
    #: Start of a parameter's name -> factor of its learning rate.
    rates: dict[str, float] = {}

    backbone: Backbone
    head: Any  #: a module that turns features into logits, with ``maps``

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def expect_able(self, config: Config, processes: int) -> None:
        """Raises :class:`UserError` if a run with ``config`` asks for what the method can't do."""
        name = config.method.name
        if config.backbone.separate_views and not self.paired:
            raise UserError(f"backbone.separate_views: got true, but {name} looks at one view")
        if config.augment.versions and not config.backbone.train_from:
            raise UserError(f"augment.versions: got {config.augment.versions}, expected backbone.train_from too")
        if config.augment.versions and self.changes_images:
            raise UserError(f"augment.versions: got {config.augment.versions}, but {name} changes images itself")
        if config.compute.cuda_graph and (not self.capturable or processes > 1):
            what = "several processes" if self.capturable else name
            raise UserError(f"compute.cuda_graph: got true with {what}, which no graph can hold")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars to be logged by name, means over the batch; the one called "loss" is minimised."""
        raise NotImplementedError

    def after_step(self, batch: Batch) -> None:
        """Called after each optimiser step, for methods that keep a teacher or correct labels."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (M, L) float32 of normalised images (M, 1 or 3, h, w)."""
        return self.head(self.backbone(images))

    def maps(self, images: Tensor) -> Tensor:
        """Class activation maps (M, L, H, W), Eq. 2, of normalised images (M, 1 or 3, h, w).

        Raises:
            UserError: its logits are not linear in the mean of the features, so that it has none.
        """
        return self.head.maps(self.backbone(images))


def prior(counts: tuple[int, ...]) -> Tensor:
    """(L,) share of each class among the training images."""
    n = torch.tensor(counts, dtype=torch.float64)
    return (n / n.sum()).float()


def soft(labels: Tensor, num_classes: int) -> Tensor:
    """(N, L) float32 distributions of labels (N,) int64, or those that labels (N, L) are."""
    if labels.is_floating_point():
        return labels
    return torch.nn.functional.one_hot(labels, num_classes).float()
