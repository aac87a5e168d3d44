"""The functions that compute a part of the head, and what callers do to them and to the whole: strided upstreams, a
scheduled lambda, large outputs, exact zeros of S, extreme logits; values and gradients against the float64 truth.

What the whole head computes under each option is tested in test_head.py.
"""

import pytest
import torch
from support import oracle
from support.backends import BACKENDS, with_dtypes
from support.cases import case
from support.tolerances import ROUNDING, TOLERANCE
from support.upstreams import leaf, strided

import rebalfer_kernels as rk

EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_DTYPE = pytest.mark.parametrize(
    ("backend", "dtype"), with_dtypes(torch.float64, torch.float32, torch.bfloat16, torch.float16)
)
LAYOUTS = ["nchw", "channels_last"]


def there(backend, *tensors):
    return [x.to(backend.device) for x in tensors]


def assert_close(got, truth, tolerance, name):
    oracle.assert_close(got.cpu(), truth, tolerance, name)


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_activation_maps(backend, dtype, layout):
    features, weight, *_ = case(2, 37, 5, 3, 16, dtype, layout)  # 1 KiB of maps: that much scratch begins as NaN
    f, w = leaf(features, backend), leaf(weight, backend)
    maps = rk.class_activation_maps(f, w, backend=backend.name)
    d_maps = torch.randn(maps.shape, dtype=torch.float64).to(maps.dtype)
    d_features, d_weight = torch.autograd.grad(maps, (f, w), strided(*there(backend, d_maps)))
    F, W, D = features.double(), weight.double(), d_maps.double()
    truth = torch.einsum("lc,mchw->mlhw", W, F)
    assert_close(maps, truth, TOLERANCE[dtype], "maps")
    assert_close(d_features, torch.einsum("lc,mlhw->mchw", W, D), ROUNDING[dtype], "d_features")
    assert_close(d_weight, torch.einsum("mlhw,mchw->lc", D, F), ROUNDING[dtype], "d_weight")


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("mean", [True, False])
def test_attention_consistency(backend, dtype, layout, p, detach, mean):
    features, weight, _, _, table, v = case(3, 37, 5, 3, 7, dtype, layout)
    f, w = leaf(features, backend), leaf(weight, backend)
    out = rk.attention_consistency(
        f, w, v.to(backend.device), p=p, detach_cam_weight=detach, reduction="mean" if mean else "none",
        backend=backend.name,
    )  # fmt: skip
    up = torch.tensor([-1.5, 0.25, 3.0], dtype=out.dtype)[0 if mean else slice(None)]
    grads = torch.autograd.grad(out, (f, w), *there(backend, up), allow_unused=True)
    truth = oracle.head(
        features, weight, None, torch.zeros(3, dtype=torch.long), table, v, p=p, detach=detach, mean=mean, g_loss=0.0,
        g_cons=up,
    )  # fmt: skip
    assert_close(out, truth["consistency"], TOLERANCE[dtype], "consistency")
    assert_close(grads[0], truth["d_features"], ROUNDING[dtype], "d_features")
    if detach:
        assert grads[1] is None
    else:
        assert_close(grads[1], truth["d_weight"], ROUNDING[dtype], "d_weight")


@EVERY_DTYPE
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mean", [True, False])
def test_rebalanced_cross_entropy(backend, dtype, soft, mean):
    _, _, _, targets, table, _ = case(5, 1, 1, 1, 7, dtype, soft=soft)
    logits = (3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).to(dtype)
    logits[1, 2] = 900  # no exponential of it exists
    logits[2] = -700
    z = leaf(logits, backend)
    out = rk.rebalanced_cross_entropy(
        z, *there(backend, targets, table), reduction="mean" if mean else "none", backend=backend.name
    )
    up = torch.tensor([-1.5, 0.25, 3.0, 2.0, -1.0], dtype=out.dtype)[0 if mean else slice(None)]
    (d_logits,) = torch.autograd.grad(out, z, *there(backend, up))
    t = targets.double() @ table.double() if soft else table.double()[targets]
    exact = logits.double()
    lse = exact.amax(1) + (exact - exact.amax(1, keepdim=True)).exp().sum(1).log()
    losses = (t * (lse[:, None] - exact)).sum(1)
    share = up.double() / 5 if mean else up.double()[:, None]
    softmax = (exact - lse[:, None]).exp()
    assert_close(out, losses.mean() if mean else losses, TOLERANCE[dtype], "loss")
    assert_close(d_logits, share * (t.sum(1, keepdim=True) * softmax - t), ROUNDING[dtype], "d_logits")


