"""Views of uint8 images and their twins: reference.py says what is computed. A program has some pixels of one image.

Launched without fused multiply and add, and with divisions and roots that round correctly, because what decides which
pixels are read or erased must round as it does in the reference.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import inlined, narrow


class Shape(NamedTuple):
    """Of the images (K, h, w, C) and of the views (H, W)."""

    h: int
    w: int
    C: int
    H: int
    W: int


class Rectangle(NamedTuple):
    """Smallest area, its range, the range of the ratio of the sides."""

    area: Any
    area_range: Any
    ratio_range: Any


class Colours(NamedTuple):
    """A number for each of three channels; of a grey image only the first is read."""

    first: Any
    second: Any
    third: Any


@inlined
def uniform(word):
    """[0, 1) by the upper 24 bits."""
    return (word >> 8).to(tl.float32) * (1.0 / 16777216.0)


@inlined
def ratio_of(word, spread):
    """From [1, 1 + spread), or the inverse of such a number, by the uppermost bit."""
    ratio = 1.0 + spread * uniform(word << 1)
    return tl.where((word >> 31) == 1, tl.div_rn(1.0, ratio), ratio)


@inlined
def below(word, count):
    """A whole number in [0, count)."""
    return (word.to(tl.int64) * count) >> 32


@inlined
def taps(place, start, scale, count: tl.constexpr):
    """The two pixels between whose centres that of an output pixel is, and the second's share."""
    at = (place.to(tl.float32) + 0.5) * scale + (start - 0.5)
    first = tl.floor(at)
    last = count - 1.0
    nearest = tl.minimum(tl.maximum(first, 0.0), last).to(tl.int32)
    return nearest, tl.minimum(tl.maximum(first + 1.0, 0.0), last).to(tl.int32), at - first


@inlined
def box(place, tone, reach_y, reach_x, crop, SHAPE: tl.constexpr, SHIFTED: tl.constexpr):
    """Upper left corner and size of the part of the image that is shown, in its pixels."""
    if SHIFTED:
        top = below(place[0], 2 * reach_y + 1).to(tl.float32) - reach_y
        left = below(place[1], 2 * reach_x + 1).to(tl.float32) - reach_x
        box_h, box_w = SHAPE.h * 1.0, SHAPE.w * 1.0
    else:
        area = crop.area + crop.area_range * uniform(place[0])
        ratio = ratio_of(place[1], crop.ratio_range)
        wide = tl.maximum(tl.minimum(tl.sqrt_rn(area * ratio), 1.0), area)  # the nearest ratio with which it fits
        box_h, box_w = tl.div_rn(area, wide) * SHAPE.h, wide * SHAPE.w
        top, left = uniform(tone[0]) * (SHAPE.h - box_h), uniform(tone[1]) * (SHAPE.w - box_w)
    return top, left, box_h, box_w


@inlined
def erased(y, x, rectangle, corner, chance, erase, SHAPE: tl.constexpr):
    """Whether pixels are in the rectangle of an image that has one."""
    area = (erase.area + erase.area_range * uniform(rectangle[1])) * (SHAPE.H * SHAPE.W)
    ratio = ratio_of(rectangle[2], erase.ratio_range)
    across = tl.maximum(tl.minimum(tl.sqrt_rn(area * ratio), SHAPE.W * 1.0), tl.div_rn(area, SHAPE.H * 1.0))
    tall = tl.minimum(tl.maximum(tl.floor(tl.div_rn(area, across) + 0.5), 1.0), SHAPE.H * 1.0).to(tl.int32)
    wide = tl.minimum(tl.maximum(tl.floor(across + 0.5), 1.0), SHAPE.W * 1.0).to(tl.int32)
    top, left = below(corner[0], SHAPE.H - tall + 1), below(corner[1], SHAPE.W - wide + 1)
    inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
    return inside & (rectangle[0].to(tl.int64) < chance)


