"""The native build and the loading of what it built: names, places, tools, and every reason why a library is absent."""

import errno
import logging
import os
import pwd
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from support import child
from support.machine import ROOT

import rebalfer_kernels as rk
from rebalfer_kernels import native, ops
from rebalfer_kernels.native import cache, library, recipe, tools

LOSS = """
import torch, rebalfer_kernels as rk
out = rk.rebalanced_head_loss(torch.zeros(2, 3, 1, 1), torch.ones(2, 3), None, torch.tensor([1]),
                              target_table=torch.eye(2), map_weights=torch.ones(2))
assert abs(out.loss.item() - 2 * torch.tensor(2.0).log().item()) < 1e-6
print(rk.backends()["cpu"])
"""
NO_COMPILER = "no C++ compiler found (g++ or c++ on PATH; CXX names another)"
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def start(directory, *arguments, **environment):
    """A Python process whose cache is that directory."""
    return child.start(*arguments, REBALFER_CACHE_DIR=directory, **environment)


def first_use(directory, **environment):
    """What ``backends()`` says of the cpu backend after a right loss in a process of its own, and its stderr."""
    out, errors = start(directory, "-c", LOSS, **environment).communicate(timeout=300)
    return out.strip(), errors


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("REBALFER_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def absent():
    """Says why the cpu backend would be absent in this process."""
    return lambda: _reason(library.load.__wrapped__("cpu"))


def _reason(verdict):
    there, reason = verdict
    assert not there
    return reason


@pytest.fixture(scope="module")
def built():
    """The library of the ordinary cache."""
    return native.build()


@pytest.fixture
def copies(tmp_path):
    """Makes a ``CXX`` that writes a copy of a file wherever it is asked for an output, and logs that it was called."""

    def compiler(file):
        return str(script(tmp_path / "copies", f'echo x >> {tmp_path}/calls\nfor o; do :; done\ncp "{file}" "$o"'))

    return compiler


# Building -------------------------------------------------------------------------------------------------------------


@COMPILER
def test_two_builds_at_once_in_paths_with_spaces_and_dollars_after_one_that_was_killed(tmp_path):
    place, directory = tmp_path / "a $HOME 'place'", tmp_path / "the $cache"
    for name in ("rebalfer_kernels", "csrc"):
        shutil.copytree(ROOT / name, place / name)
    (place / "torch").symlink_to(Path(torch.__file__).parent)
    script(place / "un optimised", 'exec g++ "$@" -O0')
    (directory / "build-cpu-killed").mkdir(parents=True)
    (directory / "build-cpu-killed/build.ninja").touch()
    environment = {"cwd": place, "CXX": f'env "{place}/un optimised" -m64'}  # as "ccache g++"
    runs = [start(directory, "-m", "rebalfer_kernels", "build", **environment) for _ in range(2)]
    results = [run.communicate(timeout=500) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    autograd, cpu = sorted(path for path in directory.iterdir() if path.suffix != ".lock")
    assert [out.splitlines() for out, _ in results] == [[str(cpu), str(autograd)]] * 2
    # Each was built once, while the other process waited and found it; nothing else was said.
    assert sorted("".join(errors for _, errors in results).splitlines()) == [
        f"building the C++ autograd in {directory}, once; this takes about half a minute",
        f"building the CPU kernels in {directory}, once; this takes about a minute",
    ]
    for path in (directory, cpu, autograd):  # holds no secret: what root built, others may load
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == 0o777 & ~_umask(), oct(mode)
    assert first_use(directory, **environment) == ("available", "")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@COMPILER
def test_it_builds_here():
    """Else the tests of the cpu backend would all be skipped, and all would seem well."""
    assert rk.backends()["cpu"] == "available"


def test_the_first_use_says_in_one_line_that_it_builds(tmp_path, directory, built, copies):
    reason, errors = first_use(directory, CXX=copies(built))
    assert reason == "available"
    assert errors == f"building the CPU kernels in {directory}, once; this takes about a minute\n"


def test_what_is_not_built_stays_so_where_building_is_forbidden(directory):
    reason, errors = first_use(directory, REBALFER_BUILD="0")
    assert reason == "not built, and REBALFER_BUILD=0 (`python -m rebalfer_kernels build cpu`)", errors
    assert not list(directory.iterdir())


def test_a_failing_compiler_shows_its_message_once_even_outside_the_locale(tmp_path, directory):
    compiler = script(tmp_path / "failing", "printf 'no space on m\\377n\\n' >&2; exit 1")
    reason, errors = first_use(directory, CXX=str(compiler), LC_ALL="C", PYTHONUTF8="0")
    assert reason.startswith("building the CPU kernels failed; repeat it with"), errors
    assert errors.count("the cpu backend is absent") == 1
    assert "no space on m" in errors
    assert not list(directory.glob("*.so"))


def test_sources_that_change_during_the_build_are_noticed(tmp_path, directory, monkeypatch):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    edit = f'echo "// edited" >> {tmp_path}/csrc/head_math.h\nfor out; do :; done; touch "$out"'
    monkeypatch.setenv("CXX", str(script(tmp_path / "editing", edit)))
    monkeypatch.setattr(recipe, "SOURCES", tmp_path / "csrc")
    with pytest.raises(native.BuildError, match="the sources changed while they were built"):
        native.build()
    assert not list(directory.glob("*.so"))


def test_an_import_compiles_nothing(directory):
    out, errors = start(directory, "-c", "import rebalfer_kernels; print('imported')").communicate(timeout=100)
    assert out.strip() == "imported", errors
    assert not list(directory.iterdir())


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
@pytest.mark.parametrize("isa", native.ISAS)
def test_clang_accepts_the_cpu_kernels(isa):
    flags = f"{native.cpu_recipe().flags} {native.cpu_recipe().objects[f'{isa}.o'][1]} -fsyntax-only".split()
    result = subprocess.run(["clang++", *flags, ROOT / "csrc/cpu/kernels.cpp"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:3000]


@COMPILER
def test_the_builds_of_the_views_share_no_function(tmp_path):
    """Of a function in all of them the linker keeps one, perhaps that for a wider CPU. Unoptimised, none is inlined."""
    own = next(own for file, own in native.cpu_recipe().objects.values() if file == "views.cpp")
    command = ["g++", *f"{native.cpu_recipe().flags} {own} -O0 -c".split(), ROOT / "csrc/cpu/views.cpp"]
    subprocess.run([*command, "-o", tmp_path / "built.o"], check=True, capture_output=True)
    symbols = subprocess.run(["nm", "-C", tmp_path / "built.o"], check=True, capture_output=True, text=True).stdout
    assert "rebalfer::views_" in symbols and [line for line in symbols.splitlines() if " W " in line] == []


# Names: what is stored is found, and nothing stale --------------------------------------------------------------------


def test_a_stored_library_is_loaded_without_any_compiler(tmp_path, directory, built):
    shutil.copy(built, directory)
    assert first_use(directory, PATH=str(tmp_path), CXX="", CUDA_HOME="") == ("available", "")
    assert first_use(directory, REBALFER_BUILD="0", CXX="/nonexistent/clang++") == ("available", "")
    assert list(directory.iterdir()) == [directory / built.name]


def test_a_library_is_named_by_its_sources_and_flags_alone(tmp_path, monkeypatch):
    name = native.cpu_recipe().name()
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    monkeypatch.setenv("CXX", "ccache clang++")
    assert native.cpu_recipe().name() == name
    monkeypatch.setenv("CXX", "g++ -O1")
    assert native.cpu_recipe().name() != name
    monkeypatch.delenv("CXX")
    assert native.cpu_recipe()._replace(flags="-O1").name() != name
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(recipe, "SOURCES", tmp_path / "csrc")
    assert native.cpu_recipe().name() == name
    for file in ("head_math.h", "cpu/simd.h", "cpu/kernels.cpp"):
        (tmp_path / "csrc" / file).write_text((ROOT / "csrc" / file).read_text() + "//\n")
        assert native.cpu_recipe().name() != name
        name = native.cpu_recipe().name()


def test_the_autograd_library_is_of_one_version_of_torch_and_of_python(monkeypatch):
    names = {recipe.autograd_recipe().name()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.11.0+cpu")
        names.add(recipe.autograd_recipe().name())
    monkeypatch.setattr(recipe.sysconfig, "get_config_var", lambda name: {"SOABI": "cpython-399"}[name])
    names.add(recipe.autograd_recipe().name())
    assert len(names) == 3


def test_python_headers_that_are_missing_are_named(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.sysconfig, "get_path", lambda name: {"include": str(tmp_path / "empty")}[name])
    with pytest.raises(native.ToolMissing, match=r"no Python.h in .*empty .*python3-dev"):
        native.build("autograd", anew=True)
    assert not list(directory.glob("*autograd*"))


def test_a_shipped_library_comes_before_the_cache(tmp_path, directory, monkeypatch):
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(recipe, "present_architectures", lambda: ("90a",))
    (tmp_path / "shipped").mkdir()
    ahead, present = recipe.cuda_recipe(native.AHEAD).name(), recipe.cuda_recipe(("90a",)).name()
    for place, name in ((directory, ahead), (tmp_path / "shipped", ahead), (directory, present)):
        (place / name).touch()
        assert native.build("cuda") == place / name


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "cause"), [(7, "file too short"), (100_000, "truncated")])
def test_a_broken_library_is_built_anew_where_that_is_allowed(
    tmp_path, directory, built, copies, absent, monkeypatch, size, cause
):
    broken = directory / built.name
    broken.write_bytes(built.read_bytes()[:size])
    refusal = f"the library cannot be loaded: {broken}: {cause}"
    with monkeypatch.context() as patch:
        patch.setenv("REBALFER_BUILD", "0")
        assert absent() == f"{refusal} (not built anew: REBALFER_BUILD=0; REBALFER_CACHE_DIR names another cache)"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.setenv("CXX", "")
        assert absent() == f"{refusal}; building it anew: {NO_COMPILER}"
    reason, errors = first_use(directory, CXX=copies(built))
    assert reason == "available" and errors.startswith(refusal + "\nbuilding the CPU kernels in"), errors
    assert broken.read_bytes() == built.read_bytes()


def test_a_library_that_this_system_refuses_is_built_anew_only_once(
    tmp_path, directory, built, copies, absent, monkeypatch
):
    (tmp_path / "garbage").write_text("not a library, and long enough to have had the header of one" * 9)
    monkeypatch.setenv("CXX", copies(tmp_path / "garbage"))
    shutil.copy(tmp_path / "garbage", directory / built.name)
    refusal = f"the library cannot be loaded: {directory / built.name}: invalid ELF header"
    assert absent() == f"{refusal} (just built)"
    calls = (tmp_path / "calls").read_text()
    forget = "`python -m rebalfer_kernels doctor --clear-cache` forgets that"
    assert absent() == f"{refusal} (built anew before; {forget})"
    assert (tmp_path / "calls").read_text() == calls
    assert native.clear_cache()[0] == 3  # the library, the lock and the note
    assert not directory.exists()


@COMPILER
def test_a_missing_symbol_version_is_named(tmp_path, directory, built, absent, monkeypatch):
    def shared(name, code, *more):
        (tmp_path / "code.c").write_text(code)
        command = ["g++", "-shared", "-fPIC", "-x", "c", tmp_path / "code.c", "-x", "none", "-o", name, *more]
        subprocess.run(command, check=True)

    needed = directory / "libneeded.so"
    for version in ("NEW_2", "OLD_1"):
        (tmp_path / "map").write_text(f"{version} {{ f; }};")
        shared(needed, "void f() {}", f"-Wl,--version-script={tmp_path}/map")
        if version == "NEW_2":
            user = directory / built.name
            shared(user, "void f(); void g() { f(); }", needed, f"-Wl,-rpath,{directory}")
    monkeypatch.setenv("REBALFER_BUILD", "0")
    assert f"version `NEW_2' not found (required by {user})" in absent()


def no_locks(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_cache_that_cannot_be_used_names_the_variable(tmp_path, directory, monkeypatch, absent):
    mend = "set REBALFER_CACHE_DIR to another directory"
    with monkeypatch.context() as patch:
        patch.setattr(cache.fcntl, "flock", no_locks)
        assert absent() == f"{directory} cannot be used ([Errno 37] No locks available): {mend}"
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "statvfs", lambda path: os.statvfs_result([0] * 8 + [os.ST_NOEXEC, 0]))
        assert absent() == (
            f"{directory} cannot be used (it is mounted noexec, so no library can be loaded from it): {mend}"
        )
    (tmp_path / "file").touch()
    monkeypatch.setenv("REBALFER_CACHE_DIR", str(tmp_path / "file/cache"))
    assert "Not a directory" in absent() and absent().endswith(mend)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everywhere")
def test_a_cache_that_this_user_may_not_use_names_the_variable(directory, absent):
    for mode, what in ((0o500, "Permission denied"), (0o000, "Permission denied")):
        directory.chmod(mode)
        assert what in absent() and absent().endswith("set REBALFER_CACHE_DIR to another directory")
    directory.chmod(0o700)


def test_a_user_without_a_home_needs_only_the_variable(directory, built, monkeypatch, absent):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    shutil.copy(built, directory)
    assert native.build() == directory / built.name
    monkeypatch.delenv("REBALFER_CACHE_DIR")
    assert absent() == "no home directory (Could not determine home directory.): set REBALFER_CACHE_DIR"


def test_without_fcntl_it_imports_and_loads_but_does_not_build(directory, built):
    code = f"import sys; sys.modules['fcntl'] = None\n{LOSS}"
    out, errors = start(directory, "-c", code).communicate(timeout=100)
    assert out.strip() == "not built: that needs a POSIX system, and this Python has no fcntl", errors
    shutil.copy(built, directory)
    out, errors = start(directory, "-c", code).communicate(timeout=100)
    assert out.strip() == "available", errors


GRADIENT = (
    LOSS.replace("torch.zeros(2, 3, 1, 1)", "torch.zeros(2, 3, 1, 1, requires_grad=True)")
    + """
out.loss.backward()
print("C++" if "rebalfer" in out.loss.grad_fn.name() else "Python")
"""
)


@COMPILER
def test_the_first_gradient_builds_the_autograd(directory, built):
    shutil.copy(built, directory)
    out, errors = start(directory, "-c", GRADIENT).communicate(timeout=300)
    assert out.split() == ["available", "C++"]
    assert errors == f"building the C++ autograd in {directory}, once; this takes about half a minute\n"
    assert start(directory, "-c", GRADIENT, PATH="", CXX="").communicate(timeout=100) == (out, "")


@pytest.mark.parametrize(
    "environment", [{"PATH": "", "CXX": ""}, {"REBALFER_BUILD": "0"}], ids=["no tools", "forbidden"]
)
def test_where_the_autograd_cannot_be_built_python_serves_in_silence(directory, built, environment):
    shutil.copy(built, directory)
    out, errors = start(directory, "-c", GRADIENT, **environment).communicate(timeout=100)
    assert out.split() == ["available", "Python"] and errors == ""
    assert list(directory.iterdir()) == [directory / built.name]


@COMPILER
def test_where_building_the_autograd_fails_python_serves_and_the_message_is_shown_once(
    tmp_path, directory, built, monkeypatch
):
    shutil.copy(built, directory)
    compiler = script(tmp_path / "failing", "echo 'no space on moon' >&2; exit 1")
    out, errors = start(directory, "-c", GRADIENT, CXX=str(compiler)).communicate(timeout=100)
    assert out.split() == ["available", "Python"]
    assert "the C++ autograd is absent, so small calls take longer: building the C++ autograd failed" in errors
    assert "no space on moon" in errors
    # No other process tries; who asks for it does.
    out, errors = start(directory, "-c", GRADIENT, CXX=str(compiler)).communicate(timeout=100)
    assert out.split() == ["available", "Python"] and errors == ""
    run = start(directory, "-m", "rebalfer_kernels", "build", CXX=str(compiler))
    out, errors = run.communicate(timeout=100)
    assert run.returncode == 0 and out == f"{directory / built.name}\n"
    assert "without the C++ autograd, small calls take longer: building" in errors and "no space on moon" in errors
    run = start(directory, "-m", "rebalfer_kernels", "build", PATH="", CXX="")
    out, errors = run.communicate(timeout=100)
    assert run.returncode == 0 and errors == f"without the C++ autograd, small calls take longer: {NO_COMPILER}\n"
    monkeypatch.setenv("CXX", "")
    assert native.build("autograd") in set(directory.glob("rebalfer_autograd_*.so"))
    assert not list(directory.glob("*.failed"))


@COMPILER
def test_the_autograd_builds_here():
    """Else its tests would all be skipped, and all would seem well."""
    assert native.load("autograd") == (True, "available")


# Tools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", NO_COMPILER),
        ("g+++ -m64", "CXX: got 'g+++ -m64', but 'g+++' is not on PATH or not an executable file"),
        ("g++ 'x", 'CXX: got "g++ \'x", expected a command: No closing quotation'),
    ],
)
def test_no_other_compiler_replaces_the_one_that_is_wanted(directory, absent, monkeypatch, value, reason):
    if not value:
        monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("CXX", value)
    assert absent() == reason


