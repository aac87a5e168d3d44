"""paired_views: every backend against the float64 truth of one pixel; draws, statistics, errors, compilation."""

import itertools
import math

import numpy as np
import pytest
import torch
from support import views_oracle
from support.backends import BACKENDS, Backend
from support.oracle import READS

import rebalfer_kernels as rk
from rebalfer_kernels import dispatch
from rebalfer_kernels.backend import BACKENDS as OF_PACKAGE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = dict(mean=0.0, std=1.0, seed=7, epoch=3)


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    """Each backend that has a kernel."""
    one = request.param
    if "views" in OF_PACKAGE[one.name].lacks:
        pytest.skip(f"{one.name} has no kernel for views")
    return one


def pictures(k: int, h: int, w: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (k, h, w, channels), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)


def called(backend: Backend, images, indices, **options):
    moved = {k: v.to(backend.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    at = torch.as_tensor(indices, device=backend.device)
    return rk.paired_views(images.to(backend.device), at, backend=backend.name, **moved).cpu()


# Random numbers ---------------------------------------------------------------------------------------------------

#: key, counter and words, as published with Random123.
KNOWN = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_philox(key, counter, words):
    assert views_oracle.philox(key, counter) == words
    got = rk.reference.philox(key, tuple(torch.tensor(c) for c in counter))
    assert tuple(int(word) for word in got) == words


# Against the truth ------------------------------------------------------------------------------------------------

AUGMENTS = {
    "none": {},
    "shift": dict(shift=0.3, flip=0.5),
    "crop": dict(crop_scale=(0.3, 0.9), flip=0.5),
    "colour": dict(brightness=0.4, contrast=0.5),
    "noise": dict(noise=0.2, noise_probability=0.6),
    "erase": dict(erase_probability=0.7, erase_scale=(0.1, 0.5)),
    "all": dict(
        crop_scale=(0.5, 1.0), crop_ratio=1.5, flip=0.5, brightness=0.2, contrast=0.3, noise=0.1,
        noise_probability=0.8, erase_probability=0.6, erase_scale=(0.05, 0.4),
    ),
}  # fmt: skip


def check(backend, augment, size=(6, 5), image=(7, 4), channels=3, transform="hflip", dtype=torch.float32):
    """Every pixel of views and twins; samples whose upper 32 bits count too."""
    images, indices, samples = pictures(5, *image, channels), [4, 0, 4, 2], [11, 2**40 + 3, 5, 2**62 + 1]
    mean, std = ([0.3, 0.5, 0.7][:channels], [0.2, 0.25, 0.5][:channels])
    common = dict(seed=2**63 + 12345, epoch=9)
    got = called(
        backend, images, indices, samples=torch.tensor(samples), out_size=size, mean=mean, std=std,
        augment=rk.Augment(**augment), transform=transform, dtype=dtype, **common,
    )  # fmt: skip
    truth = views_oracle.paired_views(
        images.numpy(), indices, samples, size, mean, std, common["seed"], common["epoch"], augment, transform
    )
    assert got.dtype == dtype and got.shape == truth.shape and not got.requires_grad
    assert got.is_contiguous(memory_format=torch.channels_last)
    # Half a unit in the last place of 16-bit numbers; a position in an image has 24 bits.
    rtol = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(got.double(), torch.from_numpy(truth), rtol=rtol, atol=3e-5)


@pytest.mark.parametrize("name", AUGMENTS)
def test_augmentations(backend, name):
    check(backend, AUGMENTS[name])


@pytest.mark.parametrize("transform", READS)
def test_transforms(backend, transform):
    check(backend, AUGMENTS["all"], size=(5, 5), transform=transform)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend, dtype):
    check(backend, AUGMENTS["all"], dtype=dtype)


@pytest.mark.parametrize(("image", "size", "channels"), [((4, 9), (9, 3), 1), ((1, 1), (3, 2), 3), ((9, 8), (1, 1), 3)])
def test_sizes(backend, image, size, channels):
    check(backend, AUGMENTS["all"], size, image, channels, "vflip")
    check(backend, AUGMENTS["shift"], size, image, channels, "rot180")


def test_a_shift_by_whole_pixels_is_exact(backend):
    """Bit for bit what eager indexing and the same normalisation give."""
    images, n = pictures(3, 10, 8), 40
    indices = torch.arange(n) % 3
    got = called(
        backend, images, indices, samples=torch.arange(n), out_size=(10, 8), augment=rk.Augment(shift=0.25), **PLAIN
    )
    values = (got * 255).round()
    moves = set()
    for i in range(n):
        of = [views_oracle.View(images[indices[i]].numpy(), i, (10, 8), 7, 3, dict(shift=0.25))][0]
        moves.add((of.top, of.left))
        y, x = (torch.arange(10) + of.top).clamp(0, 9), (torch.arange(8) + of.left).clamp(0, 7)
        assert torch.equal(values[i], images[indices[i]][y][:, x].permute(2, 0, 1).float())
        assert (got[i] * 255 - values[i]).abs().max() < 1e-4
    assert {y for y, _ in moves} == set(range(-2, 3)) and {x for _, x in moves} == set(range(-2, 3))


@pytest.mark.parametrize("name", [name for name in AUGMENTS if name not in ("noise", "all")])
def test_without_noise_cpu_equals_the_reference_bit_for_bit(backend, name):
    if backend.name != "cpu":
        pytest.skip("the C++ kernel is compiled to round as PyTorch does, operation by operation")
    images, indices = pictures(9, 23, 31), torch.arange(9)
    for out_size in ((23, 31), (17, 40)):
        options = dict(PLAIN, out_size=out_size, mean=(0.3, 0.4, 0.5), std=0.21, augment=rk.Augment(**AUGMENTS[name]))
        expected = rk.paired_views(images, indices, backend="reference", **options)
        assert torch.equal(called(backend, images, indices, **options), expected)


# What a view depends on --------------------------------------------------------------------------------------------


def test_a_view_depends_on_nothing_else_in_the_batch(backend):
    images, options = pictures(7, 9, 9), dict(PLAIN, out_size=8, augment=rk.Augment(**AUGMENTS["all"]))
    whole = called(backend, images, torch.arange(7), **options)
    order = torch.tensor([3, 6, 0, 5])
    some = called(backend, images, order, **options)
    assert torch.equal(some, torch.cat([whole[:7][order], whole[7:][order]]))
    gathered = called(backend, images[order].contiguous(), torch.arange(4), samples=order, **options)
    assert torch.equal(gathered, some)
    assert torch.equal(called(backend, images, order, views="original", **options), some[:4])
    as_tensor = called(backend, images, order, **options | {"epoch": torch.tensor(3)})
    assert torch.equal(as_tensor, some)


@pytest.mark.parametrize("change", [{"seed": 8}, {"seed": 7 + 2**32}, {"epoch": 4}, {"samples": torch.arange(1, 8)}])
def test_other_numbers_give_another_view(backend, change):
    images, options = pictures(7, 9, 9), dict(PLAIN, out_size=8, augment=rk.Augment(**AUGMENTS["all"]))
    one, other = (called(backend, images, torch.arange(7), **options | more) for more in ({}, change))
    assert not (one == other).flatten(1).all(1).any()


def test_no_images_give_no_views(backend):
    out = called(backend, pictures(2, 4, 4), torch.zeros(0, dtype=torch.int64), out_size=6, **PLAIN)
    assert out.shape == (0, 3, 6, 6)


# Statistics --------------------------------------------------------------------------------------------------------

N = 3000


def many(backend, image, side, **augment):
    """N views (N, C, H, W) of one image, without mean and std."""
    if OF_PACKAGE[backend.name].interpreted():
        pytest.skip("minutes under the interpreter; its draws are compared with the truth one by one")
    return called(
        backend, image[None], torch.zeros(N, dtype=torch.int64), samples=torch.arange(N), out_size=side,
        augment=rk.Augment(**augment), views="original", **PLAIN,
    )  # fmt: skip


def within(values: torch.Tensor, expected: float, deviation: float) -> None:
    """The mean, by four standard errors."""
    assert abs(values.double().mean().item() - expected) < 4 * deviation / math.sqrt(len(values))


def test_share_of_mirrored_views(backend):
    image = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1)
    within(many(backend, image, (1, 2), flip=0.3)[:, 0, 0, 0], 0.3, math.sqrt(0.21))


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.3, 0.8)])
def test_area_and_place_of_crops(backend, scale):
    """Two gradients say where the box is; its area is uniform, also where a drawn ratio does not fit."""
    ramp = (torch.arange(64) * 4).to(torch.uint8)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.expand(64, 64)], 2)
    view = many(backend, image, 32, crop_scale=scale, crop_ratio=4 / 3) * (255 / 4)
    wide, high = 2 * (view[:, 0, 16, 24] - view[:, 0, 16, 8]), 2 * (view[:, 1, 24, 16] - view[:, 1, 8, 16])
    area = (wide * high / 64**2).double()
    assert wide.max() < 64 + 0.05 and high.max() < 64 + 0.05  # within the image
    assert area.min() > scale[0] - 1e-3 and area.max() < scale[1] + 1e-3
    within(area, sum(scale) / 2, (scale[1] - scale[0]) / math.sqrt(12))
    assert area.min() < scale[0] + 0.02 and area.max() > scale[1] - 0.02
    ratio = wide / high
    assert ratio.max() < 4 / 3 + 1e-2 and ratio.min() > 3 / 4 - 1e-2
    within((ratio > 1).float(), 0.5, 0.5)
    left = view[:, 0, 16, 16] + 0.5 - wide * 16.5 / 32
    room = 64 - wide
    within((left / room)[room > 1], 0.5, 1 / math.sqrt(12))


