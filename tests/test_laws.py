"""Random configurations against the float64 truth, and laws the head obeys whatever the numbers."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from support.agreement import check
from support.backends import BACKENDS
from support.cases import case

import rebalfer_kernels as rk

SQUARE = ("rot90", "rot270", "transpose")


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_random_configurations(backend, data):
    draw = data.draw
    transform = draw(st.sampled_from(sorted(rk.reference.TRANSFORMS)), label="transform")
    height = draw(st.integers(1, 9), label="H")
    width = height if transform in SQUARE else draw(st.integers(1, 9), label="W")
    classes = draw(st.integers(2, 18), label="L")
    assume(backend.reaches(classes, height * width))
    arguments = case(
        draw(st.integers(1, 4), label="N"),
        draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 129, 513])), label="C"),
        height,
        width,
        classes,
        draw(st.sampled_from(backend.dtypes), label="dtype"),
        draw(st.sampled_from(["nchw", "channels_last", "slice"]), label="layout"),
        draw(st.integers(0, 2**31), label="seed"),
        draw(st.booleans(), label="soft"),
        device=backend.device,
    )
    check(
        backend,
        arguments,
        mean=draw(st.booleans(), label="mean"),
        slack=4,  # a few numbers may cancel or round together; PyTorch's own gradients are rounded two or three times
        transform=transform,
        p=draw(st.sampled_from([1, 2]), label="p"),
        views=draw(st.sampled_from(["both", "original"]), label="views"),
        detach_cam_weight=draw(st.booleans(), label="detach"),
        consistency_weight=draw(st.sampled_from([0.0, 0.3, 2.0]), label="lambda"),
    )


def assert_same(backend, got, expected):
    torch.testing.assert_close(got, expected, rtol=backend.rtol, atol=backend.rtol)


def loss(backend, data, **options):
    features, weight, bias, targets, table, v = data
    options = {"target_table": table, "map_weights": v, "backend": backend.name, "reduction": "none"} | options
    return rk.rebalanced_head_loss(features, weight, bias, targets, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", ["hflip", "vflip", "rot180", "identity", "transpose"])
def test_swapping_the_views_of_an_involution_changes_nothing(backend, transform):
    data = case(3, 20, 6, 6, 5, backend.widest, device=backend.device)
    swapped = (torch.cat(data[0].chunk(2)[::-1]), *data[1:])
    one, two = loss(backend, data, transform=transform), loss(backend, swapped, transform=transform)
    assert_same(backend, one.loss, two.loss)
    assert_same(backend, one.consistency, two.consistency)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", sorted(rk.reference.TRANSFORMS))
def test_maps_that_agree_have_no_consistency_loss(backend, transform):
    """Features of the twin that are those of the image, transformed, as an equivariant backbone would give."""
    data = case(2, 20, 5, 5, 4, backend.widest, device=backend.device)
    original = data[0][:2]
    twin = rk.reference.TRANSFORMS[transform][0](original)
    agreeing = loss(backend, (torch.cat([original, twin]), *data[1:]), transform=transform)
    assert agreeing.consistency.abs().max() < (1e-25 if backend.widest == torch.float64 else 1e-10)
    assert loss(backend, data, transform=transform).consistency.min() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [1, 2])
def test_consistency_is_homogeneous_and_classes_may_be_permuted(backend, p):
    data = case(3, 20, 7, 7, 6, backend.widest, device=backend.device)
    features, weight, bias, targets, table, v = data
    one = loss(backend, data, p=p)
    assert_same(backend, loss(backend, data, p=p, map_weights=3 * v).consistency, 3**p * one.consistency)
    assert loss(backend, data, p=p, map_weights=0 * v).consistency.eq(0).all()
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=backend.device)
    permuted = (features, weight[order], bias[order], order.argsort()[targets], table[order][:, order], v[order])
    other = loss(backend, permuted, p=p)
    assert_same(backend, other.loss, one.loss)
    assert_same(backend, other.logits, one.logits[:, order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_of_zeros_change_nothing(backend):
    features, weight, bias, targets, table, v = case(3, 20, 7, 7, 6, backend.widest, device=backend.device)
    wider = torch.cat([features, torch.zeros_like(features)], 1)
    one = loss(backend, (features, weight, bias, targets, table, v))
    wider_weight = torch.cat([weight, torch.randn_like(weight)], 1)
    two = loss(backend, (wider, wider_weight, bias, targets, table, v))
    assert_same(backend, one.loss, two.loss)


def test_torch_func_is_served_by_the_reference():
    features, weight, bias, targets, table, v = case(3, 8, 5, 5, 4, torch.float64)

    def mean_loss(f, backend=None):
        return rk.rebalanced_head_loss(
            f, weight, bias, targets, target_table=table, map_weights=v, backend=backend
        ).loss

    f = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mean_loss(f), f)
    torch.testing.assert_close(torch.func.grad(mean_loss)(features), expected)
    both = torch.vmap(mean_loss)(torch.stack([features, 2 * features]))
    torch.testing.assert_close(both, torch.stack([mean_loss(features), mean_loss(2 * features)]))
    for name in ("cpu", "triton", "cuda"):
        with pytest.raises(RuntimeError, match="torch.func"):
            torch.func.grad(lambda x, name=name: mean_loss(x, name))(features)
