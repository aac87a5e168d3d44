"""Targets at their edges: labels of every integer dtype, zero targets of classes masked by a logit of -inf."""

import pytest
import torch
from support.backends import BACKENDS
from support.cases import case

import rebalfer_kernels as rk

LABEL_DTYPES = [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def losses(backend, targets):
    """Of the head and of its cross-entropy, for three images of three classes."""
    features, weight, bias, _, table, v = case(3, 6, 3, 3, 3, torch.float32, device=backend.device)
    targets = targets.to(backend.device)
    head = rk.rebalanced_head_loss(
        features, weight, bias, targets, target_table=table, map_weights=v, backend=backend.name
    )
    return head.loss, rk.rebalanced_cross_entropy(features[:3, :3, 0, 0], targets, table, backend=backend.name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_labels_of_every_integer_dtype(backend, dtype):
    labels = torch.tensor([2, 0, 1])
    assert losses(backend, labels.to(dtype)) == losses(backend, labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_labels_out_of_range_of_every_integer_dtype(backend, dtype):
    if backend.device != "cpu":
        pytest.skip("on a GPU the sample becomes NaN, see tests/gpu")
    for label in (3, torch.iinfo(dtype).max, torch.iinfo(dtype).min or 3):
        with pytest.raises(IndexError, match="targets"):
            losses(backend, torch.tensor([0, label, 1], dtype=dtype))


LABELS = torch.tensor([0, 2, 4, 1])
EYE = torch.eye(5, dtype=torch.float64)


def masked_logits():
    """(4, 5): class 3 masked in every row, class 0 in row 1 too."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[:, 3] = -torch.inf
    logits[1, 0] = -torch.inf
    return logits.requires_grad_()


def derivatives(loss, logits):
    """Value, gradient, and a product with the second derivative."""
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    direction = torch.arange(20.0, dtype=torch.float64).reshape(4, 5)
    return loss, gradient, *torch.autograd.grad((gradient * direction).sum(), logits)


@pytest.mark.parametrize("soft", [False, True])
def test_a_zero_target_of_a_masked_class_takes_no_part(soft):
    """As in PyTorch's cross-entropy of hard labels."""
    logits = masked_logits()
    targets = torch.nn.functional.one_hot(LABELS, 5).double() if soft else LABELS
    expected = derivatives(torch.nn.functional.cross_entropy(logits, LABELS), logits)
    got = derivatives(rk.reference.rebalanced_cross_entropy(logits, targets, EYE), logits)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_zero_target_takes_no_part_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(rk.reference.rebalanced_cross_entropy, fullgraph=True, backend="aot_eager")
    logits = masked_logits()
    results = []
    for loss in (compiled(logits, LABELS, EYE), torch.nn.functional.cross_entropy(logits, LABELS)):
        results.append((loss, *torch.autograd.grad(loss, logits)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_soft_targets_count_the_other_classes():
    logits, unmasked = masked_logits()[:1], [0, 1, 2, 4]
    soft = torch.tensor([[0.25, 0, 0.5, 0, 0.25]], dtype=torch.float64)
    expected = -(soft[:, unmasked] * logits[:, unmasked].log_softmax(1)).sum()
    torch.testing.assert_close(rk.reference.rebalanced_cross_entropy(logits, soft, EYE), expected)


def test_a_masked_class_with_a_target_and_a_nan_target_still_count():
    table = EYE.clone()
    table[2, 3] = torch.nan
    labels = torch.tensor([0, 0, 3, 2])
    losses = rk.reference.rebalanced_cross_entropy(masked_logits(), labels, table, reduction="none")
    assert losses[0].isfinite() and losses[1:3].isposinf().all() and losses[3].isnan()


def test_the_reference_differentiates_by_a_table_where_it_is_zero_too():
    logits, table = masked_logits()[:1, :3], EYE[:3, :3].clone().requires_grad_()
    loss = rk.reference.rebalanced_cross_entropy(logits, torch.tensor([1]), table)
    (gradient,) = torch.autograd.grad(loss, table)
    torch.testing.assert_close(gradient[1], -logits[0].log_softmax(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_class_costs_nothing_on_any_backend(backend):
    logits = masked_logits().detach().float()
    results = []
    for call in (
        lambda z: rk.rebalanced_cross_entropy(
            z, LABELS.to(z.device), EYE.to(z.device, torch.float32), backend=backend.name
        ),
        lambda z: torch.nn.functional.cross_entropy(z, LABELS.to(z.device)),
    ):
        z = logits.to(backend.device, copy=True).requires_grad_()
        loss = call(z)
        results.append((loss, *torch.autograd.grad(loss, z)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_with_a_masked_class(backend):
    """A bias of -inf takes a class out, in the loss and in every gradient."""
    features, weight, bias, _, _, v = case(4, 6, 3, 3, 5, torch.float32, device=backend.device)
    bias[3] = -torch.inf
    labels, table = LABELS.to(backend.device), EYE.to(backend.device, torch.float32)

    def plain(f, w, b):
        logits = torch.nn.functional.linear(f.mean((2, 3)), w, b)
        maps = torch.einsum("lc,mchw->mlhw", w.detach(), f)
        residual = v[:, None, None] * (maps[:4] - maps[4:].flip(-1))
        return 2 * torch.nn.functional.cross_entropy(logits, labels.repeat(2)) + 2 * residual.square().mean()

    def ours(f, w, b):
        return rk.rebalanced_head_loss(f, w, b, labels, target_table=table, map_weights=v, backend=backend.name).loss

    results = []
    for call in (ours, plain):
        leaves = [x.clone().requires_grad_() for x in (features, weight, bias)]
        loss = call(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)