@EVERY_BACKEND
def test_an_upstream_gradient_that_is_zero_without_memory(backend, autograd):
    """PyTorch makes such tensors itself; operators get them expanded from one element."""
    features, weight, bias, targets, table, v = there(backend, *case(3, 20, 5, 3, 4, torch.float32))
    f = features.requires_grad_()
    out = rk.rebalanced_head_loss(f, weight, bias, targets, target_table=table, map_weights=v, backend=backend.name)
    maps = rk.class_activation_maps(f, weight, backend=backend.name)
    for x in (out.logits, maps):
        (gradient,) = torch.autograd.grad(x, f, torch._efficientzerotensor(x.shape, device=x.device))
        assert gradient.shape == f.shape and not gradient.any()


@EVERY_BACKEND
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradients_of_any_stride(backend, layout, autograd):
    data = features, weight, bias, targets, table, v = case(3, 20, 5, 3, 4, torch.float32, layout)
    inputs = leaf(features, backend), leaf(weight, backend), leaf(bias, backend)
    y, rows, weights = there(backend, targets, table, v)
    out = rk.rebalanced_head_loss(
        *inputs, y, target_table=rows, map_weights=weights, reduction="none", backend=backend.name
    )  # fmt: skip
    every_other = torch.tensor([1.5, 9, -2, 9, 0.5, 9])[::2]
    expanded = torch.tensor(-0.75).expand(3)
    logits = torch.randn(6, 4)
    outputs = out.loss, out.classification, out.logits
    every_other, expanded, d_logits = there(backend, every_other, expanded, logits)
    assert backend.device != "cpu" or (every_other.stride(), expanded.stride()) == ((2,), (0,))
    grads = torch.autograd.grad(outputs, inputs, (every_other, expanded, strided(d_logits)))
    truth = oracle.head(*data, mean=False, g_loss=every_other.cpu(), g_cls=expanded.cpu(), g_logits=logits)
    for name, got in zip(("d_features", "d_weight", "d_bias"), grads, strict=True):
        assert_close(got, truth[name], 3e-6, name)


