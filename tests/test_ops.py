"""Every operator as PyTorch checks operators, and every public function compiled: one registry of each."""

import inspect

import pytest
import torch
from support import child
from support.backends import BACKENDS, FUSED
from support.cases import case
from torch.fx.experimental.proxy_tensor import make_fx

import rebalfer_kernels as rk
from rebalfer_kernels import ops
from rebalfer_kernels.backend import BACKENDS as OF_PACKAGE
from rebalfer_kernels.transforms import TWIN_MAPS


def moved(arguments, backend):
    return tuple(x.to(backend.device) if isinstance(x, torch.Tensor) else x for x in arguments)


def head_forward(dtype, layout, *, soft=False, mean=True, cam_grad=False, alone=False, **_):
    features, weight, bias, targets, table, v = case(2, 20, 5, 3, 4, dtype, layout, soft=soft)
    compute = rk.reference.compute_dtype(dtype)
    classified = (None, None, None) if alone else (bias, targets.to(compute) if soft else targets, table.to(compute))
    return (
        features, weight, *classified, v.to(compute), 2.0, 1 if cam_grad else 2, TWIN_MAPS["hflip"], not soft,
        mean, cam_grad, True, not alone, cam_grad,
    )  # fmt: skip


def head_backward(dtype, layout, *, backend, soft=False, mean=True, cam_grad=False, alone=False):
    """Of what the backend's own forward saves."""
    arguments = head_forward(dtype, layout, soft=soft, mean=mean, cam_grad=cam_grad, alone=alone)
    weight, lam, twin, mean = (arguments[i] for i in (1, 6, 8, 10))
    outputs = ops.OPERATORS[backend.name]["head_forward"](*moved(arguments, backend))
    loss, classification, consistency, logits, _, saved = outputs
    upstream = (None, None, torch.rand_like(consistency), None) if alone else tuple(
        torch.rand_like(x) for x in (loss, classification, consistency, logits)
    )  # fmt: skip
    return (
        *upstream, weight, saved, 2, 5, 3, not alone, not alone, cam_grad, lam, twin, mean, dtype,
        layout == "channels_last", True, not alone, not alone and not soft,
    )  # fmt: skip


def cam_forward(dtype, layout, **_):
    return case(2, 20, 5, 3, 4, dtype, layout)[:2]


def cam_backward(dtype, layout, *, cam_grad=False, soft=False, **_):
    features, weight = cam_forward(dtype, layout)
    d_maps = torch.rand(4, 4, 5, 3, dtype=rk.reference.compute_dtype(dtype))
    return d_maps, features, weight, dtype, layout == "channels_last", not soft, cam_grad


def cross_entropy_forward(dtype, layout, *, soft=False, mean=True, **_):
    _, weight, _, targets, table, _ = case(4, 4, 1, 1, 4, dtype, soft=soft)
    compute = rk.reference.compute_dtype(dtype)
    return weight, targets.to(compute) if soft else targets, table.to(compute), mean


def cross_entropy_backward(dtype, layout, *, soft=False, mean=True, **_):
    logits, targets, table, mean = cross_entropy_forward(dtype, layout, soft=soft, mean=mean)
    d_loss = torch.rand(() if mean else (len(logits),), dtype=rk.reference.compute_dtype(dtype))
    return d_loss, logits, targets, table, mean


