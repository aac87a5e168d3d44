"""Both views of a batch, gathered from uint8 images, augmented and normalised in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, dispatch, ops, reference
from .augment import Augment
from .transforms import TWIN_MAPS


def paired_views(
    images: Tensor,
    indices: Tensor,
    *,
    out_size: int | tuple[int, int],
    mean: float | Sequence[float],
    std: float | Sequence[float],
    seed: int,
    epoch: int | Tensor,
    samples: Tensor | None = None,
    augment: Augment | None = None,
    transform: str = "hflip",
    views: str = "both",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """The N views of a batch and then their N twins, in one pass over the images that the batch has.

    Of each image: a random crop or shift, mirrored or not (bilinear, between the centres of pixels, no antialiasing),
    brightness and contrast, noise, values kept in [0, 1], (value - mean) / std, an erased rectangle. The twin is the
    exact transform of the view, so the noise and the rectangle are the same on both.

    Random numbers are Philox4x32-10 keyed by ``seed`` and counted by (sample, epoch, draw). So an image looks the same
    in an epoch whatever the batch, its order, the number of processes and the backend, up to rounding.

    Args:
        images: (K, h, w, C) uint8, contiguous, C = 1 or 3, on the device that the views are wanted on.
        indices: (N,) int64, which of the images.
        out_size: H and W of the views, or one number for both.
        mean, std: a number or one for each channel, where white is 1.
        seed: 64 bits. epoch: from 0, or an int64 tensor (), which a CUDA graph reads anew at each replay.
        samples: (N,) int64 that key the random numbers, ``indices`` if left out. They differ from these where the
            images of a batch were gathered before, for example from host memory.
        augment: None changes nothing. transform: what is done to the twin: "hflip", "vflip", "rot90", "rot180",
            "rot270", "transpose" or "identity". views: "both", or "original" without the twins.
        dtype: float32, bfloat16 or float16. backend: None chooses; a name forces it.

    Returns:
        (2N, C, H, W), or (N, C, H, W) for "original", channels_last, of ``dtype``; no gradient.

    Raises:
        TypeError, ValueError: a wrong option, dtype, rank, shape or device. IndexError: an index outside [0, K), on a
        CPU; on a GPU that sample's views are NaN. RuntimeError: the forced backend cannot serve.

    >>> images = torch.tensor([[[[0], [255]]]], dtype=torch.uint8)  # black, white
    >>> paired_views(images, torch.tensor([0]), out_size=(1, 2), mean=0.5, std=0.5, seed=0, epoch=0).flatten(1)
    tensor([[-1.,  1.],
            [ 1., -1.]])
    """
    size = checks.view_size(out_size)
    means, stds = reference.numbers(mean), reference.numbers(std)
    checks.views(images, indices, samples, size, means, stds, seed, epoch, transform, views, dtype)
    if augment is not None and not isinstance(augment, Augment):
        raise TypeError(f"augment: got {type(augment).__name__}, expected an Augment or None")
    name = dispatch.choose(dispatch.request_of_views(images, dtype), backend)
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = indices[(indices < 0) | (indices >= len(images))]
        if len(wrong):
            raise IndexError(f"indices: got {wrong[0].item()}, expected numbers in [0, {len(images)})")
    if name == "reference":
        return reference.paired_views(
            images, indices, out_size=size, mean=means, std=stds, seed=seed, epoch=epoch, samples=samples,
            augment=augment, transform=transform, views=views, dtype=dtype,
        )  # fmt: skip
    plan = reference.view_plan(augment, tuple(images.shape[1:]), size, means, stds)
    number, tensor = (0, epoch) if isinstance(epoch, Tensor) else (epoch, None)
    return ops.OPERATORS[name]["paired_views"](
        images,
        indices.contiguous(),
        (indices if samples is None else samples).contiguous(),
        tensor,
        number,
        (int(seed) + 2**63) % 2**64 - 2**63,  # as a signed number
        *plan,
        TWIN_MAPS[transform],
        views == "both",
        dtype,
    )