@EVERY_BACKEND
def test_a_scheduled_consistency_weight(backend):
    data = features, weight, bias, targets, table, v = case(3, 20, 5, 3, 4, torch.float32)
    f, lam = leaf(features, backend), leaf(torch.tensor(1.7), backend)
    w, b, y, rows, weights = there(backend, weight, bias, targets, table, v)
    out = rk.rebalanced_head_loss(
        f, w, b, y, target_table=rows, map_weights=weights, consistency_weight=lam, backend=backend.name
    )
    d_features, d_lam = torch.autograd.grad(-2 * out.loss, (f, lam))
    truth = oracle.head(*data, lam=1.7, g_loss=-2.0)
    with torch.no_grad():
        double = rk.rebalanced_head_loss(
            f, w, b, y, target_table=rows, map_weights=weights, consistency_weight=lam.double(), backend=backend.name
        )
    assert double.loss.dtype == torch.float32
    assert_close(double.loss, truth["loss"], 3e-6, "loss with a float64 lambda")
    assert_close(out.loss, truth["loss"], 3e-6, "loss")
    assert_close(d_features, truth["d_features"], 3e-6, "d_features")
    assert_close(d_lam, -2 * truth["consistency"], 3e-6, "d_lam")


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(torch.bfloat16, torch.float16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_float32_weight_with_16_bit_features_is_not_rounded(backend, dtype, layout):
    features, _, _, targets, table, v = case(3, 37, 5, 3, 7, dtype, layout)
    _, weight, *_ = case(3, 37, 5, 3, 7, torch.float32)
    f, w = leaf(features, backend), leaf(weight, backend)
    y, rows, weights = there(backend, targets, table, v)
    out = rk.rebalanced_head_loss(
        f, w, None, y, target_table=rows, map_weights=weights, detach_cam_weight=False, backend=backend.name
    )
    d_features, d_weight = torch.autograd.grad(out.loss, (f, w))
    truth = oracle.head(features, weight, None, targets, table, v, detach=False)
    # Tensor cores take a weight in two halves: 16 bits of it where the features are bfloat16.
    tolerance = 2**-17 if backend.name in ("triton", "cuda") else 3e-6
    assert_close(out.loss, truth["loss"], tolerance, "loss")
    assert_close(out.logits, truth["logits"], tolerance, "logits")
    assert_close(d_features, truth["d_features"], ROUNDING[dtype], "d_features")
    assert_close(d_weight, truth["d_weight"], tolerance, "d_weight")


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(torch.bfloat16, torch.float16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_16_bits_are_rounded_to_nearest(backend, dtype, layout):
    """Where a class has gradient 1 and the other 0, the former's weight is stored: any 32 bits, ties and NaNs too."""
    if backend.name in ("triton", "cuda"):
        pytest.skip("tensor cores take a weight in two halves: not any 32 bits")
    g = torch.Generator().manual_seed(6)
    bits = torch.randint(-(2**31), 2**31, (220,), generator=g, dtype=torch.int64)
    bits[::3] = bits[::3] & ~0xFFFF | 0x8000  # halfway between two bfloat16
    bits[1::6] = bits[1::6] & ~0xFFF | 0x1000  # halfway between two float16
    bits[:10] = torch.tensor(
        [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000, 0x7F7FFFFF, 0x477FEFFF, 0x477FF000, 1, -(2**31)]
    )
    weight = torch.stack([bits.to(torch.int32).view(torch.float32), torch.zeros(220)])
    features = leaf(case(2, 220, 5, 4, 2, dtype, layout)[0], backend)
    maps = rk.class_activation_maps(features, *there(backend, weight), backend=backend.name)
    d_maps = torch.tensor([1.0, 0.0], dtype=maps.dtype)[:, None, None].expand_as(maps)
    (d_features,) = torch.autograd.grad(maps, features, *there(backend, d_maps))
    want = weight.to(dtype)[0, :, None, None].expand(4, -1, 5, 4)
    assert want.isnan().sum() > 100 and want.isfinite().sum() > 1000
    torch.testing.assert_close(d_features.cpu(), want, rtol=0, atol=0, equal_nan=True)


@EVERY_BACKEND
def test_arguments_may_be_copied_on_write(backend):
    """PyTorch copies such a tensor where its memory is first asked for, and forbids that inside of a parallel loop."""
    data = case(4, 20, 3, 3, 5, torch.float32)
    results = []
    for copy in (torch.clone, torch._lazy_clone):
        features, weight, v = map(copy, there(backend, data[0], data[1], data[5]))
        features, weight = features.requires_grad_(), weight.requires_grad_()
        maps = rk.class_activation_maps(features, weight, backend=backend.name)
        loss = rk.attention_consistency(features, weight, v, detach_cam_weight=False, backend=backend.name)
        upstream = [copy(torch.ones_like(maps)), copy(torch.ones_like(loss))]
        results.append([maps, loss, *torch.autograd.grad((maps, loss), (features, weight), upstream)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@EVERY_BACKEND
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [2048, 2053], ids="C{}".format)
def test_large_gradients(backend, layout, channels):
    """Beyond 24 MiB, from where the CPU kernels write past the caches, whole lines or not."""
    if backend.name == "triton":
        pytest.skip("minutes under the interpreter; size changes nothing there")
    data = features, weight, bias, targets, table, v = case(32, channels, 7, 7, 7, torch.float32, layout)
    f = leaf(features, backend)
    assert f.numel() * 4 > 24 << 20
    w, b, y, rows, weights = there(backend, weight, bias, targets, table, v)
    out = rk.rebalanced_head_loss(f, w, b, y, target_table=rows, map_weights=weights, backend=backend.name)
    (d_features,) = torch.autograd.grad(out.loss, f)
    assert_close(d_features, oracle.head(*data)["d_features"], 3e-6, "d_features")
    d_maps = torch.randn(64, 7, 7, 7)
    maps = rk.class_activation_maps(f, w, backend=backend.name)
    (d_features,) = torch.autograd.grad(maps, f, *there(backend, d_maps))
    truth = torch.einsum("lc,mlhw->mchw", weight.double(), d_maps.double())
    assert_close(d_features, truth, 3e-6, "d_features of the maps")


@EVERY_BACKEND
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_the_views_agree_the_gradient_is_zero_for_p_1_too(backend, layout):
    """sign(0) = 0. Small whole numbers, so that S is 0 exactly in any order of summation."""
    g = torch.Generator().manual_seed(5)
    features = torch.randint(-3, 4, (4, 20, 5, 3), generator=g).float()
    features[2:] = features[:2].flip(-1)
    features[3, :, 0] += 1  # the second pair differs in one row of the map
    weight = torch.randint(-3, 4, (4, 20), generator=g).float()
    f = leaf(features.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else features, backend)
    v = torch.tensor([1.0, 0.5, 2.0, 1.0])
    loss = rk.attention_consistency(f, *there(backend, weight, v), p=1, backend=backend.name)
    (d_features,) = torch.autograd.grad(loss, f)
    truth = oracle.head(
        features, weight, None, torch.zeros(2, dtype=torch.long), torch.eye(4), v, p=1, g_loss=0, g_cons=1.0
    )  # fmt: skip
    assert truth["d_features"][1].any() and not truth["d_features"][0].any()
    assert_close(d_features, truth["d_features"], 1e-6, "d_features")
