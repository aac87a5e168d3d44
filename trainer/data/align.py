"""Five points of a face onto a template: their similarity, and the crop of an image that it makes.

Points are (5, 2) float64 in pixels: x to the right, y down, the centre of the upper left pixel at (0, 0), as OpenCV,
detectors and landmark files have it. Their order is that of :data:`TEMPLATE`, left and right as the viewer sees them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from .decode import LARGEST

#: Left eye, right eye, tip of the nose, left and right corner of the mouth in a crop of 112 x 112 pixels: where ArcFace
#: and SFace, and so most weights of face recognition, expect them.
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
TEMPLATE_SIDE = 112
CENTRE = 0.5 + 0.5j  # of the upper left pixel, seen from that pixel's corner


class Similarity(NamedTuple):
    """z -> factor z + offset for points z = x + iy: a rotation, a scale and a translation, never a reflection."""

    factor: complex
    offset: complex

    @property
    def scale(self) -> float:
        """Pixels of the crop in a pixel of the image."""
        return abs(self.factor)

    @property
    def rotation(self) -> float:
        """By how many degrees the image is turned, counter-clockwise as the viewer sees it."""
        return -math.degrees(math.atan2(self.factor.imag, self.factor.real))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Where ``points`` (K, 2) of the image are in the crop."""
        return _pairs(self.factor * _complex(points) + self.offset)

    def inverse(self, points: np.ndarray) -> np.ndarray:
        """Where ``points`` (K, 2) of the crop are in the image."""
        return _pairs((_complex(points) - self.offset) / self.factor)


def _complex(points: np.ndarray) -> np.ndarray:
    return points[..., 0] + 1j * points[..., 1]


def _pairs(z: np.ndarray) -> np.ndarray:
    return np.stack([z.real, z.imag], -1)


def template(size: int, margin: float = 0.0) -> np.ndarray:
    """The template (5, 2) for a crop of ``size`` pixels a side, with ``margin`` of the template's side around it.

    >>> template(112)[0].tolist()
    [38.2946, 51.6963]
    """
    part = (TEMPLATE + 0.5) / TEMPLATE_SIDE
    return size * ((part - 0.5) / (1 + 2 * margin) + 0.5) - 0.5


def similarity(points: np.ndarray, onto: np.ndarray) -> Similarity:
    """The similarity of least squared distances from ``points`` to ``onto``, both (K, 2).

    In the plane it is a linear regression of complex numbers, and so Umeyama's solution (1991, eq. 40-43) without his
    decomposition.
    """
    p, q = _complex(points), _complex(onto)
    centred = p - p.mean()
    factor = complex(np.vdot(centred, q) / np.vdot(centred, centred).real)
    return Similarity(factor, complex(q.mean() - factor * p.mean()))


def distance(points: np.ndarray, onto: np.ndarray) -> float:
    """The root of the mean squared distance between ``points`` and ``onto``, both (K, 2)."""
    return float(np.sqrt(((points - onto) ** 2).sum(-1).mean()))


def fit(points: np.ndarray, onto: np.ndarray, width: int, height: int) -> Similarity:
    """The similarity that aligns the five ``points`` of an image of ``width`` x ``height`` pixels.

    Raises:
        ValueError: they can't be the points of a face in this image.
    """
    if not np.isfinite(points).all():
        raise ValueError("a coordinate is no number")
    if distance(points, points.mean(0)) < 1:
        raise ValueError("the five points are the same")
    outside = int(((points < -0.5) | (points > np.array([width, height]) - 0.5)).any(1).sum())
    if outside > 2:
        raise ValueError(f"{outside} of the five points are outside of its {width} x {height} pixels: is it cropped?")
    found, mirrored = similarity(points, onto), similarity(points * [-1, 1], onto)
    if distance(mirrored(points * [-1, 1]), onto) < distance(found(points), onto) / 2:
        raise ValueError("the points are those of a mirror image: left is the left as the viewer sees it")
    return found


def crop(image: Image.Image, found: Similarity, size: int) -> Image.Image:
    """The ``size`` x ``size`` RGB crop that ``found`` makes of an RGB ``image``, whose border pixels are repeated.

    Where that makes the image smaller, Pillow's Lanczos filter, which averages over all source pixels and so does not
    alias, brings it to the scale of the crop; what is left, a rotation or an enlargement, is bicubic.

    Raises:
        ValueError: the crop covers more pixels of the image's plane than an image may have.
    """
    # From here on a pixel is a square: the image begins at 0 and its first pixel's centre is at CENTRE.
    turn = 1 / found.factor
    start = CENTRE - turn * (CENTRE + found.offset)  # of the crop's upper left corner, in the image
    corners = start + turn * size * np.array([0, 1, 1j, 1 + 1j])
    reduction = min(found.scale, 1.0)
    reach = math.ceil(6 / reduction) + 2  # of both filters
    left, upper = math.floor(corners.real.min()) - reach, math.floor(corners.imag.min()) - reach
    right, lower = math.ceil(corners.real.max()) + reach, math.ceil(corners.imag.max()) + reach
    if (right - left) * (lower - upper) > LARGEST:
        raise ValueError(
            f"its points ask for a crop of {right - left} x {lower - upper} pixels: are they of this image?"
        )
    region = _repeated(image, left, upper, right, lower)
    if reduction < 1:
        width, height = (math.floor(side * reduction) for side in region.size)
        box = (0, 0, width / reduction, height / reduction)
        region = region.resize((width, height), Image.Resampling.LANCZOS, box)
    turn, start = reduction * turn, reduction * (start - complex(left, upper))
    matrix = (turn.real, -turn.imag, start.real, turn.imag, turn.real, start.imag)
    return region.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def _repeated(image: Image.Image, left: int, upper: int, right: int, lower: int) -> Image.Image:
    """That part of the image; beyond its border its border pixels are repeated."""
    inside = image.crop((max(left, 0), max(upper, 0), min(right, image.width), min(lower, image.height)))
    around = (max(-upper, 0), max(lower - image.height, 0)), (max(-left, 0), max(right - image.width, 0)), (0, 0)
    return Image.fromarray(np.pad(np.asarray(inside), around, "edge")) if any(map(any, around)) else inside
