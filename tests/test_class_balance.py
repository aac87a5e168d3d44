"""Eq. 4 and Eq. 8 against decimal arithmetic, the forms in which counts come, and the errors."""

from collections import Counter
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch

import rebalfer_kernels as rk

RAF_DB = [1290, 281, 717, 4772, 1982, 705, 2524]


@pytest.mark.parametrize("beta", ["0", "0.9", "0.999", "0.9999"])
def test_eq4(beta):
    getcontext().prec = 50
    b = [(1 - Decimal(beta)) / (1 - Decimal(beta) ** n) for n in RAF_DB]
    got = rk.effective_number_weights(RAF_DB, float(beta), normalize=False)
    torch.testing.assert_close(got, torch.tensor([float(x) for x in b]), rtol=1e-6, atol=0)
    scaled = torch.tensor([float(7 * x / sum(b)) for x in b])
    torch.testing.assert_close(
        rk.effective_number_weights(torch.tensor(RAF_DB), float(beta)), scaled, rtol=1e-6, atol=0
    )


def test_raf_db_ratio_is_the_papers():
    b = rk.effective_number_weights(RAF_DB)
    assert abs((b.max() / b.min()).item() - 13.7) < 0.05
    released = [0.95124, 4.36690, 1.71144, 0.25715, 0.61912, 1.74057, 0.48617]  # (sum n / 10) / n_l
    got = rk.inverse_frequency_weights(RAF_DB, normalize=False) * 0.7
    torch.testing.assert_close(got, torch.tensor(released), rtol=1e-4, atol=0)


def test_eq8():
    table = rk.target_table([0.5, 1.0, 1.5], 0.3)
    assert table.sum(1).allclose(torch.ones(3))
    torch.testing.assert_close(table[0], torch.tensor([0.7 + 0.05, 0.1, 0.15]))
    raw = rk.target_table([0.01, 0.02, 0.03], 0.3)  # to the letter, though no distribution
    torch.testing.assert_close(raw[0], torch.tensor([0.7 + 0.001, 0.002, 0.003]))
    other = rk.target_table([0.5, 1.0, 1.5], 0.3, spread="non_target")
    torch.testing.assert_close(other[1], torch.tensor([0.075, 0.7, 0.225]))


class Series:
    """What pandas' Series answers: its keys, its values by key, and its values in the order of the keys."""

    def __init__(self, by_key):
        self.by_key = by_key

    def keys(self):
        return list(self.by_key)

    def __getitem__(self, key):
        return self.by_key[key]

    def tolist(self):
        return list(self.by_key.values())


@pytest.mark.parametrize(
    "counts",
    [
        (9, 5, 2),
        [9.0, np.float32(5), np.int64(2)],
        [torch.tensor(9), 5, torch.tensor(2.0)],
        np.array([2, 5, 9])[::-1],
        np.array([9, 5, 2], ">i8"),
        torch.tensor([9, 5, 2], dtype=torch.uint8),
        {2: 2, 0: 9, 1: 5},
        Counter([2] * 2 + [1] * 5 + [0] * 9),
        {np.int64(c): n for c, n in enumerate((9, 5, 2))},
        Series({1: 5, 2: 2, 0: 9}),
    ],
    ids=repr,
)
def test_counts_and_weights_of_any_kind(counts):
    expected = torch.tensor([9.0, 5.0, 2.0])
    torch.testing.assert_close(1 / rk.inverse_frequency_weights(counts, normalize=False), 3 / 16 * expected)
    torch.testing.assert_close(rk.target_table(counts, 1.0)[0], expected / 3)


def test_counts_of_a_range_and_a_generator():
    expected = rk.effective_number_weights([2, 3, 4])
    assert torch.equal(rk.effective_number_weights(range(2, 5)), expected)
    assert torch.equal(rk.effective_number_weights(n for n in (2, 3, 4)), expected)


@pytest.mark.parametrize("counts", [{"sad": 5, "happy": 9}, {1: 5, 2: 9}, Series({"sad": 5, "happy": 9}), {0: 1, 2: 1}])
def test_counts_by_other_names_than_the_classes(counts):
    with pytest.raises(
        ValueError, match=r"class_counts: got the keys .* expected the classes 0, ..., 1; .*class order"
    ):
        rk.effective_number_weights(counts)
    with pytest.raises(ValueError, match="class_weights: got the keys"):
        rk.target_table(counts)


def test_float64_whatever_the_defaults():
    """1291 and 4773 are no bfloat16 numbers; a default device does not hold the result either."""
    expected = rk.effective_number_weights([1291, 4773], 0.999), rk.target_table([0.123, 1.877], 0.3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = rk.effective_number_weights([1291.0, 4773.0], np.float64(0.999)), rk.target_table([0.123, 1.877], 0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_numpy_numbers():
    assert torch.equal(rk.effective_number_weights([9, 5], np.float64(0.99)), rk.effective_number_weights([9, 5], 0.99))
    beta, alpha = np.float32(0.999), np.float32(0.3)
    torch.testing.assert_close(
        rk.effective_number_weights([9000, 5], beta), rk.effective_number_weights([9000, 5], float(beta))
    )
    assert torch.equal(rk.target_table([0.5, 1.5], alpha), rk.target_table([0.5, 1.5], float(alpha)))


BAD_COUNTS = (
    [[], {}, [1, 0], [1.5, 2], [-1, 2], [float("nan"), 1], [[1, 2]], [True, False], [1, "a"], [Decimal(2), 1]]
    + ["ab", "12", None, 5, {5, 2}, {0: 5, 1: 2}.values(), np.array([True, False])]
    + [torch.ones(()), torch.ones(2, 1), torch.ones(2, dtype=torch.bool)]
)


@pytest.mark.parametrize("counts", BAD_COUNTS, ids=repr)
def test_bad_counts(counts):
    with pytest.raises(ValueError, match="class_counts: got"):
        rk.effective_number_weights(counts)


def test_other_errors():
    for beta in (1.0, -0.1, "a", False, np.float32(1), None):
        with pytest.raises(ValueError, match="beta: got"):
            rk.effective_number_weights([1, 2], beta)
    for alpha in (1.5, True, "a"):
        with pytest.raises(ValueError, match="alpha: got"):
            rk.target_table([1.0, 1.0], alpha)
    with pytest.raises(ValueError, match="spread: got"):
        rk.target_table([1.0, 1.0], spread="some")
    for weights in ([1.0], None, {"a": 1.0}, "abc", [1, "a"], torch.ones(2, dtype=torch.complex64), {1.0, 2.0}):
        with pytest.raises(ValueError, match="class_weights: got"):
            rk.target_table(weights)
