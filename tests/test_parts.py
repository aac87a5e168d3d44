"""The functions that compute a part of the head, and what callers do to it: strided upstreams, a scheduled lambda,
large outputs, exact zeros of S, extreme logits; values and gradients against the float64 truth."""

import oracle
import pytest
import torch
from test_head import BACKENDS, ROUNDING, TOLERANCE, case

import rebalfer_kernels as rk

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["nchw", "channels_last"]


def served(backend, dtype):
    if backend in ("triton", "cuda") and dtype == torch.float64:
        pytest.skip("float64 is served by the reference and the CPU kernels")


def leaf(x):
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def strided(x):
    """The same values, every second element of a larger tensor, in another order of the dimensions."""
    larger = torch.full([2 * s for s in reversed(x.shape)], float("nan"), dtype=x.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
    view.copy_(x)
    return view


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_class_activation_maps(backend, dtype, layout):
    served(backend, dtype)
    features, weight, *_ = case(2, 37, 5, 3, 7, dtype, layout)
    f, w = leaf(features), leaf(weight)
    maps = rk.class_activation_maps(f, w, backend=backend)
    d_maps = torch.randn(maps.shape, dtype=torch.float64).to(maps.dtype)
    d_features, d_weight = torch.autograd.grad(maps, (f, w), strided(d_maps))
    F, W, D = features.double(), weight.double(), d_maps.double()
    truth = torch.einsum("lc,mchw->mlhw", W, F)
    oracle.assert_close(maps, truth, TOLERANCE[dtype], "maps")
    oracle.assert_close(d_features, torch.einsum("lc,mlhw->mchw", W, D), ROUNDING[dtype], "d_features")
    oracle.assert_close(d_weight, torch.einsum("mlhw,mchw->lc", D, F), ROUNDING[dtype], "d_weight")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("mean", [True, False])
def test_attention_consistency(backend, dtype, layout, p, detach, mean):
    served(backend, dtype)
    features, weight, _, _, table, v = case(3, 37, 5, 3, 7, dtype, layout)
    f, w = leaf(features), leaf(weight)
    out = rk.attention_consistency(
        f, w, v, p=p, detach_cam_weight=detach, reduction="mean" if mean else "none", backend=backend
    )
    up = torch.tensor([-1.5, 0.25, 3.0], dtype=out.dtype)[0 if mean else slice(None)]
    grads = torch.autograd.grad(out, (f, w), up, allow_unused=True)
    truth = oracle.head(
        features, weight, None, torch.zeros(3, dtype=torch.long), table, v, p=p, detach=detach, mean=mean, g_loss=0.0,
        g_cons=up,
    )  # fmt: skip
    oracle.assert_close(out, truth["consistency"], TOLERANCE[dtype], "consistency")
    oracle.assert_close(grads[0], truth["d_features"], ROUNDING[dtype], "d_features")
    if detach:
        assert grads[1] is None
    else:
        oracle.assert_close(grads[1], truth["d_weight"], ROUNDING[dtype], "d_weight")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mean", [True, False])
def test_rebalanced_cross_entropy(backend, dtype, soft, mean):
    served(backend, dtype)
    _, _, _, targets, table, _ = case(5, 1, 1, 1, 7, dtype, soft=soft)
    logits = (3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).to(dtype)
    logits[1, 2] = 900  # no exponential of it exists
    logits[2] = -700
    z = leaf(logits)
    out = rk.rebalanced_cross_entropy(z, targets, table, reduction="mean" if mean else "none", backend=backend)
    up = torch.tensor([-1.5, 0.25, 3.0, 2.0, -1.0], dtype=out.dtype)[0 if mean else slice(None)]
    (d_logits,) = torch.autograd.grad(out, z, up)
    t = targets.double() @ table.double() if soft else table.double()[targets]
    exact = logits.double()
    lse = exact.amax(1) + (exact - exact.amax(1, keepdim=True)).exp().sum(1).log()
    losses = (t * (lse[:, None] - exact)).sum(1)
    share = up.double() / 5 if mean else up.double()[:, None]
    softmax = (exact - lse[:, None]).exp()
    oracle.assert_close(out, losses.mean() if mean else losses, TOLERANCE[dtype], "loss")
    oracle.assert_close(d_logits, share * (t.sum(1, keepdim=True) * softmax - t), ROUNDING[dtype], "d_logits")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradients_of_any_stride(backend, layout):
    data = features, weight, bias, targets, table, v = case(3, 20, 5, 3, 4, torch.float32, layout)
    inputs = leaf(features), leaf(weight), leaf(bias)
    out = rk.rebalanced_head_loss(
        *inputs, targets, target_table=table, map_weights=v, reduction="none", backend=backend
    )
    every_other = torch.tensor([1.5, 9, -2, 9, 0.5, 9])[::2]
    expanded = torch.tensor(-0.75).expand(3)
    logits = torch.randn(6, 4)
    outputs = out.loss, out.classification, out.logits
    grads = torch.autograd.grad(outputs, inputs, (every_other, expanded, strided(logits)))
    truth = oracle.head(*data, mean=False, g_loss=every_other, g_cls=expanded, g_logits=logits)
    for name, got in zip(("d_features", "d_weight", "d_bias"), grads, strict=True):
        oracle.assert_close(got, truth[name], 3e-6, name)


def test_a_scheduled_consistency_weight(backend):
    data = features, weight, bias, targets, table, v = case(3, 20, 5, 3, 4, torch.float32)
    f, lam = leaf(features), torch.tensor(1.7, requires_grad=True)
    out = rk.rebalanced_head_loss(
        f, weight, bias, targets, target_table=table, map_weights=v, consistency_weight=lam, backend=backend
    )  # fmt: skip
    d_features, d_lam = torch.autograd.grad(out.loss, (f, lam), torch.tensor(-2.0))
    truth = oracle.head(*data, lam=1.7, g_loss=-2.0)
    oracle.assert_close(out.loss, truth["loss"], 3e-6, "loss")
    oracle.assert_close(d_features, truth["d_features"], 3e-6, "d_features")
    oracle.assert_close(d_lam, -2 * truth["consistency"], 3e-6, "d_lam")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_weight_with_16_bit_features_is_not_rounded(backend, dtype, layout):
    features, _, _, targets, table, v = case(3, 37, 5, 3, 7, dtype, layout)
    _, weight, *_ = case(3, 37, 5, 3, 7, torch.float32)
    f, w = leaf(features), leaf(weight)
    out = rk.rebalanced_head_loss(
        f, w, None, targets, target_table=table, map_weights=v, detach_cam_weight=False, backend=backend
    )  # fmt: skip
    d_features, d_weight = torch.autograd.grad(out.loss, (f, w))
    truth = oracle.head(features, weight, None, targets, table, v, detach=False)
    oracle.assert_close(out.loss, truth["loss"], 3e-6, "loss")
    oracle.assert_close(out.logits, truth["logits"], 3e-6, "logits")
    oracle.assert_close(d_features, truth["d_features"], ROUNDING[dtype], "d_features")
    oracle.assert_close(d_weight, truth["d_weight"], 3e-6, "d_weight")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [2048, 2053], ids="C{}".format)
