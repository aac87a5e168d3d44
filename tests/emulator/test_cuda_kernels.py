"""The CUDA kernels' own source, run on a CPU by the emulator, against the float64 truth."""

from __future__ import annotations

import pytest
import torch
from emulated_head import LAYOUTS, NAMES, STORAGE, Case, backward, forward, library, nans, upstreams
from support import oracle
from torch import Tensor

#: Relative L2 errors of float32 outputs; of gradients in the features' dtype, where rounding prevails.
TOLERANCE = 3e-6
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}
#: A float32 weight meets 16-bit features as two 16-bit parts.
SPLIT = {torch.float32: 3e-6, torch.bfloat16: 1e-5, torch.float16: 3e-6}
SM80 = [pytest.param(False, id="sm90"), pytest.param(True, id="sm80")]


def truth(case, ups, **options):
    value = lambda u: 0.0 if u is None else u  # noqa: E731
    targets = case.labels if case.soft is None else case.soft
    return oracle.head(
        case.features, case.weight, case.bias, targets, case.table, case.v, g_loss=value(ups[0]), g_cls=value(ups[1]),
        g_cons=value(ups[2]), g_logits=ups[3], **options,
    )  # fmt: skip


def check(case, *, mean=True, sm80=False, cluster=None, **options):
    """Every output and gradient, with signed random upstreams on each output at once.

    Neither the order of execution nor the stages of the rings change a bit of them.
    """
    ups = upstreams(case, mean)
    saved, _ = forward(case, mean=mean, sm80=sm80, cluster=cluster, **options)
    again, _ = forward(case, mean=mean, sm80=sm80, cluster=cluster, stages=2, order="reverse", **options)
    of_backward = {k: v for k, v in options.items() if k not in ("p", "views")}
    grads, _ = backward(case, saved, ups, mean=mean, sm80=sm80, **of_backward)
    grads_again, _ = backward(case, saved, ups, mean=mean, sm80=sm80, order="reverse", **of_backward)
    expected = truth(case, ups, mean=mean, **options)
    expected["pooled"] = case.features.double().mean((2, 3))
    exact = case.weight.dtype == case.dtype
    tolerance = TOLERANCE if exact else SPLIT[case.dtype]
    for name in ("pooled", "maps", "map_grad", "logits", "logit_grad", "loss", "classification", "consistency"):
        oracle.assert_close(saved[name], expected[name], tolerance, name)
    for name in grads:
        rounding = ROUNDING[case.dtype if name == "d_features" else case.weight.dtype]
        oracle.assert_close(grads[name], expected[name], max(rounding, tolerance), name)
    for one, two in ((saved, again), (grads, grads_again)):
        for name in one:
            assert torch.equal(one[name], two[name]) or name == "cam_grad" and options.get("detach", True), name


