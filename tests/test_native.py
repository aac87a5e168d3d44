"""The native build: two processes at once, no compiler, a failing compiler, and nothing compiled by an import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOSS = """
import torch, rebalfer_kernels as rk
out = rk.rebalanced_head_loss(torch.zeros(2, 3, 1, 1), torch.ones(2, 3), None, torch.tensor([1]),
                              target_table=torch.eye(2), map_weights=torch.ones(2))
assert abs(out.loss.item() - 2 * torch.tensor(2.0).log().item()) < 1e-6
print(rk.backends()["cpu"])
"""


def start(cache, *arguments, **environment):
    environment = os.environ | {"REBALFER_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler to build with")
def test_two_builds_at_the_same_moment_on_an_empty_cache(tmp_path):
    runs = [start(tmp_path, "-m", "rebalfer_kernels.native") for _ in range(2)]
    results = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    (library,) = tmp_path.glob("*.so")
    assert [out.strip() for out, _ in results] == [str(library)] * 2
    assert sum("building" in errors for _, errors in results) == 1  # the other waited and found it
    out, errors = start(tmp_path, "-c", LOSS).communicate(timeout=100)
    assert out.strip() == "available", errors


def test_without_a_compiler_all_else_works(tmp_path):
    out, errors = start(tmp_path, "-c", LOSS, CXX="/nonexistent/g++", PATH=str(tmp_path)).communicate(timeout=100)
    assert out.startswith("no C++ compiler found"), errors


def test_a_failing_compiler_shows_its_message_once(tmp_path):
    compiler = tmp_path / "failing"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no space on moon" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    out, errors = start(tmp_path / "cache", "-c", LOSS, CXX=str(compiler)).communicate(timeout=100)
    assert out.startswith("building the CPU kernels failed; repeat it with"), errors
    assert errors.count("the cpu backend is absent") == 1
    assert "no space on moon" in errors
    assert not list((tmp_path / "cache").glob("*.so"))


def test_an_import_compiles_nothing(tmp_path):
    out, errors = start(tmp_path, "-c", "import rebalfer_kernels; print('imported')").communicate(timeout=100)
    assert out.strip() == "imported", errors
    assert not list(tmp_path.iterdir())
