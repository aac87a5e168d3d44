"""What may be done to an image before its views are made."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks


@dataclass(frozen=True)
class Augment:
    """Augmentation of :func:`paired_views`; the default changes nothing.

    Every image draws its own numbers. Both views of it get the same, so that the twin is the view's exact transform.

    Args:
        flip: probability that the image is mirrored before its views are made.
        shift: largest shift, as a part of each side, in whole pixels; the border is repeated. Not with ``crop_scale``.
        crop_scale: smallest and largest area of a random crop, as parts of the image; (1, 1) is the whole image.
        crop_ratio: largest ratio of the sides of that crop, relative to the image's; its inverse is as likely. A crop
            that would be too wide or too high gets the nearest ratio with which it fits: its area stays as drawn.
        brightness: b; pixel values are multiplied by a number from [1 - b, 1 + b].
        contrast: c; then their distance from 0.5 is multiplied by a number from [1 - c, 1 + c].
        noise: standard deviation of Gaussian noise that is added then, where white is 1; values stay in [0, 1].
        noise_probability: of an image with noise.
        erase_probability: of an image with a rectangle of zeros, which is the mean, after normalisation.
        erase_scale: smallest and largest area of that rectangle, as parts of the output.
        erase_ratio: largest ratio of its sides in pixels, as ``crop_ratio``.

    Raises:
        TypeError, ValueError: a value that is no number or out of its range; a shift and a crop together.

    >>> Augment(flip=0.5, crop_scale=(0.8, 1.0)).flip
    0.5
    """

    flip: float = 0.0
    shift: float = 0.0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: float = 4 / 3
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    noise_probability: float = 1.0
    erase_probability: float = 0.0
    erase_scale: tuple[float, float] = (0.02, 0.25)
    erase_ratio: float = 10 / 3

    def __post_init__(self) -> None:
        for name in ("flip", "brightness", "contrast", "noise_probability", "erase_probability"):
            checks.number_within(name, getattr(self, name), 0, 1)
        checks.number_within("shift", self.shift, 0, 0.5)
        checks.number_within("noise", self.noise, 0, 100)
        for name in ("crop_ratio", "erase_ratio"):
            checks.number_within(name, getattr(self, name), 1, 100)
        for name in ("crop_scale", "erase_scale"):
            checks.interval_within(name, getattr(self, name), 1e-4, 1)
        if self.shift and tuple(self.crop_scale) != (1.0, 1.0):
            raise ValueError(f"shift: got {self.shift} with crop_scale {self.crop_scale}, expected one of the two")