def test_brightness_and_contrast(backend):
    """Two greys around the middle say both factors."""
    image = torch.tensor([102, 153], dtype=torch.uint8).reshape(1, 2, 1)  # 0.4 and 0.6
    view = many(backend, image, (1, 2), brightness=0.2, contrast=0.3)[:, 0, 0]
    product = (view[:, 1] - view[:, 0]) / 0.2
    contrast = 2 * (0.5 - (view[:, 0] - 0.4 * product))
    brightness = product / contrast
    for factor, reach in ((brightness, 0.2), (contrast, 0.3)):
        assert factor.min() > 1 - reach - 1e-4 and factor.max() < 1 + reach + 1e-4
        within(factor, 1, reach / math.sqrt(3))
        within((factor - 1).square(), reach**2 / 3, reach**2 / 3)


def test_noise(backend):
    image = torch.full((2, 2, 3), 128, dtype=torch.uint8)
    noise = many(backend, image, 2, noise=0.1, noise_probability=0.4) - 128 / 255
    noisy = noise.flatten(1).abs().amax(1) > 1e-5
    within(noisy.float(), 0.4, math.sqrt(0.24))
    values = noise[noisy].flatten(1) / 0.1  # of each pixel and channel
    within(values.flatten(), 0, 1)
    within(values.flatten().square(), 1, math.sqrt(2))
    within(values.flatten() ** 4, 3, math.sqrt(96))
    for a, b in itertools.combinations(range(12), 2):
        within(values[:, a] * values[:, b], 0, 1)


