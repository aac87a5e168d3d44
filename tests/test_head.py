"""Values and gradients of every fused operation against the float64 truth, on each available backend."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import oracle
from support.agreement import check
from support.backends import BACKENDS, FUSED, serving, with_dtypes
from support.cases import case

import rebalfer_kernels as rk
from rebalfer_kernels import native, ops, signatures

OPTIONS = [
    {},
    {"p": 1, "consistency_weight": 0.7},
    {"detach_cam_weight": False, "consistency_weight": 3.0},
    {"views": "original", "transform": "vflip"},
    {"p": 1, "detach_cam_weight": False, "transform": "rot180"},
    {"transform": "identity", "views": "original"},
]


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend, layout, dtype, options):
    check(backend, case(3, 37, 5, 3, 7, dtype, layout, device=backend.device), mean=True, **options)
    check(backend, case(2, 33, 7, 7, 8, dtype, layout, device=backend.device), mean=False, **options)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(torch.bfloat16, torch.float16))
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("detach", [True, False])
def test_float32_weight_of_16_bit_features(backend, layout, dtype, detach):
    """The weight counts with at least 16 bits of its own, where rounding it to the features' dtype keeps 8 or 11."""
    data = case(3, 100, 7, 7, 7, dtype, layout, device=backend.device, weight_dtype=torch.float32)
    check(backend, data, mean=True, slack=4, detach_cam_weight=detach)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("transform", ["rot90", "rot270", "transpose", "hflip"])
def test_square_transforms(backend, layout, transform):
    data = case(2, 19, 4, 4, 3, backend.widest, layout, device=backend.device)
    check(backend, data, mean=False, transform=transform)
    if transform == "hflip":
        return
    with pytest.raises(ValueError, match=r"transform.*square"):
        rk.attention_consistency(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3), torch.ones(2), transform=transform)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("c", "h", "w", "classes"),
    [(1, 1, 1, 2), (3, 1, 1, 7), (100, 14, 14, 7), (513, 7, 7, 11), (64, 7, 7, 16), (340, 4, 4, 100), (130, 5, 3, 17)],
)
def test_shapes(backend, layout, c, h, w, classes, dtype):
    if not backend.reaches(classes, h * w):
        pytest.skip(f"{backend.name} serves fewer classes or smaller maps")
    check(backend, case(2, c, h, w, classes, dtype, layout, device=backend.device), mean=True)
    soft = case(1, c, h, w, classes, dtype, layout, soft=True, device=backend.device)
    check(backend, soft, mean=False, detach_cam_weight=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, autograd):
    features, weight, bias, _, table, v = case(1, 5, 2, 2, 3, torch.float32, device=backend.device)
    for mean, detach in itertools.product((True, False), (True, False)):
        f = features[:0].clone().requires_grad_()
        w = weight.clone().requires_grad_()
        out = rk.rebalanced_head_loss(
            f, w, bias, torch.zeros(0, dtype=torch.long, device=backend.device), target_table=table, map_weights=v,
            reduction="mean" if mean else "none", detach_cam_weight=detach, backend=backend.name,
        )  # fmt: skip
        assert out.loss.isnan().item() if mean else out.loss.shape == (0,)
        out.loss.sum().backward()
        assert f.grad.shape == f.shape
        assert mean or w.grad.eq(0).all()


@pytest.mark.parametrize("backend", serving(torch.float64))
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradcheck(backend, layout, autograd):
    backend = backend.name
    features, weight, bias, targets, table, v = case(2, 5, 3, 3, 3, torch.float64, layout)
    inputs = (features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())

    def head(f, w, b):
        return rk.rebalanced_head_loss(
            f, w, b, targets, target_table=table, map_weights=v, detach_cam_weight=False, reduction="none",
            backend=backend,
        )[:4]  # fmt: skip

    assert torch.autograd.gradcheck(head, inputs)
    assert torch.autograd.gradcheck(lambda f, w: rk.class_activation_maps(f, w, backend=backend), inputs[:2])
    assert torch.autograd.gradcheck(
        lambda f, w: rk.attention_consistency(f, w, v, detach_cam_weight=False, transform="rot90", backend=backend),
        inputs[:2],
    )
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: rk.rebalanced_cross_entropy(z, targets, table, backend=backend), (logits,)
    )