def test_a_compiler_may_come_with_a_launcher_and_options(tmp_path, monkeypatch):
    program = str(script(tmp_path / "my tools/g++", ""))
    for value, words in (
        (program, [program]),
        (f'{tmp_path}/"my tools"/g++ -m64', [program, "-m64"]),
        (f"env '{program}' -O1", [shutil.which("env"), program, "-O1"]),
    ):
        monkeypatch.setenv("CXX", value)
        assert native.find_compiler() == words
    home = script(tmp_path / "cuda/bin/nvcc", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert recipe.cuda_recipe(("90a",)).compiler() == [str(home), "-ccbin", program, "-Xcompiler", "-O1"]


def test_nvcc_comes_from_cuda_home_then_path_then_the_usual_place(tmp_path, monkeypatch):
    home, path = script(tmp_path / "home/bin/nvcc", ""), script(tmp_path / "path/nvcc", "")
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert native.find_nvcc() == str(home)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert native.find_nvcc() == str(path)
    monkeypatch.setenv("PATH", "")
    usual = shutil.which("/usr/local/cuda/bin/nvcc")
    if usual:
        assert native.find_nvcc() == usual
    else:
        with pytest.raises(native.ToolMissing, match="no nvcc found"):
            native.find_nvcc()


def test_ninja_comes_from_path_then_from_its_python_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(script(tmp_path / "ninja", "").parent))
    assert native.find_ninja() == str(tmp_path / "ninja")
    monkeypatch.setenv("PATH", "")
    ninja = pytest.importorskip("ninja", reason="the Python package ninja is not installed")
    assert native.find_ninja() == str(Path(ninja.BIN_DIR, "ninja"))


