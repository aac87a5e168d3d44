"""The wheels, installed outside the checkout: a pure one builds on first use, that of ``make wheel`` builds nothing."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.machine import ROOT

from rebalfer_kernels import native
from rebalfer_kernels.native import wheel

#: Environments with the newest and the oldest torch; `make test-oldest` makes the latter. A library that was built in
#: one is loaded in the other.
ENVIRONMENTS = {name: ROOT / name / "bin/python" for name in (".venv", ".venv-oldest")}
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


@pytest.fixture(scope="module", autouse=True)
def setuptools():
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building the wheel without an index needs setuptools >= 77 in this environment")


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    return wheel.make(tmp_path_factory.mktemp("pure"), [])


@pytest.fixture(scope="module")
def shipping(tmp_path_factory):
    return wheel.make(tmp_path_factory.mktemp("shipping"), [native.build(), native.build("autograd")])


def names(file):
    return set(zipfile.ZipFile(file).namelist())


def run(python, *arguments, cwd=None, **variables):
    """Standard output of a command of that Python, which sees no checkout and none of this process's settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("REBALFER_", "PYTHON", "CXX", "CUDA"))}
    command = [str(python), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def install(python, file, site):
    flags = ("--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index")
    run(python, "-m", "pip", *flags, "--target", site, file)


def test_the_pure_wheel_holds_the_package_and_its_sources_alone(pure):
    assert pure.name.endswith("-py3-none-any.whl")
    assert {name.split("/")[0] for name in names(pure) if ".dist-info/" not in name} == {"rebalfer_kernels"}
    tracked = [path.relative_to(ROOT) for path in (ROOT / "rebalfer_kernels").rglob("*.py")]
    sources = [Path("rebalfer_kernels") / p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    for file in [*tracked, *sources, Path("rebalfer_kernels/py.typed")]:
        assert str(file) in names(pure)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_pure_wheel_builds_on_first_use_and_is_right(pure, tmp_path):
    site = tmp_path / "site"
    install(sys.executable, pure, site)
    compiler = tmp_path / "g++-unoptimised"  # a fifth of the build's time
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    variables = {"PYTHONPATH": str(site), "REBALFER_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(compiler)}
    assert run(sys.executable, "-c", FIRST_USE, site, cwd=tmp_path, **variables) == "right\n"
    assert list((tmp_path / "cache").glob("*.so"))


def test_the_wheel_with_libraries_holds_them_besides(pure, shipping):
    built = [native.build(), native.build("autograd")]
    assert shipping.name.endswith(f"-py3-none-{wheel.platform_tag(built)}.whl")
    more = {name for name in names(shipping) - names(pure) if ".dist-info/" not in name}
    assert more == {f"rebalfer_kernels/native/shipped/{file.name}" for file in built}


@pytest.mark.parametrize("name", ["this one", *ENVIRONMENTS])
def test_the_wheel_with_libraries_needs_no_compiler_and_builds_nothing(shipping, tmp_path, name):
    python = ENVIRONMENTS.get(name, Path(sys.executable))
    if not python.exists() or (
        name != "this one" and python.samefile(sys.executable) and sys.prefix == str(ROOT / name)
    ):
        pytest.skip(f"there is no {name} besides the environment of this test")
    site = tmp_path / "site"
    install(python, shipping, site)
    code = FIRST_USE + (
        "from rebalfer_kernels import native\n"
        "print(rk.backends()['cpu'], *torch.ops.loaded_libraries, getattr(native.autograd(), '__file__', 'none'))"
    )
    variables = {"PYTHONPATH": str(site), "REBALFER_CACHE_DIR": str(tmp_path / "cache"), "PATH": str(tmp_path)}
    shipped = site / "rebalfer_kernels/native/shipped"
    cpu, autograd = (shipped / file.name for file in (native.build(), native.build("autograd")))
    loaded = f"{cpu} {autograd if name == 'this one' else 'none'}"  # the other torch has Python's autograd
    assert run(python, "-c", code, site, cwd=tmp_path, **variables) == f"right\navailable {loaded}\n"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("needs", "tag"),
    [
        ("GLIBC_2.2.5 GLIBC_2.14 GLIBCXX_3.4 GLIBCXX_3.4.21 GCC_3.0 GLIBC_PRIVATE", "manylinux_2_28"),
        ("GLIBC_2.34 GLIBCXX_3.4.21", "manylinux_2_34"),
        ("GLIBC_2.14 GLIBCXX_3.4.29", "manylinux_2_34"),
        ("GLIBC_2.36 GLIBCXX_3.4.30", "manylinux_2_36"),
    ],
)
def test_the_tag_names_the_oldest_glibc_that_has_every_symbol(monkeypatch, needs, tag):
    monkeypatch.setattr(wheel, "_output", lambda *command: needs)
    assert wheel.platform_tag([Path("some.so")]).startswith(f"{tag}_")


def test_a_symbol_version_of_unknown_age_is_refused(monkeypatch):
    monkeypatch.setattr(wheel, "_output", lambda *command: "GLIBCXX_3.4.99")
    with pytest.raises(native.BuildError, match=r"GLIBCXX_3\.4\.99"):
        wheel.platform_tag([Path("some.so")])


def test_every_library_is_in_the_wheel(monkeypatch):
    monkeypatch.setattr(wheel, "build", lambda part, *architectures: (part, *architectures))
    assert wheel.libraries() == [("cpu",), ("autograd",), ("cuda", native.AHEAD)]


def test_libraries_are_not_made_with_options_that_users_will_not_have(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -m64")
    with pytest.raises(native.BuildError, match="CXX: got the options"):
        wheel.libraries()
