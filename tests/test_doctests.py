"""The examples of the docstrings run."""

import doctest
import importlib

import pytest
import torch


@pytest.mark.parametrize(
    "module",
    [
        "doctor.bounded",
        "doctor.cases",
        "doctor.environment",
        "class_balance",
        "transforms",
        "dispatch",
        "functional",
        "augment",
        "reference",
        "views",
        "modules",
    ],
)
def test_doctests(module):
    result = doctest.testmod(importlib.import_module(f"rebalfer_kernels.{module}"), extraglobs={"torch": torch})
    assert result.attempted and not result.failed
