"""No launch waits longer, or more often, than the golden file knows; and its figures are those of whole launches."""

import functools
import json

import cuda_compiled
import issue_budgets as budgets
import latency_chains as chains
import pytest
from sass.machine import Link

pytestmark = pytest.mark.skipif(cuda_compiled.missing() is not None, reason=str(cuda_compiled.missing()))

GOLDEN = json.loads(chains.GOLDEN.read_text())


@functools.cache
def measured():
    sizes = {512: [32, 512], 2048: [512]}
    return {
        k: v
        for c in sizes
        for layout in budgets.kernels.LAYOUTS
        for k, v in chains.measure(c, layout, sizes[c]).items()
    }


def complaints(found, golden):
    return [line for name, figures in found.items() for line in chains.regressions(name, figures, golden[name])]


def test_no_launch_waits_longer_than_the_golden_file_knows():
    assert measured().keys() <= GOLDEN.keys(), "other launches than in the golden file: python " + chains.__file__
    wrong = complaints(measured(), GOLDEN)
    assert not wrong, "\n".join(wrong)


def test_a_regression_is_named():
    good = {
        "kernel": "k", "threads": 128, "cluster": 1, "bytes": 4, "resident": 3,
        "parts": [{"blocks": 2, "instructions": 1000, "cycles": 3000}],
        "chain": [["L2 cache", 1, 2900], ["end", 1, 100]],
    }  # fmt: skip
    assert complaints({"forward": good}, {"forward": good}) == []
    worse = good | {
        "resident": 2, "parts": [{"blocks": 2, "instructions": 1031, "cycles": 3091}],
        "chain": [["L2 cache", 2, 2991], ["end", 1, 100]],
    }  # fmt: skip
    assert complaints({"forward": worse}, {"forward": good}) == [
        "forward: 2 blocks on a multiprocessor, known 3",
        "forward: a chain of 3091 cycles, known 3000",
        "forward: waits 2 times for L2 cache, known 1",
        "forward: 1031 instructions, known 1000",
        "forward: 3091 cycles, known 3000",
    ]


def test_a_chain_is_what_is_waited_for_in_order_and_adds_up():
    path = [
        Link(0, "constant", 10, 50), Link(1, "L2 cache", 60, 340), Link(2, "L2 cache", 350, 630),
        Link(3, "barrier", 700, 720), Link(4, "L2 cache", 730, 1010), Link(5, "special unit", 1020, 1044),
    ]  # fmt: skip
    assert chains.chain(path, 1050) == [["L2 cache", 2, 630], ["barrier", 1, 90], ["L2 cache", 1, 290], ["end", 1, 40]]


@pytest.mark.parametrize("layout", budgets.kernels.LAYOUTS)
def test_parts_of_a_launch_are_those_of_the_whole(layout):
    """Instructions and the longest chain of a launch run whole, on real features, whose outputs are right."""
    problem = budgets.Problem(200, 7, 7, layout, "bfloat16")
    head, few = budgets.Head(problem, 4), tuple(chains.Batch(problem, n).backward_launch().of.blocks for n in (1, 2))
    for way in ("forward", "backward"):
        batch = chains.Batch(problem, 4)
        figures = chains.forward(batch) if way == "forward" else chains.backward(batch, few)
        _, run = getattr(head, way)(whole=True)
        getattr(head, f"check_{way}")()
        assert chains.cycles(figures) == pytest.approx(run.cycles, rel=0.02)
        of_parts = sum(part["blocks"] * part["instructions"] for part in figures["parts"])
        # Every block of the weight's gradient counts as the first, which computes the bias's too.
        near = 0.05 if way == "forward" else 0.1
        assert of_parts == pytest.approx(run.counts[:, 0].sum(), rel=near)
