"""The doctor finds a wrong factor in any output or gradient, outlives a dying backend, clears only its own files."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

import rebalfer_kernels as rk
from rebalfer_kernels import dispatch, native, ops
from rebalfer_kernels.__main__ import main
from rebalfer_kernels.backend import BACKENDS, Verdict
from rebalfer_kernels.doctor import bounded, cases, environment, examination, report, selfcheck, timing

CPU = pytest.mark.skipif(rk.backends()["cpu"] != "available", reason=rk.backends()["cpu"])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    def once(call, device, **_):
        call()
        return 0.01

    for module in (examination, selfcheck):
        monkeypatch.setattr(module, "PAPER", cases.SMALL)
    for module in (environment, selfcheck):
        monkeypatch.setattr(module, "median_seconds", once)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=CPU)])
def test_a_right_backend_is_well(backend, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main(["doctor", "--backend", backend, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    (found,) = result["backends"]
    rows = [r for r in found["rows"] if r["device"] == "cpu"]
    assert {(r["op"], r["dtype"], r["layout"]) for r in rows if r["state"] == "right"} == {
        (op, dtype, layout)
        for op, (kind, *_) in cases.OPERATIONS.items()
        for dtype in ("float32", "bfloat16", "float16", "float64")
        for layout in (("rows",) if kind == "cross_entropy" else ("nchw", "channels_last"))
    }
    for row in rows:
        assert row["outputs"] <= row["limits"][0]
        assert 0 <= row["gradients"] <= row["limits"][1]
        assert row["ms"] > 0
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / found["copy_gb_per_s"]["cpu"])
    assert result["environment"]["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert f"torch             {torch.__version__}" in out
    assert f"all is well: {len(found['rows'])} right" in out


#: (operator, its output, what the doctor calls it); the two heads share the first three.
FAULTS = (
    ("head_forward", 0, "loss"),
    ("head_forward", 4, "maps"),
    ("head_backward", 1, "d_weight"),
    ("cam_backward", 0, "d_features"),
)


@CPU
def test_a_factor_of_one_percent_is_wrong(monkeypatch, tmp_path, python_autograd):
    def scaled(operator, wrong):
        def call(*arguments):
            return tuple(x * 1.01 if i in wrong else x for i, x in enumerate(operator(*arguments)))

        return call

    for name in {operator for operator, *_ in FAULTS}:
        right = ops.OPERATORS["cpu"][name]
        wrong = {output for operator, output, _ in FAULTS if operator == name}
        monkeypatch.setitem(ops.OPERATORS["cpu"], name, scaled(right, wrong))
    file = tmp_path / "report.json"
    assert main(["doctor", "--backend", "cpu", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())["backends"][0]["rows"]
    found = {(r["op"], *sorted(r["note"].split(", "))) for r in rows if r["state"] == "wrong"}
    heads = {
        (op, "d_weight 1.0e-02", "loss 1.0e-02", "maps 1.0e-02") for op in ("head", "head, per sample, not detached")
    }
    assert found == heads | {("maps", "d_features 1.0e-02")}


@CPU
def test_an_output_that_is_not_a_number_and_one_that_raises(monkeypatch, tmp_path):
    def nothing(*_):
        raise RuntimeError("launch failed\nmore")

    forward = ops.OPERATORS["cpu"]["cam_forward"]
    monkeypatch.setitem(ops.OPERATORS["cpu"], "cam_forward", lambda *a: forward(*a) * float("nan"))
    monkeypatch.setitem(ops.OPERATORS["cpu"], "cross_entropy_forward", nothing)
    file = tmp_path / "report.json"
    assert main(["doctor", "--backend", "cpu", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())["backends"][0]["rows"]
    states = {(r["op"], r["state"], r["outputs"], r["note"].split(",")[0]) for r in rows if r["state"] != "right"}
    assert states == {
        ("maps", "wrong", None, "maps inf"),
        ("cross-entropy", "failed", None, "RuntimeError: launch failed"),
    }


def test_what_a_backend_does_not_serve_is_not_wrong(monkeypatch, capsys):
    def picky(request):
        return Verdict(request.dtype != torch.float64, "float64 is not served")

    dispatch._choose_cached.cache_clear()
    monkeypatch.setattr(BACKENDS["reference"], "answer", picky)
    assert main(["doctor", "--backend", "reference"]) == 0
    dispatch._choose_cached.cache_clear()
    assert "9 combinations not served: float64 is not served" in capsys.readouterr().out


def test_a_backend_that_dies_or_hangs_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    part = examination.examine("reference", 0.0) | {"unchecked": 35, "at": "maps, float16, nchw on cuda"}
    good = examination.examine("reference", 0.0) | {"unchecked": 0}
    file = tmp_path / "report.json"
    script = tmp_path / "python"  # called as: python -c CODE BACKEND SECONDS FILE
    script.write_text(
        "#!/bin/sh\ncase $3 in\n"
        f"""cuda) echo '{json.dumps(part)}' > "$5"; echo illegal address; kill -SEGV $$;;\n"""
        "triton) sleep 100 & sleep 100;;\n"
        f"""*) echo '{json.dumps(good)}' > "$5"; echo a warning;;\nesac\n"""
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    start = time.monotonic()
    assert main(["doctor", "--seconds", "3", "--json", str(file)]) == 1
    assert time.monotonic() - start < 20
    out = capsys.readouterr().out
    assert (
        "  35 combinations left unchecked\n  DIED OF SIGSEGV at maps, float16, nchw on cuda\n  | illegal address" in out
    )
    assert "triton: not known\n  STOPPED AFTER" in out
    assert "\nreference: available\n" in out and "a warning" not in out
    assert "NOT WELL: 0 right, 35 unchecked, 2 died or stopped" in out
    reports = json.loads(file.read_text())["backends"]
    assert [bool(r["failure"]) for r in reports] == [True, True, False, False]
    assert not json.loads(file.read_text())["right"]


def test_a_backend_is_checked_in_a_process_of_its_own(tmp_path):
    found = examination.examine_apart("nonsense", 100)
    assert (found["failure"], found["at"]) == ("exit status 1", "loading")
    assert found["output"].endswith("KeyError: 'nonsense'\n")
    file = tmp_path / "report.json"
    examination.examine_into("reference", str(time.time() + 0.5), str(file))
    found = json.loads(file.read_text())
    assert found["rows"][0]["state"] == "right" and found["at"] is None
    assert len(found["rows"]) + found["unchecked"] == 36


def test_interpreted_kernels_are_checked_at_a_small_size_and_not_timed(monkeypatch):
    sizes = set()
    monkeypatch.setattr(BACKENDS["reference"], "interpreted", lambda: True)
    monkeypatch.setattr(examination, "PAPER", None)
    monkeypatch.setattr(examination, "check", lambda case, s: sizes.update(s) or {"state": "right"})
    assert all("ms" not in row for row in examination.examine("reference", 100)["rows"])
    assert sizes == {cases.SMALL, cases.ODD}


def test_a_library_that_does_not_load_is_reported_with_cause_and_mend(monkeypatch, tmp_path):
    (tmp_path / native.cpu_recipe().name()).write_text("no library")
    monkeypatch.setenv("REBALFER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("REBALFER_BUILD", "0")
    monkeypatch.setattr(native, "load", native.load.__wrapped__)  # it keeps its first answer
    text = report.section(examination.examine("cpu", 100))
    assert text.startswith("\ncpu: the library cannot be loaded: ")
    assert ".so: file too short (not built anew: REBALFER_BUILD=0; REBALFER_CACHE_DIR names" in text


def test_why_a_backend_is_absent_is_shown_in_full():
    found = {"backend": "cpu", "reason": "building failed\nx.cpp:3: error", "load_s": 9.0, "rows": [], "unchecked": 0}
    assert report.section(found | {"output": "warning\nmore\n"}).splitlines() == [
        "",
        "cpu: building failed",
        "  x.cpp:3: error",
        "  | warning",
        "  | more",
    ]


def test_what_there_was_no_time_for_is_not_called_right(capsys):
    assert main(["doctor", "--backend", "reference", "--seconds", "0"]) == 1
    assert "36 combinations left unchecked" in capsys.readouterr().out


def test_the_limit_kills_grandchildren_too_and_keeps_the_output():
    start = time.monotonic()
    code = "import os, time; os.setpgid(0, 0); time.sleep(60)"  # as ninja's compilers, in a group of its own
    outcome = bounded.run(["sh", "-c", f"{sys.executable} -c '{code}' & echo $!; sleep 60"], 1.5)
    assert time.monotonic() - start < 10
    assert outcome.status is None
    stat = Path("/proc", str(int(outcome.output)), "stat")  # of the grandchild, unless it is gone altogether
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"
    assert outcome.failure.startswith("stopped after")
    assert bounded.run(["sh", "-c", "exit 3"], 10).failure == "exit status 3"
    assert bounded.run(["sh", "-c", 'test "$A" = b'], 10, environment={"A": "b"}).failure is None


def test_clear_cache_removes_the_builds_files_and_no_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("REBALFER_CACHE_DIR", str(tmp_path))
    ours = ["rebalfer_cpu_0123456789abcdef0123.so", "cpu.lock", "build-abc/build.ninja", "build-abc/ops.o"]
    others = ["rebalfer_notes.txt", "results.so", "build-mine/keep.txt", "sub/rebalfer_cpu_0123456789abcdef0123.so"]
    for name in ours + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1234")
    assert main(["doctor", "--clear-cache"]) == 0
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(others)
    assert not (tmp_path / "build-abc").exists()
    assert capsys.readouterr().out.startswith("removed 4 files, 0.0 MiB")


def test_clear_cache_says_what_prevents_it(monkeypatch, capsys):
    def cache_directory():
        raise native.BuildError("no home directory: set REBALFER_CACHE_DIR")

    monkeypatch.setattr(native, "clear_cache", cache_directory)
    assert main(["doctor", "--clear-cache"]) == 1
    assert capsys.readouterr().err == "error: no home directory: set REBALFER_CACHE_DIR\n"


def test_clear_cache_of_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("REBALFER_CACHE_DIR", str(tmp_path / "none"))
    assert main(["doctor", "--clear-cache"]) == 0


@CPU
def test_build_prints_the_library(capsys):
    assert main(["build"]) == 0
    assert capsys.readouterr().out.strip().endswith(".so")


def test_the_environment_survives_a_broken_installation(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setattr(environment, "_gpus", lambda: 1 / 0)
    found = environment.environment()
    assert found["compiler"] is None and found["gpus"] is None
    assert found["settings"]["CXX"] == "/nonexistent/g++"
    lines = report.heading(found).splitlines()
    assert f"torch             {torch.__version__}" in lines
    assert not any(line.startswith(("compiler", "gpus")) for line in lines)


def test_the_environment_names_the_nvcc_that_builds(monkeypatch, tmp_path):
    for place in ("home/bin", "path"):
        program = tmp_path / place / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\nprintf 'Copyright\\nrelease of {place}\\nBuild\\n'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    assert environment.environment()["nvcc"] == "release of path"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert environment.environment()["nvcc"] == "release of home/bin"


def test_the_report_hides_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("REBALFER_CACHE_DIR", "/home/somebody/cache")
    assert environment.environment()["settings"]["REBALFER_CACHE_DIR"] == "~/cache"
    assert environment.environment()["cache"] == "~/cache: 0 files, 0.0 MiB"


def test_copy_bandwidth_counts_bytes_read_and_written():
    assert environment.copy_gb_per_s("cpu") == pytest.approx(2 * 2**28 / 0.01 / 1e9)


def test_the_median_leaves_out_the_warm_up(monkeypatch):
    clock, durations = [0.0], iter([50.0, 50.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.median_seconds(lambda: clock.append(clock.pop() + next(durations)), "cpu", seconds=0.0) == 2.0


def test_a_gpu_is_timed_between_two_events_around_ten_calls(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(calls)

        def synchronize(self):
            calls.append("waited")

        def elapsed_time(self, end):
            return 4.0 * (end.at - self.at)  # 4 ms a call

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing.median_seconds(lambda: calls.append("called"), "cuda", seconds=0.0) == pytest.approx(4e-3)
    assert calls == ["called"] * 2 + (["called"] * 10 + ["waited"]) * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_random_inputs_are_the_same_in_every_layout(dtype):
    x, y = (cases.random_inputs(cases.ODD, dtype, layout) for layout in ("nchw", "channels_last"))
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    assert y.features.is_contiguous(memory_format=torch.channels_last) and x.features.is_contiguous()
    assert x.features.min() == 0 and x.features.dtype == x.logits.dtype == dtype
    assert {t.dtype for t in (x.weight, x.bias, *x[4:6])} == {torch.float64 if dtype.itemsize == 8 else torch.float32}
    assert [t.requires_grad for t in x] == [True, True, True, False, False, False, True]
    other = cases.random_inputs(cases.ODD, dtype, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(x.weight, other.weight)


def test_what_is_timed_on_a_gpu_is_the_papers_batch_many_times_over():
    x = selfcheck._repeated(cases.random_inputs(cases.SMALL, torch.bfloat16, "channels_last"), "channels_last")
    assert x.features.shape == (64 * 4, 64, 7, 7) and x.logits.shape == (64 * 2, 7) and x.targets.shape == (64 * 2,)
    assert x.features.is_contiguous(memory_format=torch.channels_last)
    assert x.features.is_leaf and x.features.requires_grad and x.logits.is_leaf and x.logits.requires_grad
