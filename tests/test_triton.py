"""The Triton backend's own: where it serves, what it launches, its tiles, and what Triton's interpreter gets wrong."""

import math

import pytest
import torch
from support import child
from support.agreement import check, check_labels_out_of_range, run
from support.backends import BACKENDS, INTERPRETED
from support.cases import case

import rebalfer_kernels as rk
from rebalfer_kernels.transforms import TWIN_MAPS
from rebalfer_kernels.triton.tiles import Problem, policy

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

TRITON = [b for b in BACKENDS if b.values[0].name == "triton"]
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="of Triton's interpreter (TRITON_INTERPRET=1)")


def python(code: str, **environment: str) -> str:
    done = child.run("-c", code, **{"TRITON_INTERPRET": None} | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_import_leaves_the_kernels_alone():
    """PyTorch itself may import Triton."""
    assert python("import sys, rebalfer_kernels; print('rebalfer_kernels.triton' in sys.modules)") == "False"


def test_without_triton_there_is_a_reason():
    code = "import sys; sys.modules['triton'] = None\nimport rebalfer_kernels as rk; print(rk.backends()['triton'])"
    assert python(code, TRITON_INTERPRET="1").startswith("Triton is not installed")


@in_interpreter
def test_the_interpreter_serves_only_when_asked():
    features, weight, bias, targets, table, v = case(2, 6, 3, 3, 3, torch.float32)
    assert rk.explain(features, weight).backend in ("cpu", "reference")
    assert "asked for by name" in rk.explain(features, weight).passed_over["triton"]
    assert rk.explain(features, weight, backend="triton").backend == "triton"
    with pytest.raises(RuntimeError, match="'triton' cannot serve this call: serves no float64"):
        rk.class_activation_maps(features.double(), weight.double(), backend="triton")
    with pytest.raises(RuntimeError, match="got meta"):
        rk.class_activation_maps(features.to("meta"), weight.to("meta"), backend="triton")


AGREEMENT = {
    "one tile": (
        (3, 70, 5, 3, 7, torch.bfloat16, "channels_last"),
        dict(weight_dtype=torch.float32),
        dict(mean=True, p=1, detach_cam_weight=False, slack=4),
    ),
    "float32, nchw": (
        (2, 33, 4, 4, 9, torch.float32, "nchw"),
        dict(soft=True),
        dict(mean=False, transform="rot90", views="original", detach_cam_weight=False),
    ),
    # U outweighs the logits' part of dF here, so that its digits count.
    "several tiles": (
        (2, 20, 8, 9, 40, torch.float16, "channels_last"),
        {},
        dict(mean=True, consistency_weight=3000.0),
    ),
}


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("name", AGREEMENT)
def test_agreement(backend, name):
    """One case of each kind, for the injected faults of tests/mutants."""
    shape, of_case, options = AGREEMENT[name]
    check(backend, case(*shape, **of_case, device=backend.device), **options)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_batch_of_several_chunks(backend, layout, monkeypatch):
    """More samples than one program sums over."""
    from rebalfer_kernels.triton import host

    monkeypatch.setattr(host, "_CHUNK", 2)
    monkeypatch.setattr(host, "_CHUNKS", 3)
    check(backend, case(5, 5, 2, 2, 3, torch.float32, layout, device=backend.device), mean=True)
    soft = case(10, 3, 2, 2, 3, torch.bfloat16, layout, device=backend.device, soft=True)
    check(backend, soft, mean=False, detach_cam_weight=False)
    features, weight, *_ = case(5, 5, 2, 2, 3, torch.float32, layout, device=backend.device)
    w = weight.requires_grad_()
    maps = rk.class_activation_maps(features, w, backend=backend.name)
    (got,) = torch.autograd.grad(maps, w, maps.detach())
    torch.testing.assert_close(got, torch.einsum("mlhw,mchw->lc", maps.detach(), features), rtol=1e-5, atol=1e-4)


@in_interpreter
@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
@pytest.mark.parametrize(("classes", "dtype"), [(7, torch.bfloat16), (20, torch.float16), (7, torch.float32)])
def test_tiles_of_other_gpus(arch, classes, dtype, monkeypatch):
    from rebalfer_kernels.triton import host

    monkeypatch.setattr(host, "arch", lambda index: arch)
    data = case(2, 70, 7, 7, classes, dtype, "channels_last")
    check(TRITON[0].values[0], data, mean=True, detach_cam_weight=False)


def test_tiles():
    for channels in (1, 100, 512, 2048):
        for pixels in (1, 16, 49, 196, 3136):
            for classes in (2, 7, 8, 9, 16, 100, 1000):
                for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
                    for dtype in (torch.float32, torch.bfloat16):
                        cut = policy(Problem(channels, pixels, classes, True, dtype, arch))
                        assert cut.forward.rows >= pixels or not cut.one_tile
                        assert cut.forward.classes >= classes or not cut.one_tile
                        assert cut.all_classes >= classes
                        for tiles in cut[1:4]:
                            assert all(x & (x - 1) == 0 for x in tiles[:4])
                            assert 16 <= tiles.rows <= 256 and tiles.channels >= 16 and tiles.classes >= 8
                            assert tiles.rows * tiles.channels <= 2**14
    assert policy(Problem(512, 49, 7, True, torch.bfloat16, "sm_90")).one_tile
    assert not policy(Problem(512, 49, 100, True, torch.bfloat16, "sm_90")).one_tile


@pytest.mark.parametrize("backend", TRITON)
def test_views_agree(backend):
    """With the reference, for the injected faults; test_views.py compares every option with the float64 truth."""
    images = torch.randint(0, 256, (3, 9, 7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    augment = rk.Augment(crop_scale=(0.5, 1.0), flip=0.5, noise=0.1, erase_probability=0.5)
    options = dict(out_size=6, mean=0.5, std=0.25, seed=1, epoch=2, augment=augment, transform="rot90")
    at = torch.tensor([2, 0])
    expected = rk.paired_views(images, at, backend="reference", **options)
    moved = images.to(backend.device), at.to(backend.device)
    torch.testing.assert_close(rk.paired_views(*moved, backend=backend.name, **options).cpu(), expected)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The kernels that are launched on tensors without memory, by name."""
    from rebalfer_kernels.triton import host

    names: list[str] = []
    monkeypatch.setattr(host, "arch", lambda index: "sm_90")
    monkeypatch.setattr(host, "_launch", lambda kernel, *_, **__: names.append(kernel.__name__.removesuffix("_kernel")))
    return names


@pytest.mark.parametrize(("n", "sum_of_chunks"), [(2, []), (129, ["sum_chunks"])])
@pytest.mark.parametrize(
    ("classes", "mean", "cam_grad", "forward"),
    [
        (7, True, False, ["head_forward", "mean"]),
        (7, False, False, ["head_forward"]),
        (7, False, True, ["head_forward", "cam_grad"]),
        (100, True, False, ["maps", "head_finish", "mean"]),
    ],
)
def test_launches(n, sum_of_chunks, classes, mean, cam_grad, forward, launched):
    from rebalfer_kernels.triton import host

    f, w = torch.empty(2 * n, 16, 7, 7, device="meta"), torch.empty(classes, 16, device="meta")
    y, table = torch.empty(n, device="meta", dtype=torch.int64), torch.empty(classes, classes, device="meta")
    v, one = w[:, 0].contiguous(), torch.empty((), device="meta")
    options = (2.0, 2, TWIN_MAPS["hflip"], True, mean)
    *_, saved = host.head_forward(f, w, None, y, table, v, *options, False, True, True, cam_grad)
    flags = (n, 7, 7, True, True, cam_grad, 2.0, TWIN_MAPS["hflip"], mean, f.dtype, False, True, True, True)
    host.head_backward(one, None, None, None, w, saved, *flags)
    assert launched == [*forward, "head_backward", *sum_of_chunks]


@in_interpreter
def test_labels_out_of_range_are_nan_in_the_kernels(monkeypatch):
    """What a GPU does; on a CPU an IndexError comes first."""
    from rebalfer_kernels.triton import host

    monkeypatch.setattr(host, "_check_labels", lambda targets, classes: None)
    check_labels_out_of_range(TRITON[0].values[0], "cpu")


@pytest.mark.parametrize("backend", TRITON)
def test_a_zero_target_takes_no_part(backend):
    """Classes whose bias is -inf, targets without smoothing: what PyTorch's cross-entropy gives."""
    features, weight, bias, targets, table, v = case(4, 6, 3, 3, 5, torch.float32, device=backend.device)
    targets, table = targets % 3, torch.eye(5, device=backend.device)
    bias[3:] = -math.inf
    for of_target in (targets, table[targets]):
        got = run(backend.name, (features, weight, bias, of_target, table, v), views="original", consistency_weight=0.0)
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(features[:4].mean((2, 3)) @ w.T + b, targets)
        expected = dict(zip(("loss", "d_weight", "d_bias"), (loss, *torch.autograd.grad(loss, (w, b))), strict=True))
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
        assert got["d_features"].isfinite().all()
        logits = got["logits"].clone().requires_grad_()
        mine = rk.rebalanced_cross_entropy(logits[:4], of_target, target_table=table, backend=backend.name)
        theirs = torch.nn.functional.cross_entropy(logits[:4], targets)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (mine, theirs)))


@triton.jit
def product_kernel(a, b, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def rounding_kernel(a, out):
    at = tl.arange(0, 256)
    tl.store(out + at, tl.load(a + at).to(tl.bfloat16))


@in_interpreter
def test_the_interpreter_still_gets_bfloat16_wrong():
    """When this fails, Triton has mended it: drop _UPCAST from triton/common.py where no supported Triton needs it."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 16, generator=g), torch.randn(16, 16, generator=g)
    product, rounded = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](a.bfloat16(), b.bfloat16(), product)
    rounding_kernel[(1,)](a, rounded)
    assert not torch.allclose(product, a.bfloat16().float() @ b.bfloat16().float(), rtol=1e-2)
    assert not torch.equal(rounded, a.bfloat16())
