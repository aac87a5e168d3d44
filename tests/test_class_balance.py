"""Eq. 4 and Eq. 8 against decimal arithmetic, and their errors."""

from decimal import Decimal, getcontext

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


@pytest.mark.parametrize("counts", [[], [1, 0], [1.5, 2], [-1, 2], [float("nan"), 1], [[1, 2]], "ab", [True, False]])
def test_bad_counts(counts):
    with pytest.raises(ValueError, match="class_counts: got"):
        rk.effective_number_weights(counts)


def test_other_errors():
    for beta in (1.0, -0.1, "a"):
        with pytest.raises(ValueError, match="beta: got"):
            rk.effective_number_weights([1, 2], beta)
    with pytest.raises(ValueError, match="alpha: got 1.5"):
        rk.target_table([1.0, 1.0], 1.5)
    with pytest.raises(ValueError, match="spread: got"):
        rk.target_table([1.0, 1.0], spread="some")
    for weights in ([1.0], None, {"a": 1.0}, "abc", [1, "a"], torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="class_weights: got"):
            rk.target_table(weights)