@inlined
def on_circle(turn):
    """Cosine and sine of a share of a whole turn, to 3e-7; tl.cos takes memory for angles of any size."""
    quarter = tl.floor(4.0 * turn + 0.5)
    r = (4.0 * turn - quarter) * 1.5707963267948966  # within an eighth of a turn
    s = r * r
    cosine = 1.0 + s * (-0.5 + s * (4.16666667e-2 + s * (-1.38888889e-3 + s * 2.48015873e-5)))
    sine = r * (1.0 + s * (-1.66666667e-1 + s * (8.33333333e-3 + s * (-1.98412698e-4 + s * 2.75573192e-6))))
    quarter = quarter.to(tl.int32)
    odd, back = (quarter & 1) == 1, (quarter & 2) == 2
    x, y = tl.where(odd, -sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(back, -x, x), tl.where(back, -y, y)


@inlined
def normal_numbers(seed, low, high, epoch, pixel):
    """Three standard normal numbers of each pixel, by Box and Muller's method; draws 0 to 3 are the image's own."""
    a, b, c, d = tl.philox(seed, low, high, epoch, (pixel + 4).to(tl.uint32))
    near = tl.sqrt(-2.0 * tl.log(uniform(a) + 1.0 / 16777216.0))
    far = tl.sqrt(-2.0 * tl.log(uniform(c) + 1.0 / 16777216.0))
    x, y = on_circle(uniform(b))
    z, _ = on_circle(uniform(d))
    return near * x, near * y, far * z


@triton.jit(
    do_not_specialize=[
        "K",
        "N",
        "seed",
        "epoch",
        "flip_chance",
        "noise_chance",
        "erase_chance",
        "reach_y",
        "reach_x",
        "twin_offset",
        "twin_stride_h",
        "twin_stride_w",
    ],
    do_not_specialize_on_alignment=["images", "indices", "samples", "epoch_tensor"],
)
def paired_views_kernel(
    images,  # (K, h, w, C) uint8
    indices,  # (N,)
    samples,  # (N,)
    epoch_tensor,  # () int64, or None for `epoch`
    out,  # (2N or N, H, W, C)
    K,
    N,
    seed,
    epoch,
    mean,
    std,
    flip_chance,
    noise_chance,
    erase_chance,
    reach_y,
    reach_x,
    crop,
    brightness,
    contrast,
    noise,
    erase,
    twin_offset,
    twin_stride_h,
    twin_stride_w,
    SHAPE: tl.constexpr,
    SHIFTED: tl.constexpr,
    NOISE: tl.constexpr,
    ERASE: tl.constexpr,
    BOTH: tl.constexpr,
    B: tl.constexpr,
):
    BLOCKS: tl.constexpr = (SHAPE.H * SHAPE.W + B - 1) // B
    i = tl.program_id(0) // BLOCKS
    pixel = tl.program_id(0) % BLOCKS * B + tl.arange(0, B)
    ok = pixel < SHAPE.H * SHAPE.W
    y, x = pixel // SHAPE.W, pixel % SHAPE.W
    index, sample = tl.load(indices + i), tl.load(samples + i)
    known = (index >= 0) & (index < K)
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    if epoch_tensor is not None:
        epoch = tl.load(epoch_tensor)
    epoch = epoch.to(tl.uint32)
    zero = low * 0
    place, tone = tl.philox(seed, low, high, epoch, zero), tl.philox(seed, low, high, epoch, zero + 1)
    rectangle, corner = tl.philox(seed, low, high, epoch, zero + 2), tl.philox(seed, low, high, epoch, zero + 3)

    top, left, box_h, box_w = box(place, tone, reach_y, reach_x, crop, SHAPE, SHIFTED)
    across = tl.where(place[2].to(tl.int64) < flip_chance, SHAPE.W - 1 - x, x)
    y0, y1, dy = taps(y, top, tl.div_rn(box_h, SHAPE.H * 1.0), SHAPE.h)
    x0, x1, dx = taps(across, left, tl.div_rn(box_w, SHAPE.W * 1.0), SHAPE.w)
    factor = 1.0 + contrast * (2.0 * uniform(tone[3]) - 1.0)
    gain = (1.0 + brightness * (2.0 * uniform(tone[2]) - 1.0)) * factor
    offset = 0.5 - 0.5 * factor
    if NOISE:
        normal = normal_numbers(seed, low, high, epoch, pixel)
        noisy = rectangle[3].to(tl.int64) < noise_chance
    if ERASE:
        gone = erased(y, x, rectangle, corner, erase_chance, erase, SHAPE)

    image = images + tl.where(known, index, 0) * (SHAPE.h * SHAPE.w * SHAPE.C)
    there = tl.where(known, pixel, SHAPE.H * SHAPE.W) < SHAPE.H * SHAPE.W
    view = out + i.to(tl.int64) * (SHAPE.H * SHAPE.W * SHAPE.C)
    twin = out + (N + i).to(tl.int64) * (SHAPE.H * SHAPE.W * SHAPE.C)
    twin_pixel = twin_offset + y * twin_stride_h + x * twin_stride_w
    CHANNELS: tl.constexpr = SHAPE.C
    for c in tl.static_range(CHANNELS):
        a = tl.load(image + (y0 * SHAPE.w + x0) * SHAPE.C + c, mask=there, other=0).to(tl.float32)
        b = tl.load(image + (y0 * SHAPE.w + x1) * SHAPE.C + c, mask=there, other=0).to(tl.float32)
        d = tl.load(image + (y1 * SHAPE.w + x0) * SHAPE.C + c, mask=there, other=0).to(tl.float32)
        e = tl.load(image + (y1 * SHAPE.w + x1) * SHAPE.C + c, mask=there, other=0).to(tl.float32)
        upper = a + dx * (b - a)
        value = (upper + dy * (d + dx * (e - d) - upper)) * (1.0 / 255.0)
        value = value * gain + offset
        if NOISE:
            value = tl.where(noisy, value + noise * normal[c], value)
        value = tl.div_rn(tl.minimum(tl.maximum(value, 0.0), 1.0) - mean[c], std[c])
        if ERASE:
            value = tl.where(gone, 0.0, value)
        value = narrow(tl.where(known, value, float("nan")), out.dtype.element_ty)
        tl.store(view + pixel * SHAPE.C + c, value, mask=ok)
        if BOTH:
            tl.store(twin + twin_pixel * SHAPE.C + c, value, mask=ok)
