"""The built wheel, installed outside the checkout: what it holds, and its first use, which builds the native part."""

import importlib.metadata
import shutil
import zipfile
from pathlib import Path

import pytest
from support import child
from support.machine import ROOT

# 2 x 2 maps of one channel: A = W [1 2; 3 4], A~ = W [0 0; 0 8], S = W [1 2; -5 4], pooled 2.5 and 2, logits W pooled.
FIRST_USE = """
import math, pathlib, sys, torch, rebalfer_kernels as rk
assert pathlib.Path(rk.__file__).is_relative_to(sys.argv[1]), rk.__file__
features = torch.tensor([[[[1.0, 2], [3, 4]]], [[[0.0, 0], [0, 8]]]], requires_grad=True)
weight = torch.tensor([[1.0], [0.0]])
out = rk.rebalanced_head_loss(features, weight, None, torch.tensor([0]), target_table=torch.eye(2),
                              map_weights=torch.ones(2), consistency_weight=2.0, backend="cpu")
cross_entropy = math.log1p(math.exp(-2.5)) + math.log1p(math.exp(-2.0))
assert abs(out.consistency.item() - 46 / 8) < 1e-5, out
assert abs(out.loss.item() - (cross_entropy + 2 * 46 / 8)) < 1e-5, out
out.loss.backward()
dz = [1 / (1 + math.exp(-z)) - 1 for z in (2.5, 2.0)]  # of class 0; class 1 has no weight
expected = [[x / 2 + dz[0] / 4 for x in (1, 2, -5, 4)], [-x / 2 + dz[1] / 4 for x in (2, 1, 4, -5)]]
assert (features.grad.flatten(1) - torch.tensor(expected)).abs().max() < 1e-6, features.grad
print("right")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building the wheel without an index needs setuptools >= 77 in this environment")
    work = tmp_path_factory.mktemp("wheel")
    for name in ("rebalfer_kernels", "csrc", "trainer", "bench"):  # a copy: setuptools leaves things where it builds
        shutil.copytree(ROOT / name, work / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", work, work / "source")
    (built,) = work.glob("*.whl")
    return built


def pip(*arguments):
    result = child.run("-m", "pip", "--disable-pip-version-check", *arguments, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_the_wheel_holds_the_package_and_its_sources_alone(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"rebalfer_kernels"}
    tracked = [path.relative_to(ROOT) for path in (ROOT / "rebalfer_kernels").rglob("*.py")]
    sources = [Path("rebalfer_kernels") / p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    for file in [*tracked, *sources, Path("rebalfer_kernels/py.typed")]:
        assert str(file) in names


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler to build with")
def test_installed_elsewhere_it_builds_on_first_use_and_is_right(wheel, tmp_path):
    site = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    compiler = tmp_path / "g++-unoptimised"  # a fifth of the build's time
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    result = child.run(
        "-c", FIRST_USE, site, timeout=500, cwd=tmp_path, PYTHONPATH=site, REBALFER_BACKEND=None,
        REBALFER_CACHE_DIR=tmp_path / "cache", CXX=compiler,
    )  # fmt: skip
    assert result.stdout.strip() == "right", result.stderr[-3000:]
    assert list((tmp_path / "cache").glob("*.so"))