def paired_views(dtype, layout, *, soft=False, mean=True, **_):
    images = torch.randint(0, 256, (3, 5, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    augment = rk.Augment(crop_scale=(0.5, 1.0), flip=0.5, noise=0.1, erase_probability=0.5)
    plan = rk.reference.view_plan(augment, (5, 4, 3), (6, 4), (0.5,), (0.25,))
    epoch = (torch.tensor(3), 0) if soft else (None, 3)
    of_views = dtype if dtype != torch.float64 else torch.float16
    return (
        images,
        torch.tensor([2, 0]),
        torch.tensor([7, 1]),
        *epoch,
        5,
        *plan,
        TWIN_MAPS["hflip"],
        mean,
        of_views,
    )


#: operator -> its arguments, on detached tensors
SAMPLES = {
    "head_forward": head_forward,
    "head_backward": head_backward,
    "cam_forward": cam_forward,
    "paired_views": paired_views,
    "cam_backward": cam_backward,
    "cross_entropy_forward": cross_entropy_forward,
    "cross_entropy_backward": cross_entropy_backward,
}
VARIANTS = [{}, {"soft": True, "mean": False}, {"cam_grad": True, "mean": False}, {"alone": True}]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(backend, name, variant):
    """Schema (nothing mutated or aliased), fakes (shapes, dtypes and strides of every output), dynamic shapes."""
    if name == "paired_views" and "views" in OF_PACKAGE[backend.name].lacks:
        pytest.skip(f"{backend.name} has no kernel for views")
    for dtype in backend.dtypes[:2]:
        for layout in ("nchw", "channels_last"):
            arguments = SAMPLES[name](dtype, layout, backend=backend, **variant)
            torch.library.opcheck(ops.OPERATORS[backend.name][name], moved(arguments, backend))


@pytest.mark.parametrize("backend", FUSED)
def test_what_is_saved_has_its_size(backend):
    """Else the backward would read behind it."""
    arguments = list(moved(head_backward(torch.float32, "nchw", backend=backend), backend))
    arguments[5] = arguments[5][1:]
    with pytest.raises(RuntimeError, match="saved: got|split_with_sizes"):
        ops.OPERATORS[backend.name]["head_backward"](*arguments)


def test_every_operator_has_a_sample():
    assert all(set(operators) == set(SAMPLES) for operators in ops.OPERATORS.values())


def _class_activation_maps(backend, f, w, b, y, table, v):
    return rk.class_activation_maps(f, w, backend=backend)


def _attention_consistency(backend, f, w, b, y, table, v):
    return rk.attention_consistency(f, w, v, detach_cam_weight=False, backend=backend)


def _rebalanced_cross_entropy(backend, f, w, b, y, table, v):
    logits = torch.nn.functional.linear(f.mean((2, 3)), w, b)
    return rk.rebalanced_cross_entropy(logits, torch.cat([y, y]), table, backend=backend)


def _rebalanced_head_loss(backend, f, w, b, y, table, v):
    return rk.rebalanced_head_loss(f, w, b, y, target_table=table, map_weights=v, backend=backend).loss


MODULES = {name: rk.RebalancedHead(6, 3, [9, 5, 2], backend=name) for name in rk.backends()}


def _rebalanced_head(backend, f, w, b, y, table, v):
    return torch.func.functional_call(MODULES[backend], {"weight": w, "bias": b}, (f, y)).loss


#: public name -> one call of it, to be compiled
CALLS = {
    "RebalancedHead": _rebalanced_head,
    "class_activation_maps": _class_activation_maps,
    "attention_consistency": _attention_consistency,
    "rebalanced_cross_entropy": _rebalanced_cross_entropy,
    "rebalanced_head_loss": _rebalanced_head_loss,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_fullgraph_and_the_batch_recompiles_once_at_most(backend, name):
    torch._dynamo.reset()
    MODULES[backend.name].to(backend.device)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for n in (2, 3, 5, 8, 13):
        features, weight, bias, targets, table, v = case(n, 6, 3, 3, 3, torch.float32, seed=n, device=backend.device)
        results = []
        with torch._dynamo.config.patch(error_on_recompile=n > 3):
            for call in (compiled, CALLS[name]):
                f, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
                out = call(backend.name, f, w, bias, targets, table, v)
                grads = torch.autograd.grad(out, (f, w), torch.ones_like(out), allow_unused=True)
                results.append((out, *grads))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_that_is_traced_below_python_has_the_operators(pre_dispatch, autograd):
    features, *rest = case(2, 6, 3, 3, 3, torch.float32)
    features.requires_grad_()
    graph = make_fx(lambda x: _rebalanced_head_loss("cpu", x, *rest), pre_dispatch=pre_dispatch)(features)
    called = [node.target for node in graph.graph.nodes if "rebalfer" in str(node.target)]
    assert called == [ops.OPERATORS["cpu"]["head_forward"]]
    other = features.detach() * 2
    torch.testing.assert_close(graph(other), _rebalanced_head_loss("cpu", other, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_fullgraph_where_every_size_changes(backend, name, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, side, classes in ((2, 3, 3), (3, 4, 3), (3, 2, 3), (4, 3, 5)):
        if name == "RebalancedHead" and classes != 3:
            continue
        MODULES[backend.name].to(backend.device)
        data = case(n, 6, side, side, classes, torch.float32, seed=n, device=backend.device)
        torch.testing.assert_close(compiled(backend.name, *data), CALLS[name](backend.name, *data))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("marked", [False, True])
def test_multi_scale_training_compiles_two_graphs_at_most(backend, name, marked):
    """A map of a new size each step; one graph where the sizes were marked as dynamic."""
    torch._dynamo.reset()
    MODULES[backend.name].to(backend.device)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for step, side in enumerate(side for side in range(3, 13) if backend.reaches(3, side * (side + 1))):
        data = case(2, 6, side, side + 1, 3, torch.float32, seed=side, device=backend.device)
        if marked:
            torch._dynamo.mark_dynamic(data[0], (2, 3))
        data[0].requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=step > (0 if marked else 1)):
            results = [call(backend.name, *data) for call in (compiled, CALLS[name])]
        gradients = [torch.autograd.grad(x, data[0], torch.ones_like(x)) for x in results]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", CALLS)
def test_a_batch_whose_size_only_the_data_decide_is_compiled(backend, layout, name):
    """``x[mask]`` inside the compiled step, as where samples are left out of the loss."""
    torch._dynamo.reset()
    MODULES[backend.name].to(backend.device)

    def step(f, w, b, y, table, v, kept):
        return CALLS[name](backend.name, f[torch.cat([kept, kept])], w, b, y[kept], table, v)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for kept in ([True, False, True, False, True], [False, True, True, True, True]):
            mask = torch.tensor(kept, device=backend.device)
            data = case(5, 6, 3, 4, 3, torch.float32, layout, device=backend.device)
            data[0].requires_grad_()
            results = [call(*data, mask) for call in (compiled, step)]
            gradients = [torch.autograd.grad(x, data[0], torch.ones_like(x)) for x in results]
            torch.testing.assert_close(*results)
            torch.testing.assert_close(*gradients)


def test_sizes_that_are_known_are_checked_in_a_compiled_call():
    features, weight, bias, targets, table, v = case(3, 6, 3, 3, 3, torch.float32)
    compiled = torch.compile(CALLS["rebalanced_head_loss"], backend="eager")
    with pytest.raises(ValueError, match="features: got a batch of 5, expected an even one"):
        compiled("reference", features[:5], weight, bias, targets, table, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lambda_that_changes_is_compiled_once_more_at_most(backend):
    torch._dynamo.reset()
    features, weight, bias, targets, table, v = case(3, 6, 3, 3, 3, torch.float32, device=backend.device)

    def call(f, lam):
        return rk.rebalanced_head_loss(
            f, weight, bias, targets, target_table=table, map_weights=v, consistency_weight=lam, backend=backend.name
        ).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for i in range(12):
        results = []
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            for function in (compiled, call):
                f = features.clone().requires_grad_()
                loss = function(f, 1 + i / 4)
                results.append((loss, *torch.autograd.grad(loss, f)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_torch_func_is_served_by_the_reference_compiled_or_not():
    """Per-sample gradients to features of several pairs with classes of their own."""
    torch._dynamo.reset()
    features, weight, bias, targets, table, v = case(8, 6, 3, 3, 3, torch.float32)
    pairs = torch.stack([torch.stack([features[i], features[8 + i]]) for i in range(8)])

    def loss(pair, y):
        return rk.rebalanced_head_loss(pair, weight, bias, y[None], target_table=table, map_weights=v).loss

    one_by_one = []
    for pair, y in zip(pairs, targets, strict=True):
        leaf = pair.clone().requires_grad_()
        one_by_one += torch.autograd.grad(loss(leaf, y), leaf)
    per_sample = torch.func.vmap(torch.func.grad(loss))
    for call in (per_sample, torch.compile(per_sample, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(call(pairs, targets), torch.stack(one_by_one))


def test_everything_public_that_takes_a_backend_is_compiled():
    public = {name: getattr(rk, name) for name in rk.__all__ if callable(getattr(rk, name))}
    served = {name for name, f in public.items() if "backend" in inspect.signature(f).parameters}
    assert served == {*CALLS, "explain", "paired_views"}  # the last, of images, by test_views.py


RELOAD = """
import importlib, torch, rebalfer_kernels as rk

def results():
    torch.manual_seed(0)
    features, weight = torch.randn(4, 6, 3, 3, requires_grad=True), torch.randn(3, 6)
    loss = rk.attention_consistency(features, weight, torch.ones(3))
    return rk.class_activation_maps(features, weight), loss, *torch.autograd.grad(loss, features)

expected = results()
for name in ("ops", "backend", "dispatch", "signatures", "functional", "explanation", "modules"):
    importlib.reload(importlib.import_module(f"rebalfer_kernels.{name}"))
importlib.reload(rk)
assert all(map(torch.equal, results(), expected))
"""


def test_a_reload_finds_the_operators_defined():
    """As a notebook's autoreload does. In a process of its own: elsewhere, classes would be there twice."""
    reloaded = child.run("-c", RELOAD)
    assert reloaded.returncode == 0, reloaded.stderr