@pytest.mark.parametrize("backend", FUSED)
def test_none_does_not_depend_on_the_batch(backend):
    """The reference leaves the order of its sums to PyTorch."""
    for layout in ("nchw", "channels_last"):
        features, weight, bias, targets, table, v = case(5, 70, 7, 7, 7, torch.float32, layout, device=backend.device)
        n = len(targets)

        def run(rows, features=features, weight=weight, bias=bias, targets=targets, table=table, v=v, n=n):
            f = features[rows + [n + r for r in rows]].detach().requires_grad_()
            out = rk.rebalanced_head_loss(
                f, weight, bias, targets[rows], target_table=table, map_weights=v, reduction="none",
                backend=backend.name,
            )  # fmt: skip
            out.loss.sum().backward()
            return out.loss.detach(), f.grad

        loss, grad = run(list(range(n)))
        assert torch.equal(loss, run(list(range(n)))[0])
        for i in range(n):
            one, one_grad = run([i])
            assert torch.equal(one[0], loss[i])
            assert torch.equal(one_grad, grad[[i, n + i]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_contract(backend, autograd):
    features, weight, bias, targets, table, v = case(4, 24, 7, 7, 7, torch.float32, device=backend.device)
    f, w, b = features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = rk.rebalanced_head_loss(f, w, b, targets, target_table=table, map_weights=v, backend=backend.name)
    if backend.name != "reference":
        sizes = sum(t.numel() for t in saved)
        large = 4 * 7 * 49 + 8 * 24  # the gradient to the maps, and the pooled features
        small = w.numel() + 8 * 7  # and the gradient to the logits
        assert sizes == large + small
        assert all(t.data_ptr() != f.data_ptr() for t in saved if t.numel())
    grads = [torch.autograd.grad(out.loss, (f, w, b), retain_graph=True) for _ in range(3)]
    assert all(torch.equal(x, y) for g in grads[1:] for x, y in zip(g, grads[0], strict=True))
    for i, leaf in enumerate((f, w, b)):
        assert torch.equal(torch.autograd.grad(out.loss, leaf, retain_graph=True)[0], grads[0][i])
    scaled = torch.autograd.grad(out.loss * 2.0**16, (f, w, b))
    assert all(torch.equal(x / 2.0**16, y) for x, y in zip(scaled, grads[0], strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss.backward()
    loss = rk.rebalanced_head_loss(f, w, b, targets, target_table=table, map_weights=v, backend=backend.name).loss
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("options", [*OPTIONS, {"return_maps": True, "reduction": "none"}], ids=str)
@pytest.mark.parametrize("scheduled", [False, True])
def test_autograd_in_cpp_is_that_in_python_to_the_last_bit(
    backend, layout, options, scheduled, monkeypatch, cpp_autograd
):
    """Every output, and the gradients of several upstream gradients to each choice of the inputs that may have one."""
    dtype = backend.dtypes[0 if layout == "nchw" else 1]
    arguments = case(3, 20, 4, 4, 5, dtype, layout, device=backend.device)
    lam = torch.tensor(0.7, device=backend.device) if scheduled else 0.7

    def run(needs, upstreams):
        features, weight, bias, targets, table, v = arguments
        f, w, b = (
            x.clone().requires_grad_(need is True) for x, need in zip((features, weight, bias), needs, strict=True)
        )
        out = rk.rebalanced_head_loss(
            f, w, None if needs[2] is None else b, targets, target_table=table, map_weights=v,
            **{"consistency_weight": lam} | options, backend=backend.name,
        )  # fmt: skip
        chosen = [out[i] for i in upstreams]
        leaves = [x for x in (f, w, b) if x.requires_grad]
        upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape) for x in chosen]
        return out, torch.autograd.grad(chosen, leaves, upstream, allow_unused=True)

    for needs in itertools.product((True, False), (True, False), (True, False, None)):
        if True not in needs:
            continue
        for upstreams in ((0,), (1,), (2,), (3,), (0, 1, 2, 3)):
            signatures._decided.clear()
            in_cpp, gradients = run(needs, upstreams)
            assert "rebalfer::(anonymous namespace)::HeadLoss" in in_cpp.logits.grad_fn.name()
            with monkeypatch.context() as patch:
                patch.setattr(ops, "recorded", lambda *arguments: None)
                signatures._decided.clear()
                in_python, expected = run(needs, upstreams)
            signatures._decided.clear()
            assert in_python.logits.grad_fn.name() == "HeadLossFunctionBackward"
            for x, y in zip((*in_cpp, *gradients), (*in_python, *expected), strict=True):
                assert (x is None) == (y is None)
                if x is not None:
                    assert torch.equal(x, y) and x.stride() == y.stride() and x.requires_grad == y.requires_grad


def test_a_call_lets_other_threads_run(autograd):
    features, weight, bias, targets, table, v = case(64, 256, 8, 8, 256, torch.float32)
    features.requires_grad_()

    def call():
        return rk.rebalanced_head_loss(
            features, weight, bias, targets, target_table=table, map_weights=v, backend="cpu"
        ).loss

    call()
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    with ThreadPoolExecutor(1) as pool:
        pool.submit(tick)
        try:
            for _ in range(20):  # one may be too short on a fast machine, or meet a slow one
                begin = time.perf_counter()
                call()
                middle = (begin + time.perf_counter()) / 2
                quarter = (middle - begin) / 2
                if any(abs(x - middle) < quarter for x in ticks):
                    break
            else:
                pytest.fail("no other thread ran in the middle of a call")
        finally:
            done.set()


def test_cpp_refuses_what_is_no_tensor(cpp_autograd):
    features, weight, bias, targets, table, v = good = case(2, 4, 3, 3, 3, torch.float32)
    head = native.autograd().head
    for wrong in ((), (*good, 1.0), (*good, 1, 0), (*good, 1.0, 0.0)):
        with pytest.raises(TypeError, match="head: expected"):
            head(*wrong)
    for i in range(6):
        for value in ("text", None) if i in (0, 1, 5) else ("text",):
            with pytest.raises(TypeError, match="head: expected"):
                head(*good[:i], value, *good[i + 1 :], 1.0, 0)
    with pytest.raises(OverflowError):
        head(*good, 1.0, 2**70)


@pytest.mark.parametrize("backend", FUSED)
def test_outputs_may_be_changed_in_place(backend, autograd):
    features, weight, bias, targets, table, v = case(2, 6, 3, 3, 3, torch.float32, device=backend.device)
    grads = []
    for changed in (False, True):
        f, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        out = rk.rebalanced_head_loss(
            f, w, bias, targets, target_table=table, map_weights=v, return_maps=True, backend=backend.name
        )
        loss = out.loss.clone()
        for x in out if changed else ():
            x.zero_()
        grads.append(torch.autograd.grad(loss, (f, w)))
    assert all(torch.equal(x, y) and x.any() for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", FUSED)
def test_a_classification_that_is_nan_stays_out_of_the_consistency(backend, autograd):
    """Where only the consistency is differentiated."""
    features, weight, bias, targets, table, v = case(2, 6, 3, 3, 3, torch.float32, device=backend.device)
    grads = []
    for value in (1.0, torch.nan):
        f, w, b = (x.clone().requires_grad_() for x in (features, weight, bias))
        out = rk.rebalanced_head_loss(
            f, w, b, targets, target_table=table * value, map_weights=v, detach_cam_weight=False, backend=backend.name
        )
        assert out.classification.isnan() == (value != 1)
        grads.append(torch.autograd.grad(out.consistency, (f, w, b), allow_unused=True))
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert not grads[0][2].any()


def test_a_feature_that_is_infinite_stays_in_its_channel():
    """With p = 1, whose gradient with respect to the maps is finite: 15 positions end within a vector of any CPU."""
    features, weight, *_, v = case(1, 6, 5, 3, 3, torch.float32)
    features[0, 2, 0, 0] = torch.inf  # which follows the last position of channel 1
    w = weight.clone().requires_grad_()
    loss = rk.attention_consistency(features, w, v, p=1, detach_cam_weight=False, backend="cpu")
    (got,) = torch.autograd.grad(loss, w)
    (truth,) = torch.autograd.grad(
        rk.attention_consistency(features, w, v, p=1, detach_cam_weight=False, backend="reference"), w
    )
    finite = truth.isfinite()
    assert finite[:, [0, 1, 3, 4, 5]].all() and torch.equal(got.isfinite(), finite)
    torch.testing.assert_close(got[finite], truth[finite])


@pytest.mark.parametrize("backend", FUSED)
def test_second_order_is_refused(backend, autograd):
    """The reference differentiates to any order."""
    features, weight, bias, targets, table, v = case(2, 6, 3, 3, 3, backend.widest, device=backend.device)
    backend = backend.name
    for wanted in ("features", "weight", "all"):
        f, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = rk.rebalanced_head_loss(f, w, bias, targets, target_table=table, map_weights=v, backend=backend).loss
        grads = torch.autograd.grad(loss, (f, w), create_graph=True)
        total = loss + sum(g.square().sum() for g in grads)
        with pytest.raises(RuntimeError, match="second-order"):
            if wanted == "all":
                total.backward()
            else:
                torch.autograd.grad(total, f if wanted == "features" else w)
    # Where the weight is a constant, the only way back to the features leads through the call itself.
    for call in (
        lambda f: rk.class_activation_maps(f, weight, backend=backend).square().sum(),
        lambda f: rk.attention_consistency(f, weight, v, backend=backend),
    ):
        f = features.clone().requires_grad_()
        (grad,) = torch.autograd.grad(call(f), f, create_graph=True)
        with pytest.raises(RuntimeError, match="second-order"):
            torch.autograd.grad(grad.square().sum(), f)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_out_of_range(backend, autograd):
    if backend.device != "cpu":
        pytest.skip("on a GPU the sample becomes NaN, see tests/gpu")
    features, weight, bias, targets, table, v = case(3, 6, 3, 3, 3, torch.float32)
    backend = backend.name
    for label in (3, -1):
        wrong = targets.clone()
        wrong[1] = label
        with pytest.raises(IndexError, match="targets"):
            rk.rebalanced_head_loss(features, weight, bias, wrong, target_table=table, map_weights=v, backend=backend)
        with pytest.raises(IndexError, match="targets"):
            rk.rebalanced_cross_entropy(torch.zeros(3, 3), wrong, table, backend=backend)


ERRORS = [
    (dict(features=torch.zeros(2, 3, 4)), ValueError, r"features: got shape \(2, 3, 4\)"),
    (dict(features=torch.zeros(3, 3, 2, 2)), ValueError, "features: got a batch of 3"),
    (dict(features=torch.zeros(2, 3, 2, 2, dtype=torch.int32)), TypeError, "features: got dtype"),
    (dict(weight=torch.zeros(3, 4)), ValueError, r"weight: got shape \(3, 4\)"),
    (dict(weight=torch.zeros(1, 3)), ValueError, "weight: got 1 classes"),
    (dict(weight=torch.zeros(3, 3, dtype=torch.float16)), TypeError, "weight: got dtype"),
    (dict(bias=torch.zeros(4)), ValueError, "bias: got shape"),
    (dict(targets=torch.zeros(2, dtype=torch.long)), ValueError, "targets: got"),
    (dict(targets=torch.zeros(1, 2)), ValueError, "targets: got"),
    (dict(targets=torch.zeros(1, dtype=torch.bool)), TypeError, "targets: got dtype"),
    (dict(targets=torch.zeros(1, 3, requires_grad=True)), ValueError, "targets: got a tensor that requires grad"),
    (dict(target_table=torch.zeros(2, 2)), ValueError, "target_table: got shape"),
    (dict(target_table=torch.zeros(3, 3, requires_grad=True)), ValueError, "target_table: got a tensor that"),
    (dict(map_weights=torch.zeros(2)), ValueError, "map_weights: got shape"),
    (dict(map_weights=torch.zeros(3, dtype=torch.int64)), TypeError, "map_weights: got dtype"),
    (dict(map_weights=torch.zeros(3, device="meta")), ValueError, "map_weights: got device meta"),
    (dict(targets=None), TypeError, "targets: got NoneType"),
    (dict(target_table=None), TypeError, "target_table: got NoneType"),
    (dict(map_weights=None), TypeError, "map_weights: got NoneType"),
    (dict(p=3), ValueError, "p: got 3"),
    (dict(p=2.0), ValueError, "p: got 2.0"),
    (dict(p=True), ValueError, "p: got True"),
    (dict(targets=torch.zeros(1, 3, dtype=torch.long)), ValueError, "targets: got .* or floating label distributions"),
    (dict(transform="flip"), ValueError, "transform: got 'flip'"),
    (dict(views="twin"), ValueError, "views: got 'twin'"),
    (dict(reduction="sum"), ValueError, "reduction: got 'sum'"),
    (dict(consistency_weight="2"), TypeError, "consistency_weight: got '2'"),
    (dict(consistency_weight=torch.tensor(2)), ValueError, "consistency_weight: got torch.int64"),
    (dict(consistency_weight=torch.tensor(2.0, device="meta")), ValueError, "consistency_weight: got device meta"),
    (dict(backend="fast"), ValueError, "backend: got 'fast'"),
    (dict(backend=["cpu"]), TypeError, r"backend: got \['cpu'\]"),
    (dict(backend="cuda"), RuntimeError, "backend: 'cuda' cannot serve"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(change, error, message):
    arguments = dict(
        features=torch.zeros(2, 3, 2, 2), weight=torch.zeros(3, 3), bias=None, targets=torch.zeros(1, dtype=torch.long),
        target_table=torch.eye(3), map_weights=torch.ones(3),
    )  # fmt: skip
    rk.rebalanced_head_loss(**arguments)
    with pytest.raises(error, match=message):
        rk.rebalanced_head_loss(**(arguments | change))


def test_oracle_notices_a_wrong_factor_and_a_nan():
    truth = torch.randn(50, dtype=torch.float64)
    oracle.assert_close(truth.float(), truth, 1e-6)
    for wrong in (truth * 1.01, -truth, truth + 0.1, torch.full_like(truth, float("nan"))):
        with pytest.raises(AssertionError):
            oracle.assert_close(wrong, truth, 1e-3)
