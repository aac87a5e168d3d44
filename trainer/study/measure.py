"""What a trained method does to the maps of images that it has not seen."""

from __future__ import annotations

import torch

from ..activations import Activations
from ..config import UserError
from ..data import Split
from ..methods import Method

AT_ONCE = 256  # images


@torch.no_grad()
def view_difference(method: Method, split: Split) -> float | None:
    """How far the maps of an image and of its mirror image are apart, in percent of the maps.

    100 sqrt(sum (M - flip(M'))^2 / sum (M^2 + flip(M')^2) * 2) over all images, classes and places, where M and M' are
    the class activation maps (Eq. 2) of the image and of its mirror image. None for a method that has no maps.
    """
    method.eval()
    device = next(method.parameters()).device
    difference, size = torch.zeros(2, dtype=torch.float64)
    for chunk in split.images.split(AT_ONCE):
        images = chunk if isinstance(chunk, Activations) else method.backbone.coloured(chunk.to(device))
        try:
            maps = method.maps(method.backbone.views(images, both=True)).double()
        except UserError:
            return None
        own, twin = maps.chunk(2)
        twin = twin.flip(3)
        difference += (own - twin).square().sum().cpu()
        size += (own.square() + twin.square()).sum().cpu() / 2
    return float(100 * (difference / size).sqrt())
