"""The examples of the benchmark's docstrings run."""

import doctest

import pytest

from bench import cases, clocks, compare, curves, document, goals, memory, pictures, report, results, sm_clock


@pytest.mark.parametrize(
    "module", [cases, clocks, compare, curves, document, goals, memory, pictures, report, results, sm_clock]
)
def test_examples(module):
    done = doctest.testmod(module)
    assert done.attempted and not done.failed
