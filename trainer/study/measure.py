"""What a trained method does with images that it has not seen: to their maps, and what pulls at it."""

from __future__ import annotations

import torch

from ..config import UserError
from ..data import Data, Split
from ..data.views import views
from ..methods import Method
from ..methods.tables import TableMethod
from ..state import State

AT_ONCE = 256  # images
WITH_GRADIENT = 32  # images: all activations of the whole backbone are held for them


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
        try:
            maps = method.maps(views(chunk.to(device), method.backbone, both=True)).double()
        except UserError:
            return None
        own, twin = maps.chunk(2)
        twin = twin.flip(3)
        difference += (own - twin).square().sum().cpu()
        size += (own.square() + twin.square()).sum().cpu() / 2
    return float(100 * (difference / size).sqrt())


def gradient_share(method: Method, split: Split) -> float | None:
    """The consistency's share of what pulls at the weights, in percent, on the first images of ``split``.

    100 |m| / (|c| + |m|), with the gradients c of the classification and m of lambda times the consistency (Eq. 6) with
    respect to all weights that train, in eval mode. None for a method without consistency, or with a classification of
    its own (``rac_focal``).
    """
    if type(method) is not TableMethod or not method.consistency_weight:
        return None
    method.eval()
    weights = [w for w in method.parameters() if w.requires_grad]
    device, consistency, n = weights[0].device, method.consistency_weight, min(AT_ONCE, len(split.labels))
    once, twice = torch.zeros(2, sum(w.numel() for w in weights), dtype=torch.float64, device=device)
    try:
        for start in range(0, n, WITH_GRADIENT):
            rows = slice(start, min(start + WITH_GRADIENT, n))
            labels = split.labels[rows].to(device)
            features = method.backbone(views(split.images[rows].to(device), method.backbone, both=True))
            for times, total in ((1, once), (2, twice)):
                method.consistency_weight = times * consistency
                loss = method.loss_of(features, labels).loss * (len(labels) / n)
                found = torch.autograd.grad(loss, weights, retain_graph=times == 1, materialize_grads=True)
                total += torch.cat([g.flatten() for g in found]).double()
    finally:
        method.consistency_weight = consistency
    m, c = (twice - once).norm(), (2 * once - twice).norm()
    return float(100 * m / (c + m))


def over_training(state: State, data: Data) -> dict[str, float]:
    """The consistency's share of the gradient after epoch 1, 2, 4, 8 and so on, for the row of that epoch."""
    epoch = state.epoch + 1
    if epoch & (epoch - 1):
        return {}
    found = gradient_share(state.take.evaluated, data.splits[data.reported])
    return {} if found is None else {"gradient_share": found}
