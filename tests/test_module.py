"""RebalancedHead: nn.Linear's parameters, the same logits in training and evaluation, tables that are never stale."""

import copy
import pickle

import numpy as np
import pytest
import torch
from support import oracle

import rebalfer_kernels as rk

COUNTS = [50, 20, 3]
WEIGHTS = rk.effective_number_weights(COUNTS)


def test_head_module():
    linear = torch.nn.Linear(6, 3)
    head = rk.RebalancedHead(6, 3, [50, 20, 3])
    head.load_state_dict(linear.state_dict(), strict=True)
    features = torch.randn(4, 6, 2, 2)
    torch.testing.assert_close(head(features), linear(features.mean((2, 3))))
    out = head(features, torch.tensor([0, 2]))
    weights = rk.effective_number_weights([50, 20, 3])
    truth = oracle.head(
        features, head.weight.detach(), head.bias.detach(), torch.tensor([0, 2]), rk.target_table(weights),
        weights.sqrt(),
    )  # fmt: skip
    oracle.assert_close(out.loss, truth["loss"], 1e-5)


@pytest.mark.parametrize("dtype, head_dtype", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_logits_are_those_of_training(dtype, head_dtype):
    """float32 and accumulated there, under autocast too."""
    head = rk.RebalancedHead(512, 3, COUNTS, dtype=head_dtype)
    features = (100 + torch.randn(4, 512, 7, 7)).to(dtype)
    exact = features.double().mean((2, 3)) @ head.weight.double().T + head.bias.double()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, training = head(features), head(features, torch.tensor([0, 2])).logits
        assert logits.dtype == training.dtype == torch.float32
        oracle.assert_close(logits.detach(), exact.detach(), 1e-5)
        oracle.assert_close(training.detach(), exact.detach(), 1e-5)


def test_logits_of_bad_features_are_refused():
    head = rk.RebalancedHead(3, 3, COUNTS)
    for features, error, message in (
        (torch.zeros(4, 3, 2), ValueError, r"features: got shape \(4, 3, 2\)"),
        (torch.zeros(4, 5, 2, 2), ValueError, "weight: got shape"),
        (torch.zeros(4, 3, 0, 2), ValueError, "features: got shape"),
        (torch.zeros(4, 3, 2, 2, dtype=torch.float64), TypeError, "weight: got dtype"),
        (np.zeros((4, 3, 2, 2), np.float32), TypeError, "features: got ndarray"),
    ):
        with pytest.raises(error, match=message):
            head(features)


def assert_tables(head):
    torch.testing.assert_close(head.target_table, rk.target_table(WEIGHTS))
    torch.testing.assert_close(head.map_weights, WEIGHTS.sqrt())


def test_tables_follow_the_parameters_and_are_filled_again():
    with torch.device("meta"):
        head = rk.RebalancedHead(6, 3, COUNTS)
    assert {t.device.type for t in (head.weight, head.target_table, head.map_weights)} == {"meta"}
    head = head.to_empty(device="cpu")
    for table in (head.target_table, head.map_weights):
        table.fill_(float("nan"))
    head.reset_parameters()
    assert_tables(head)
    head.half().float().reset_parameters()
    assert_tables(head)
    assert set(head.state_dict()) == {"weight", "bias"}
    assert_tables(pickle.loads(pickle.dumps(copy.deepcopy(head))))


def test_counts_of_any_kind():
    for counts in (tuple(COUNTS), np.array(COUNTS[::-1])[::-1], torch.tensor(COUNTS), np.array(COUNTS, ">i8")):
        assert_tables(rk.RebalancedHead(6, 3, counts))
    for counts, message in ((5, "got shape"), (None, "got None"), ([1, 2], "got 2 counts"), (torch.ones(()), "shape")):
        with pytest.raises(ValueError, match=f"class_counts: .*{message}"):
            rk.RebalancedHead(6, 3, counts)