OPTIONS = [
    {},
    {"p": 1, "lam": 0.7, "transform": "rot90"},
    {"detach": False, "lam": 3.0},
    {"views": "original", "transform": "vflip"},
    {"p": 1, "detach": False, "transform": "rot270"},
    {"transform": "identity", "views": "original"},
    {"transform": "transpose"},
    {"transform": "rot180", "detach": False, "views": "original"},
]
DTYPES = [pytest.param(d, id=n) for d, n in NAMES.items()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(dtype, layout, options):
    check(Case(2, 100, 7, 7, 7, dtype, layout), mean=False, **options)
    check(Case(3, 72, 4, 4, 8, dtype, layout, soft=True), mean=True, **options)


# Sizes in pairs: channels that are no multiple of anything, tails, whole slabs, more slabs than stages; maps of one
# position up to 8 x 8; both numbers of class blocks. Misaligned bases take the element-wise paths.
SIZES = [
    (1, 1, 1, 1, 2), (3, 3, 5, 3, 11), (1, 100, 8, 8, 16), (2, 513, 7, 7, 7), (1, 512, 7, 7, 8), (3, 64, 1, 1, 7),
    (1, 33, 7, 7, 16), (2, 256, 5, 3, 8),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(dtype, layout, size):
    check(Case(*size, dtype, layout, seed=size[1]), mean=size[0] == 2, detach=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_bases_and_a_float32_weight(dtype, layout):
    for c in (64, 72):
        check(Case(2, c, 7, 7, 8, dtype, layout, shift=1, weight_dtype=torch.float32), detach=False)
    check(Case(2, 72, 7, 7, 11, dtype, layout, weight_dtype=torch.float32), mean=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_class_masked_by_an_infinite_bias_costs_nothing_where_its_target_is_zero(layout):
    case = Case(2, 64, 7, 7, 7, torch.bfloat16, layout)
    case.bias[3], case.table[:, 3], case.labels = -torch.inf, 0.0, torch.tensor([1, 5])
    saved, _ = forward(case, mean=False)
    others = [0, 1, 2, 4, 5, 6]
    z, t = saved["logits"].double()[:, others], case.table[case.labels][:, others].double().repeat(2, 1)
    of_view = -(t * z.log_softmax(1)).sum(1)
    oracle.assert_close(saved["classification"], of_view[:2] + of_view[2:], TOLERANCE, "classification")
    gradient = t.sum(1, keepdim=True) * z.softmax(1) - t
    oracle.assert_close(saved["logit_grad"][:, others], gradient, TOLERANCE, "logit_grad")
    assert saved["logits"][:, 3].isneginf().all() and not saved["logit_grad"][:, 3].any()


def test_a_cluster_is_chosen_from_what_a_sample_is():
    blocks = torch.zeros(1, dtype=torch.int64)
    for sample, expected in (
        ((512, 49, 2, 2), 2), ((512, 49, 4, 2), 4), ((2048, 49, 2, 3), 4), ((4096, 64, 4, 2), 4), ((768, 49, 2, 2), 2),
        ((256, 49, 2, 2), 1), ((2048, 49, 2, 1), 2), ((3, 1, 2, 2), 1), ((2048, 49, 4, 0), 1),
    ):  # fmt: skip
        library()("get_cluster_blocks", *sample, blocks)
        assert blocks.item() == expected, sample


def test_few_blocks_have_more_stages():
    stages = torch.zeros(1, dtype=torch.int64)
    for blocks, expected in ((1, 4), (264, 4), (265, 2)):
        library()("get_ring_stages", blocks, 132, stages)
        assert stages.item() == expected, blocks


@pytest.mark.parametrize(("storage", "views", "step"), [(0, 2, 32), (0, 1, 64), (1, 2, 64), (1, 1, 128)])
def test_the_blocks_of_a_cluster_divide_the_channels_evenly(storage, views, step):
    for bits in range(3):
        for C in (1, 3, 512, 576, 768, 2048, 2208, 4097):
            found = torch.zeros(2 << bits, dtype=torch.int64).view(-1, 2)
            for rank, row in enumerate(found):
                library()("get_channels", storage, C, views, rank, bits, row)
            first, count = found.T.tolist()
            assert first == [sum(count[:rank]) for rank in range(1 << bits)]
            assert sum(count) == -(-C // step) * step
            assert max(count) - min(count) <= step


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cluster_size_and_slabs_that_come_twice(dtype, layout):
    """One block has more slabs than stages, so that the second pass fetches them again."""
    for cluster in (1, 2, 4):
        check(Case(1, 384, 7, 7, 7, dtype, layout), cluster=cluster, detach=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clusters_that_serve_several_pairs(dtype, layout):
    """On one multiprocessor, which has room for 4 blocks: up to 11 pairs a cluster, whose blocks take turns.

    Fewer steps than stages and more; sizes with a tail.
    """
    for n, c, cluster in ((5, 40, 1), (11, 200, 2), (7, 520, 2), (3, 1088, 2)):
        case = Case(n, c, 7, 7, 7, dtype, layout, seed=c)
        for mean in (True, False):
            ups = upstreams(case, mean)
            waves, _ = forward(case, mean=mean, cluster=cluster)
            for stages, order in ((4, "forward"), (2, "reverse")):
                turns, counters = forward(
                    case, mean=mean, cluster=cluster, stages=stages, order=order, multiprocessors=1
                )
                assert counters["blocks"] <= 4 < cluster * n
                for name in (*waves.keys() - {"cam_grad"},):
                    assert torch.equal(waves[name], turns[name]), (n, c, name)
            expected = truth(case, ups, mean=mean)
            for name in ("logits", "loss", "classification", "consistency"):
                oracle.assert_close(turns[name], expected[name], TOLERANCE, name)


def test_turns_are_taken_for_classes_and_maps_of_any_size():
    for layout in LAYOUTS:
        for h, w, classes, shift in ((5, 3, 11, 0), (8, 8, 16, 0), (4, 4, 7, 1)):
            case = Case(6, 132, h, w, classes, torch.bfloat16, layout, weight_dtype=torch.float32, shift=shift)
            waves, _ = forward(case, cluster=2, transform="rot180")
            turns, counters = forward(case, cluster=2, transform="rot180", multiprocessors=1, stages=2)
            assert counters["blocks"] < 12
            assert all(torch.equal(waves[name], turns[name]) for name in waves.keys() - {"cam_grad"})


def test_more_samples_than_threads():
    """Means by the last block; dW and db by blocks that hold 256 rows of the logits at a time, or 128."""
    for mean in (True, False):
        check(Case(150, 3, 1, 1, 7, torch.float32), mean=mean, detach=False)
    check(Case(70, 3, 1, 1, 11, torch.float32), mean=False, detach=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_before_sm90(layout):
    for dtype in NAMES:
        check(Case(2, 384, 7, 7, 7, dtype, layout), sm80=True, detach=False)
        check(Case(1, 65, 5, 3, 11, dtype, layout, shift=1), sm80=True, mean=False)


def bytes_of(t: Tensor) -> int:
    return t.numel() * t.element_size()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_byte_floor(dtype, layout):
    """One launch each way; features come once and leave once, in 16-byte vectors or slabs."""
    case = Case(2, 512, 7, 7, 7, dtype, layout)
    saved, counters = forward(case, maps=False)
    assert counters["launches"] == 1
    once = {"nchw": "bulk_copies", "channels_last": "cp_async_copies"}[layout]
    for kind in ("cp_async_copies", "bulk_copies"):
        assert counters[kind] == (bytes_of(case.features) if kind == once else 0), kind
    assert (counters["mma"] > 0) == (dtype != torch.float32)
    grads, counters = backward(case, saved, upstreams(case, True))
    assert counters["launches"] == 1
    assert counters["streamed_stores"] == bytes_of(grads["d_features"])
    assert counters["cp_async_copies"] == counters["bulk_copies"] == 0


def test_residual_slabs_are_not_fetched_twice():
    """Not detached, slabs that fit into the stages serve the second pass too."""
    case = Case(1, 512, 7, 7, 7, torch.bfloat16)
    _, counters = forward(case, detach=False, cluster=2)
    assert counters["bulk_copies"] == bytes_of(case.features)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, layout):
    case, alone = Case(3, 100, 7, 7, 7, dtype, layout), Case(1, 100, 7, 7, 7, dtype, layout)
    features = case.features[[1, 4]]
    alone.features = features.contiguous(memory_format=torch.channels_last) if case.channels_last else features
    alone.weight, alone.bias, alone.labels = case.weight, case.bias, case.labels[1:2].clone()
    ups, options = upstreams(case, False), {"mean": False, "detach": False}
    ups_alone = [*(u[1:2] for u in ups[:3]), ups[3][[1, 4]]]
    (many, _), (one, _) = forward(case, **options), forward(alone, **options)
    for name in many:
        rows = [1, 4] if name in ("logits", "logit_grad", "maps", "pooled") else [1]
        assert torch.equal(many[name][rows], one[name]), name
    grads, _ = backward(case, many, ups, **options)
    grads_alone, _ = backward(alone, one, ups_alone, **options)
    assert torch.equal(grads["d_features"][[1, 4]], grads_alone["d_features"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_consistency_alone(dtype):
    case, ups = Case(2, 72, 7, 7, 7, dtype), [None, None, torch.tensor(-1.5), None]
    saved, _ = forward(case, classified=False, detach=False)
    grads, _ = backward(case, saved, ups, classified=False, detach=False, need=(True, True, False))
    expected = truth(case, ups, detach=False)
    oracle.assert_close(saved["consistency"], expected["consistency"], TOLERANCE)
    for name in ("d_features", "d_weight"):
        oracle.assert_close(grads[name], expected[name], ROUNDING[dtype], name)
    for name in ("loss", "classification", "logits", "logit_grad"):
        assert saved[name].isnan().all(), name  # untouched


@pytest.mark.parametrize("present", range(4))
def test_absent_upstreams(present):
    case = Case(2, 33, 5, 3, 7, torch.float32)
    ups = [u if k == present else None for k, u in enumerate(upstreams(case, True))]
    saved, _ = forward(case, detach=False)
    grads, _ = backward(case, saved, ups, detach=False)
    expected = truth(case, ups, detach=False)
    for name in grads:
        oracle.assert_close(grads[name], expected[name], TOLERANCE, name)


@pytest.mark.parametrize(
    "need", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
@pytest.mark.parametrize("c", [72, 33])  # the bias has a block of its own, or shares the last channels'
def test_only_what_is_wanted(need, c):
    case, detach = Case(2, c, 7, 7, 7, torch.bfloat16), c == 72
    saved, _ = forward(case, maps=False, detach=detach)
    assert saved["maps"].isnan().all()
    ups = upstreams(case, True)
    grads, _ = backward(case, saved, ups, need=need, detach=detach)
    expected = truth(case, ups, detach=detach)
    for (name, got), wanted in zip(grads.items(), need, strict=True):
        if wanted:
            oracle.assert_close(got, expected[name], ROUNDING[case.dtype], name)
        else:
            assert got.isnan().all(), name


@pytest.mark.parametrize("views", ["both", "original"])
def test_a_label_that_is_no_class(views):
    """NaN for that sample's classification, its rows of dF, the means, dW and db; the rest is right."""
    case = Case(3, 40, 5, 3, 7, torch.float32)
    right = case.labels.clone()
    for wrong in (-1, 7, 2**62):
        case.labels = right.clone()
        case.labels[1] = wrong
        ups = upstreams(case, False)
        saved, _ = forward(case, mean=False, views=views)
        grads, _ = backward(case, saved, ups, mean=False)
        case.labels = right
        expected = truth(case, ups, mean=False, views=views)
        for name in ("loss", "classification"):
            assert saved[name].isnan().tolist() == [False, True, False]
            oracle.assert_close(saved[name][[0, 2]], expected[name][[0, 2]], TOLERANCE, name)
        oracle.assert_close(saved["consistency"], expected["consistency"], TOLERANCE)
        broken = [1, 4] if views == "both" else [1]
        fine = [i for i in range(6) if i not in broken]
        assert grads["d_features"][broken].isnan().all()
        oracle.assert_close(grads["d_features"][fine], expected["d_features"][fine], TOLERANCE)
        assert grads["d_weight"].isnan().all() == grads["d_bias"].isnan().any()
        case.labels = torch.tensor([right[0], wrong, right[2]])
        saved, _ = forward(case, views=views)
        assert saved["loss"].isnan() and saved["classification"].isnan() and not saved["consistency"].isnan()
        only_consistency, _ = backward(case, saved, [None, None, torch.tensor(1.0), None])
        assert not any(g.isnan().any() for g in only_consistency.values())


def test_an_empty_batch_has_zero_gradients():
    case = Case(0, 40, 5, 3, 7, torch.float32)
    saved = {name: torch.empty(0) for name in ("map_grad", "logit_grad", "pooled", "cam_grad")}
    grads, _ = backward(case, saved, [torch.ones(()), None, None, None], mean=False, detach=False)
    assert not grads["d_weight"].any() and not grads["d_bias"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_class_activation_maps(dtype, layout):
    for n, c, h, w, classes in ((1, 100, 7, 7, 7), (2, 256, 5, 3, 11), (1, 3, 1, 1, 2)):
        case = Case(n, c, h, w, classes, dtype, layout)
        m, g = 2 * n - (n == 2), torch.Generator().manual_seed(4)  # an odd number of views too
        maps, is_float = nans(m, classes, h, w), int(dtype == torch.float32)
        none = (None,) * 4
        start = (*case.geometry(views=1, n=m), case.features, case.weight, is_float, None, *none)
        options = (0.0, 2, 1, case.cluster(False), 2 * n, 132, *(None,) * 6)
        library()("run_forward", *start, *options, maps, *none)
        in_turns = nans(m, classes, h, w)
        on_one = (0.0, 2, 1, min(2, case.cluster(False)), 2 * n, 1, *(None,) * 6)
        library()("run_forward", *start, *on_one, in_turns, *none)
        oracle.assert_close(in_turns, maps.double(), TOLERANCE)
        flat, weight = case.features[:m].double().reshape(m, c, h * w), case.weight.double()
        oracle.assert_close(maps, (weight @ flat).reshape(maps.shape), TOLERANCE)

        d_maps = torch.randn(maps.shape, generator=g)
        cam_grad, d_features, d_weight = nans(m, classes, c), case.feature_output(m), nans(classes, c, dtype=dtype)
        *sizes, _, channels_last, _ = case.geometry(views=1, n=m)
        of = (*sizes, channels_last, case.features, d_maps)
        for blocks, stages in ((1, 2), (4, 4), (2, 2)):  # no sum is over channels: the same bits
            before = cam_grad.clone()
            library()("run_cam_weight", *of, cam_grad, blocks, stages)
            assert blocks == 1 or torch.equal(cam_grad, before)
        library()(
            "run_backward", *case.geometry(views=1, n=m), *(None, 0) * 3, None, case.weight, is_float, d_maps, None,
            None, cam_grad, 0.0, 1.0, d_features, d_weight, None,
        )  # fmt: skip
        flat_d = d_maps.double().reshape(m, classes, h * w)
        oracle.assert_close(cam_grad, flat_d @ flat.transpose(1, 2), TOLERANCE)
        oracle.assert_close(d_features, (weight.T @ flat_d).reshape(d_features.shape), ROUNDING[dtype])
        oracle.assert_close(d_weight, (flat_d @ flat.transpose(1, 2)).sum(0), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(dtype, soft):
    for m, classes in ((1, 2), (300, 7), (5, 100)):
        g = torch.Generator().manual_seed(m)
        logits = (3 * torch.randn(m, classes, generator=g)).to(dtype)
        labels = torch.randint(0, classes, (m + 1,), generator=g)[1:]
        targets = torch.rand(m, classes, generator=g) if soft else labels
        table = torch.rand(classes, classes, generator=g)
        row = targets.double() @ table.double() if soft else table.double()[labels]
        soft_max = logits.double().softmax(1)
        each = -(row * soft_max.log()).sum(1)
        given = (None, targets) if soft else (targets, None)
        start = (STORAGE[dtype], m, classes, logits, *given, table)
        for mean in (True, False):
            loss, ticket = nans(*(() if mean else (m,))), torch.zeros(1, dtype=torch.int32)
            room = (nans(m), ticket) if mean else (None, None)
            library()("run_cross_entropy", *start, loss, *room, None, 0, 1.0, None)
            oracle.assert_close(loss, each.mean() if mean else each, TOLERANCE)
            assert ticket.item() == 0
            up = torch.randn(() if mean else (2 * m,), generator=g)
            d_loss, stride = (up, 0) if mean else (up[::2], 2)
            d_logits, share = nans(m, classes, dtype=dtype), 1 / m if mean else 1.0
            library()("run_cross_entropy", *start, None, None, None, d_loss, stride, share, d_logits)
            truth = d_loss.double().reshape(-1, 1) * share * (row.sum(1, keepdim=True) * soft_max - row)
            oracle.assert_close(d_logits, truth, ROUNDING[dtype])
