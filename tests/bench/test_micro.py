"""Micro-benchmarks of the public functions; the commands are in ``bench.__main__``."""

import pytest
import torch
from support import child

import rebalfer_kernels as rk
from bench.cases import Case, problem

DATA = problem(Case(32, 512, "channels_last", torch.float32))
LOGITS = torch.randn(32, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
HEAD = {"target_table": DATA.target_table, "map_weights": DATA.map_weights}


def head(**options):
    return rk.rebalanced_head_loss(*DATA[:4], **HEAD, **options).loss


#: By name, the function and what it is differentiated by.
FUNCTIONS = {
    "class_activation_maps": (lambda: rk.class_activation_maps(DATA.features, DATA.weight), DATA.features),
    "attention_consistency": (
        lambda: rk.attention_consistency(DATA.features, DATA.weight, DATA.map_weights), DATA.features
    ),
    "rebalanced_head_loss": (head, DATA.features),
    "rebalanced_head_loss, not detached": (lambda: head(detach_cam_weight=False), DATA.features),
    "rebalanced_cross_entropy": (
        lambda: rk.rebalanced_cross_entropy(LOGITS, DATA.targets, DATA.target_table), LOGITS
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward(benchmark, name):
    function, _ = FUNCTIONS[name]
    with torch.no_grad():
        benchmark(function)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_backward(benchmark, name):
    function, leaf = FUNCTIONS[name]

    def both():
        out = function()
        torch.autograd.grad(out, leaf, torch.ones_like(out))

    benchmark(both)


def test_two_runs_are_compared(tmp_path):
    """By pytest-benchmark, in one process that imports PyTorch once."""
    common = ["tests/bench/test_micro.py", "-o", "addopts=", "--benchmark-only", "-p", "no:cacheprovider"]
    common += ["-k", "test_forward and entropy", f"--benchmark-storage={tmp_path}"]
    common += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", "--benchmark-columns=min,median"]
    twice = (
        f"import sys, pytest; common = {common}; "
        "pytest.main([*common, '--benchmark-autosave']); "
        "sys.exit(pytest.main([*common, '--benchmark-compare']))"
    )
    done = child.run("-c", twice)
    assert done.stdout.count("2 passed") == 2, done.stdout
    assert "Comparing against benchmarks from" in done.stderr and "(NOW)" in done.stdout and "(0001_" in done.stdout