# CUDA -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """An nvcc that fails."""
    script(tmp_path / "home/bin/nvcc", 'echo "no space on moon" >&2; exit 1')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))


def test_a_failing_nvcc_shows_its_message_and_the_command_to_repeat_it(directory, nvcc):
    run = start(directory, "-m", "rebalfer_kernels", "build", "cuda", "--arch", "90a", "90+ptx")
    out, errors = run.communicate(timeout=100)
    assert run.returncode == 1 and out == ""
    repeat = "python -m rebalfer_kernels build cuda --arch 90a 90+ptx"
    assert f"building the CUDA kernels failed; repeat it with `{repeat}`" in errors
    assert "no space on moon" in errors
    assert "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_90,code=compute_90" in errors
    assert not list(directory.glob("*.so"))


def test_without_a_gpu_or_without_nvcc_there_is_a_reason_and_no_warning(directory, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"
    assert native.load.__wrapped__("cuda") == (False, expected)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(recipe, "present_architectures", lambda: ("90a",))
    monkeypatch.setattr(tools, "_found", lambda name: None)
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
    assert recipe.present_architectures() == expected


def test_a_library_for_the_present_gpus_comes_before_one_made_ahead(directory, nvcc, monkeypatch):
    monkeypatch.setattr(recipe, "present_architectures", lambda: ("120",))
    with pytest.raises(native.BuildError, match="build cuda --arch 120`"):
        native.build("cuda")
    for architectures in (native.AHEAD, ("120",)):
        stored = directory / recipe.cuda_recipe(architectures).name()
        stored.touch()
        assert native.build("cuda") == stored


def cuda_cannot_be_built():
    try:
        native.find_nvcc()
    except native.BuildError as error:
        return str(error)
    return None if torch.version.cuda else "this torch is built without CUDA"


@pytest.mark.skipif(cuda_cannot_be_built() is not None, reason=str(cuda_cannot_be_built()))
def test_the_cuda_library_loads_without_a_gpu_and_serves_every_operator():
    made = native.build("cuda", native.AHEAD)
    served = f"""
import torch, rebalfer_kernels
torch.ops.load_library({str(made)!r})
print(*(op for op in {list(ops._SCHEMAS)!r}
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"rebalfer_kernels::{{op}}_cuda", "CUDA")))
print(torch.ops.rebalfer_kernels.cuda_problem())
"""
    out, errors = start(native.cache_directory(), "-c", served, CUDA_VISIBLE_DEVICES="").communicate(timeout=100)
    operators, problem = out.splitlines()
    assert operators.split() == [name for name in ops._SCHEMAS if name != "paired_views"], errors
    assert re.fullmatch(r"(current device|stream capture mode): .*CUDA.*", problem)  # no driver, or no device
