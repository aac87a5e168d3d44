"""Micro-benchmarks of the public functions; the command is in ``bench.__main__``."""

import pytest
import torch

import rebalfer_kernels as rk
from bench.cases import Case, problem

DATA = problem(Case(32, 512, "channels_last", torch.float32))
FUNCTIONS = {
    "class_activation_maps": lambda d: rk.class_activation_maps(d.features, d.weight),
    "attention_consistency": lambda d: rk.attention_consistency(d.features, d.weight, d.map_weights),
    "rebalanced_head_loss": lambda d: (
        rk.rebalanced_head_loss(*d[:4], target_table=d.table, map_weights=d.map_weights).loss
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward(benchmark, name):
    with torch.no_grad():
        benchmark(FUNCTIONS[name], DATA)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_backward(benchmark, name):
    def both():
        out = FUNCTIONS[name](DATA)
        torch.autograd.grad(out, DATA.features, torch.ones_like(out))

    benchmark(both)