def test_large_gradients(backend, layout, channels):
    """Beyond 24 MiB, from where the CPU kernels write past the caches, whole lines or not."""
    if backend == "triton":
        pytest.skip("minutes under the interpreter; size changes nothing there")
    data = features, weight, bias, targets, table, v = case(32, channels, 7, 7, 7, torch.float32, layout)
    f = leaf(features)
    assert f.numel() * 4 > 24 << 20
    out = rk.rebalanced_head_loss(f, weight, bias, targets, target_table=table, map_weights=v, backend=backend)
    (d_features,) = torch.autograd.grad(out.loss, f)
    oracle.assert_close(d_features, oracle.head(*data)["d_features"], 3e-6, "d_features")
    d_maps = torch.randn(64, 7, 7, 7)
    maps = rk.class_activation_maps(f, weight, backend=backend)
    (d_features,) = torch.autograd.grad(maps, f, d_maps)
    truth = torch.einsum("lc,mlhw->mchw", weight.double(), d_maps.double())
    oracle.assert_close(d_features, truth, 3e-6, "d_features of the maps")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_the_views_agree_the_gradient_is_zero_for_p_1_too(backend, layout):
    """sign(0) = 0. Small whole numbers, so that S is 0 exactly in any order of summation."""
    g = torch.Generator().manual_seed(5)
    features = torch.randint(-3, 4, (4, 20, 5, 3), generator=g).float()
    features[2:] = features[:2].flip(-1)
    features[3, :, 0] += 1  # the second pair differs in one row of the map
    weight = torch.randint(-3, 4, (4, 20), generator=g).float()
    f = leaf(features.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else features)
    v = torch.tensor([1.0, 0.5, 2.0, 1.0])
    loss = rk.attention_consistency(f, weight, v, p=1, backend=backend)
    (d_features,) = torch.autograd.grad(loss, f)
    truth = oracle.head(
        features, weight, None, torch.zeros(2, dtype=torch.long), torch.eye(4), v, p=1, g_loss=0, g_cons=1.0
    )  # fmt: skip
    assert truth["d_features"][1].any() and not truth["d_features"][0].any()
    oracle.assert_close(d_features, truth["d_features"], 1e-6, "d_features")
