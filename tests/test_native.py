"""The native build: two processes at once, no compiler, a failing compiler, and nothing compiled by an import."""

import logging
import shutil

import pytest
import torch
from support import child
from support.compiler import unoptimised
from support.machine import ROOT

import rebalfer_kernels as rk
from rebalfer_kernels import native, ops

LOSS = """
import torch, rebalfer_kernels as rk
out = rk.rebalanced_head_loss(torch.zeros(2, 3, 1, 1), torch.ones(2, 3), None, torch.tensor([1]),
                              target_table=torch.eye(2), map_weights=torch.ones(2))
assert abs(out.loss.item() - 2 * torch.tensor(2.0).log().item()) < 1e-6
print(rk.backends()["cpu"])
"""


def start(cache, *arguments, **environment):
    return child.start(*arguments, REBALFER_CACHE_DIR=cache, **environment)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler to build with")
def test_two_builds_at_the_same_moment_on_a_cache_that_has_but_the_rest_of_a_killed_one(tmp_path):
    cache, compiler = tmp_path / "cache", str(unoptimised(tmp_path))
    (cache / "build-cpu-killed").mkdir(parents=True)
    (cache / "build-cpu-killed/build.ninja").touch()
    runs = [start(cache, "-m", "rebalfer_kernels", "build", CXX=compiler) for _ in range(2)]
    results = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    (library,) = (path for path in cache.iterdir() if path.name != "cpu.lock")
    assert library.suffix == ".so"
    assert [out.strip() for out, _ in results] == [str(library)] * 2
    # One built, the other waited and found it; nothing else was said.
    assert sorted(errors.strip() for _, errors in results) == ["", f"building the CPU kernels into {cache}"]
    out, errors = start(cache, "-c", LOSS, CXX=compiler).communicate(timeout=100)
    assert out.strip() == "available", errors


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler to build with")
def test_it_builds_here():
    """Else the tests of the cpu backend would all be skipped, and all would seem well."""
    assert rk.backends()["cpu"] == "available"


def test_without_a_compiler_all_else_works(tmp_path):
    out, errors = start(tmp_path, "-c", LOSS, CXX="/nonexistent/g++", PATH=str(tmp_path)).communicate(timeout=100)
    assert out.startswith("no C++ compiler found"), errors


def test_what_is_not_built_stays_so_where_building_is_forbidden(tmp_path):
    out, errors = start(tmp_path, "-c", LOSS, REBALFER_BUILD="0").communicate(timeout=100)
    assert out.strip() == "not built, and REBALFER_BUILD=0 (`python -m rebalfer_kernels build cpu`)", errors
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_shows_its_message_once(tmp_path):
    compiler = tmp_path / "failing"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no space on moon" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    out, errors = start(tmp_path / "cache", "-c", LOSS, CXX=str(compiler)).communicate(timeout=100)
    assert out.startswith("building the CPU kernels failed; repeat it with"), errors
    assert errors.count("the cpu backend is absent") == 1
    assert "no space on moon" in errors
    assert not list((tmp_path / "cache").glob("*.so"))


def test_sources_that_change_during_the_build_are_noticed(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    compiler = tmp_path / "editing"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\n'
        f'echo "// edited" >> {tmp_path}/csrc/head_math.h\nfor out; do :; done; touch "$out"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(native, "SOURCES", tmp_path / "csrc")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("REBALFER_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(native.BuildError, match="the sources changed while they were built"):
        native.build()
    assert not list((tmp_path / "cache").glob("*.so"))


def test_an_import_compiles_nothing(tmp_path):
    out, errors = start(tmp_path, "-c", "import rebalfer_kernels; print('imported')").communicate(timeout=100)
    assert out.strip() == "imported", errors
    assert not list(tmp_path.iterdir())


@pytest.fixture
def nvcc(tmp_path):
    """A CUDA_HOME whose nvcc fails."""
    compiler = tmp_path / "home/bin/nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no space on moon" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    return compiler.parents[1]


def test_a_failing_nvcc_shows_its_message_and_the_command_to_repeat_it(tmp_path, nvcc):
    arguments = ("-m", "rebalfer_kernels", "build", "cuda", "--arch", "90a", "90+ptx")
    run = start(tmp_path / "cache", *arguments, CUDA_HOME=str(nvcc))
    out, errors = run.communicate(timeout=100)
    assert run.returncode == 1 and out == ""
    assert (
        "building the CUDA kernels failed; repeat it with `python -m rebalfer_kernels build cuda --arch 90a" in errors
    )
    assert "no space on moon" in errors
    assert "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_90,code=compute_90" in errors
    assert not list((tmp_path / "cache").glob("*.so"))


def test_without_a_gpu_or_without_nvcc_there_is_a_reason_and_no_warning(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"
    assert native.load.__wrapped__("cuda") == (False, expected)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        there, reason = native.load.__wrapped__("cuda")
    assert not there and reason.startswith("no nvcc found (CUDA_HOME=")
    assert caplog.records == []


@pytest.mark.parametrize(
    "capabilities, expected",
    [([(9, 0)], ("90a",)), ([(10, 0), (8, 6), (7, 5), (8, 6)], ("86", "100a")), ([(12, 0)], ("120",))],
)
def test_on_first_use_the_present_gpus_are_built_for(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    assert native._present_architectures() == expected


def test_a_library_for_the_present_gpus_comes_before_one_made_ahead(tmp_path, nvcc, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(nvcc))
    monkeypatch.setenv("REBALFER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native, "_present_architectures", lambda: ("120",))
    with pytest.raises(native.BuildError, match="build cuda --arch 120`"):
        native.build("cuda")
    for architectures in (native.AHEAD, ("120",)):
        library = native._library(tmp_path, native._cuda_recipe(architectures))
        library.touch()
        assert native.build("cuda") == library


def cuda_cannot_be_built():
    try:
        native._cuda_recipe(native.AHEAD)
    except native.BuildError as error:
        return str(error)
    return None if torch.version.cuda else "this torch is built without CUDA"


@pytest.mark.skipif(cuda_cannot_be_built() is not None, reason=str(cuda_cannot_be_built()))
def test_the_cuda_library_loads_without_a_gpu_and_serves_every_operator():
    library = native.build("cuda", native.AHEAD)
    served = f"""
import torch, rebalfer_kernels
torch.ops.load_library({str(library)!r})
print(*(op for op in {list(ops._SCHEMAS)!r}
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"rebalfer_kernels::{{op}}_cuda", "CUDA")))
print(torch.ops.rebalfer_kernels.cuda_problem())
"""
    out, errors = start(native.cache_directory(), "-c", served, CUDA_VISIBLE_DEVICES="").communicate(timeout=100)
    operators, problem = out.splitlines()
    assert operators.split() == list(ops._SCHEMAS), errors
    assert problem.startswith("tickets: ")  # and CUDA's reason: no driver, or no device