def test_erased_rectangles(backend):
    image = torch.full((1, 1, 1), 255, dtype=torch.uint8)
    erased = many(backend, image, 24, erase_probability=0.6, erase_scale=(0.1, 0.3), erase_ratio=2.0)[:, 0] == 0
    some = erased.flatten(1).any(1)
    within(some.float(), 0.6, math.sqrt(0.24))
    high, wide = erased[some].any(2).sum(1), erased[some].any(1).sum(1)
    assert torch.equal(erased[some].sum((1, 2)), high * wide)  # a rectangle
    area = high * wide / 24**2
    assert area.min() > 0.1 - 0.03 and area.max() < 0.3 + 0.03  # of whole pixels
    assert abs(area.mean().item() - 0.2) < 0.008
    within((erased[some].float().argmax(2).amax(1) / (24 - wide))[wide < 24], 0.5, 0.32)


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_an_index_outside(backend, wrong):
    images = pictures(5, 4, 4)
    if backend.device == "cpu":
        with pytest.raises(IndexError, match=rf"indices: got {wrong}, expected numbers in \[0, 5\)"):
            called(backend, images, [0, wrong], out_size=4, **PLAIN)
        return
    got, expected = (called(backend, images, [0, i, 2], out_size=4, **PLAIN) for i in (wrong, 1))
    assert got[[1, 4]].isnan().all() and torch.equal(got[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


IMAGES, AT = pictures(2, 4, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(images=IMAGES.float()), TypeError, "images: got dtype torch.float32, expected uint8"),
        (dict(images=IMAGES[..., :2]), ValueError, r"images: got shape \(2, 4, 4, 2\)"),
        (dict(images=IMAGES[:, :, ::2]), ValueError, "images: got strides .*expected a contiguous"),
        (dict(images=[0]), TypeError, "images: got list"),
        (dict(indices=AT.int()), TypeError, "indices: got dtype torch.int32, expected int64"),
        (dict(indices=AT[:, None]), ValueError, r"indices: got shape \(2, 1\)"),
        (dict(indices=[0, 1]), TypeError, "indices: got list"),
        (dict(samples=AT[:1]), ValueError, r"samples: got shape \(1,\)"),
        (dict(samples=AT.float()), TypeError, "samples: got dtype torch.float32"),
        (dict(indices=AT.to("meta")), ValueError, "indices: got device meta, expected cpu"),
        (dict(out_size=0), ValueError, "out_size: got 0"),
        (dict(out_size=(4, 4, 3)), TypeError, r"out_size: got \(4, 4, 3\)"),
        (dict(out_size=2.5), TypeError, "out_size: got 2.5"),
        (dict(out_size="44"), TypeError, "out_size: got '44'"),
        (dict(mean=[0.5, 0.5]), ValueError, "mean: got"),
        (dict(mean="a"), ValueError, "mean: got"),
        (dict(std=0), ValueError, "std: got"),
        (dict(std=float("nan")), ValueError, "std: got"),
        (dict(seed=2**64), ValueError, "seed: got"),
        (dict(seed=True), ValueError, "seed: got True"),
        (dict(seed=1.5), ValueError, "seed: got 1.5"),
        (dict(epoch=-1), ValueError, "epoch: got -1"),
        (dict(epoch=2**32), ValueError, "epoch: got 4294967296"),
        (dict(epoch=torch.tensor(1.0)), ValueError, "epoch: got torch.float32"),
        (dict(epoch=AT), ValueError, r"epoch: got torch.int64 of shape \(2,\)"),
        (dict(augment={"flip": 1}), TypeError, "augment: got dict"),
        (dict(transform="flip"), ValueError, "transform: got 'flip'"),
        (dict(transform="rot90", out_size=(4, 5)), ValueError, "transform: got 'rot90' with 4 x 5"),
        (dict(views="twin"), ValueError, "views: got 'twin'"),
        (dict(dtype=torch.float64), TypeError, "dtype: got torch.float64"),
        (dict(backend="none"), ValueError, "backend: got 'none'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = dict(images=IMAGES, indices=AT, out_size=4, **PLAIN) | change
    with pytest.raises(error, match=message):
        rk.paired_views(arguments.pop("images"), arguments.pop("indices"), **arguments)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        *((name, bad, ValueError) for name in ("flip", "brightness", "contrast") for bad in (-0.1, 1.1, math.nan)),
        *((name, 1.5, ValueError) for name in ("noise_probability", "erase_probability")),
        ("shift", 0.6, ValueError),
        ("noise", -1, ValueError),
        ("noise", "a", TypeError),
        ("flip", True, TypeError),
        *((name, 0.9, ValueError) for name in ("crop_ratio", "erase_ratio")),
        *((name, bad, ValueError) for name in ("crop_scale", "erase_scale") for bad in ((0.5, 0.4), (0, 1), (0.5, 2))),
        *((name, bad, TypeError) for name in ("crop_scale", "erase_scale") for bad in (0.5, (0.5,), ("a", "b"))),
    ],
)
def test_wrong_augmentations_are_named(field, value, error):
    with pytest.raises(error, match=f"{field}: got"):
        rk.Augment(**{field: value})


def test_a_shift_and_a_crop_exclude_each_other():
    with pytest.raises(ValueError, match="shift: got 0.1 with crop_scale"):
        rk.Augment(shift=0.1, crop_scale=(0.5, 1.0))


def test_numbers_of_numpy_serve(backend):
    images = pictures(3, 4, 4)
    ours = dict(out_size=4, mean=0.5, std=0.25, seed=3, epoch=2)
    theirs = dict(out_size=np.int64(4), mean=np.float32(0.5), std=np.float64(0.25), seed=np.int64(3), epoch=np.int64(2))
    assert torch.equal(*(called(backend, images, [2, 1], **options) for options in (ours, theirs)))


def test_cuda_has_no_kernel():
    request = dispatch.request_of_views(pictures(1, 2, 2), torch.float32)._replace(device="cuda")
    answer = OF_PACKAGE["cuda"].answer(request)
    assert not answer.ok
    assert "views" in OF_PACKAGE["cuda"].lacks


# Compiled ----------------------------------------------------------------------------------------------------------


def test_compiles_fullgraph_and_sizes_epochs_and_batches_change(backend):
    torch._dynamo.reset()
    images = pictures(9, 7, 7).to(backend.device)

    def call(indices, epoch, side):
        return rk.paired_views(
            images, indices, out_size=side, mean=0.5, std=0.25, seed=1, epoch=epoch, backend=backend.name,
            augment=rk.Augment(**AUGMENTS["all"]),
        )  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    # More than torch.compile's limit of recompilations, where a step is not seconds of tracing or interpreting.
    steps = 12 if backend.name == "cpu" else 1
    for step in range(steps):
        indices = torch.arange(2 + step % 5, device=backend.device)
        for epoch in (step, torch.tensor(step, device=backend.device))[: min(steps, 2)]:
            torch.testing.assert_close(compiled(indices, epoch, 4 + step), call(indices, epoch, 4 + step))
