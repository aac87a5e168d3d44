"""What the CUDA backend answers to requests of GPU tensors, on a machine without one."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rebalfer_kernels as rk
from rebalfer_kernels import dispatch, native
from rebalfer_kernels.backend import AVAILABLE, BACKENDS, Request

NCHW = Request("head", "cuda", 0, torch.bfloat16, torch.float32, "nchw", classes=7, positions=49, elements=512 * 49)


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU whose kernels load; gpu["capability"] and gpu["triton"] can be changed."""
    answers = {"capability": (9, 0), "triton": AVAILABLE}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: answers["capability"])
    monkeypatch.setattr(native, "load", lambda part: (True, "available"))
    monkeypatch.setattr(BACKENDS["triton"], "answer", lambda request: answers["triton"])
    return answers


def chosen(request, backend=None):
    name, error = dispatch._choose_cached.__wrapped__(request, backend, "backend")
    return error or name


@pytest.mark.parametrize("layout", ["nchw", "strided", "channels_last"])
def test_cuda_comes_before_triton(gpu, layout, monkeypatch):
    request = NCHW._replace(layout=layout)
    assert chosen(request) == chosen(request, "cuda") == "cuda" and chosen(request, "triton") == "triton"
    monkeypatch.setattr(native, "load", lambda part: (False, "not built"))
    assert chosen(request) == "triton"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"device": "cpu"}, "serves cuda tensors, got cpu"),
        ({"dtype": torch.float64}, "serves no float64"),
        ({"classes": 17}, "serves at most 16 classes, got 17"),
        ({"positions": 65}, "serves at most 64 positions, got 65"),
        ({"positions": 65, "exact": False}, "serves at most 64 positions, got more"),
        ({"context": "torch.func transforms"}, "the fused backends do not serve torch.func transforms"),
    ],
)
def test_reasons(gpu, change, reason):
    assert reason in chosen(NCHW._replace(**change), "cuda")
    assert chosen(NCHW._replace(**change)) != "cuda"


def test_bounds_are_served_and_a_cross_entropy_has_none(gpu):
    assert chosen(NCHW._replace(classes=16, positions=64)) == "cuda"
    assert chosen(dispatch.request_of_rows(torch.empty(2, 1000))._replace(device="cuda")) == "cuda"


def test_old_gpus_are_refused(gpu):
    gpu["capability"] = (7, 5)
    assert "needs compute capability 8.0, got 7.5" in chosen(NCHW, "cuda")


def test_the_bounds_are_those_of_the_kernels():
    text = (native.SOURCES / "cuda/kernels.cuh").read_text()
    bounds = re.search(r"kMaxClasses = (\d+), kMaxPositions = (\d+);", text)
    assert tuple(BACKENDS["cuda"].limits.values()) == tuple(map(int, bounds.groups()))


def test_explain_knows_the_default_backend(monkeypatch):
    features, weight = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3)
    monkeypatch.setenv("REBALFER_BACKEND", "reference")
    found = rk.explain(features, weight)
    assert (found.backend, found.passed_over, found.because) == ("reference", {}, "")


def test_the_reference_serves_meta_tensors():
    features, weight, y = (torch.zeros(s, device="meta") for s in ((2, 3, 2, 2), (2, 3), (1, 2)))
    out = rk.rebalanced_head_loss(features, weight, None, y, target_table=weight[:, :2], map_weights=weight[:, 0])
    assert out.loss.device.type == "meta" and out.logits.shape == (2, 2)


def test_the_reference_computes_soft_targets_in_float32_under_autocast():
    z, soft, table = torch.randn(50, 7), torch.rand(50, 7), torch.rand(7, 7)
    expected = rk.reference.rebalanced_cross_entropy(z.double(), soft.double(), table.double())
    with torch.autocast("cpu", torch.bfloat16):
        got = rk.rebalanced_cross_entropy(z, soft, table, backend="reference")
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=0)


def test_explain_says_why(gpu):
    with FakeTensorMode():  # tensors of a GPU that this machine may lack
        features, weight = torch.empty(4, 512, 7, 7, device="cuda"), torch.empty(7, 512, device="cuda")
        dispatch._choose_cached.cache_clear()
        for of_layout in (features, features.to(memory_format=torch.channels_last)):
            lines = str(rk.explain(of_layout, weight)).splitlines()
            assert lines[:2] == [
                "backend      cuda",
                "because      the least time of the host, and one launch each way",
            ]
        lines = str(rk.explain(torch.empty(4, 512, 14, 14, device="cuda"), weight)).splitlines()
        assert lines[:2] == ["backend      triton", "passed over  cuda: serves at most 64 positions, got 196"]
    dispatch._choose_cached.cache_clear()
