"""Where only the reference can serve: torch.export, the ONNX exporters, tracing, and forward-mode differentiation."""

import numpy as np
import pytest
import torch
from torch import nn

import rebalfer_kernels as rk


class Classifier(nn.Module):
    def __init__(self, backend=None):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, padding=1)
        self.head = rk.RebalancedHead(8, 3, [90, 40, 5], backend=backend)

    def forward(self, images):
        features = self.backbone(images)
        return self.head(features), self.head.maps(features)


class Training(Classifier):
    def forward(self, images, targets):
        return self.head(self.backbone(torch.cat([images, images.flip(-1)])), targets)[:4]


IMAGES, TARGETS = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0])
CASES = [(Classifier(), (IMAGES,)), (Training(), (IMAGES, TARGETS))]


@pytest.mark.parametrize(("model", "inputs"), CASES, ids=["classifier", "training"])
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(model, inputs, strict):
    """To PyTorch's own operators, so that a program needs nothing of this library."""
    program = torch.export.export(model, inputs, strict=strict)
    assert "rebalfer_kernels" not in {getattr(node.target, "namespace", "") for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.parametrize(("model", "inputs"), CASES, ids=["classifier", "training"])
def test_torchscript_tracing(model, inputs):
    traced = torch.jit.trace(model, inputs, check_trace=False)
    assert "rebalfer_kernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*inputs), tuple(model(*inputs)))


@pytest.mark.parametrize(("model", "inputs"), CASES, ids=["classifier", "training"])
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx(model, inputs, dynamo, tmp_path):
    """By both exporters; the values are those of another runtime."""
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="running an ONNX model needs onnxruntime")
    file = tmp_path / "model.onnx"
    torch.onnx.export(model.eval(), inputs, file, dynamo=dynamo)
    session = runtime.InferenceSession(file)
    got = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})
    for value, expected in zip(got, model(*inputs), strict=True):
        np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(rk.backends()["cpu"] != "available", reason=rk.backends()["cpu"])
def test_a_backend_that_is_named_is_exported():
    program = torch.export.export(Classifier("cpu"), (IMAGES,))
    assert "rebalfer_kernels" in {getattr(node.target, "namespace", "") for node in program.graph.nodes}


def test_explain_knows_what_only_the_reference_serves():
    features, weight = torch.randn(4, 8, 3, 3), torch.randn(3, 8)
    direction = torch.randn(4, 8, 3, 3)
    v = torch.ones(3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(features, direction)
        explanation = rk.explain(dual, weight)
        value = rk.attention_consistency(dual, weight, v)
        tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
    assert explanation.backend == "reference"
    assert "forward-mode differentiation" in explanation.passed_over["cpu"]
    leaf = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rk.attention_consistency(leaf, weight, v), leaf)
    torch.testing.assert_close(tangent.float(), (gradient * direction).sum(), rtol=1e-5, atol=1e-6)

    class Explained(nn.Module):
        def forward(self, features):
            self.explanation = rk.explain(features, weight)
            return rk.attention_consistency(features, weight, v)

    model = Explained()
    torch.jit.trace(model, features, check_trace=False)
    assert model.explanation.backend == "reference"
    assert "export" in model.explanation.passed_over["cpu"]
