"""Worker processes that crash, hang or ruin their device: what the others found is kept, and the item is named."""

import os
import sys
import time
from collections import Counter

import pytest
from support.machine import ROOT

from bench.verify import gpu_tests, workers
from bench.verify.reports import Report

#: A worker that does what its items' names say; it speaks the protocol without the code that is tested.
WORKER = """
import json, os, signal, sys, time
def say(*report): os.write(int(os.environ["BENCH_WORKER_PIPE"]), json.dumps(report).encode() + b"\\n")
if sys.argv[1] == "never": sys.exit("no such device")
for item in sys.argv[1:]:
    say(item, "begun", "")
    if item == "hang": time.sleep(60)
    if item == "segv": print("last words", flush=True); os.kill(os.getpid(), signal.SIGSEGV)
    if item == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if item == "leaves": sys.exit(3)
    say(item, "failed" if item in ("wrong", "poison") else "passed", str(os.getpid()))
    if item == "poison": os._exit(17)
"""


def _run(items, processes=1, patience=0.8, seconds=20.0):
    command = [sys.executable, "-S", "-c", WORKER]
    return list(workers.run(lambda some: [*command, *some], items, processes, patience, time.monotonic() + seconds))


def test_each_item_that_ends_its_process_is_lost_and_the_others_are_checked():
    items = ["a", "segv", "b", "wrong", "hang", "poison", "c", "kill", "leaves", "d", "e"]
    found = {report.item: report for report in _run(items)}
    assert list(found) == items
    states = dict(
        zip(items, "passed lost passed failed lost failed passed lost lost passed passed".split(), strict=True)
    )
    assert {item: report.state for item, report in found.items()} == states
    assert found["segv"].text == "died of SIGSEGV\nlast words"
    assert found["kill"].text == "died of SIGKILL" and found["leaves"].text == "exit status 3"
    assert found["hang"].text == "hangs: stopped after 0.8 s"
    pids = [found[item].text for item in ("b", "wrong", "poison", "c", "d", "e")]
    same = [a == b for a, b in zip(pids, pids[1:], strict=False)]
    assert same == [True, False, False, False, True]  # after "poison" as after "hang" and "kill": another process


def test_a_worker_that_cannot_begin_is_not_started_for_ever():
    assert _run(["never", "a"]) == [
        Report("never", "lost", "its process began nothing: exit status 1\nno such device"),
        Report("a", "not run"),
    ]


@pytest.mark.parametrize(
    "command, why",
    [
        (["/nonexistent"], "FileNotFoundError: "),
        (
            [sys.executable, "-S", "-c", "import os; os.write(int(os.environ['BENCH_WORKER_PIPE']), b'?\\n')"],
            "JSONDecode",
        ),
    ],
)
def test_a_worker_that_is_not_understood_is_lost_and_not_waited_for(command, why):
    first, second = workers.run(lambda some: command, ["a", "b"], 1, 5.0, time.monotonic() + 20)
    assert first.state == "lost" and first.text.startswith(f"its process began nothing: {why}")
    assert second == Report("b", "not run")


def test_the_others_do_not_wait_for_one_that_hangs():
    found = _run(["hang", *"abcdef"], processes=2, patience=2.0)
    assert [report.item for report in found[:3]] == ["a", "c", "e"]  # every second one is the other's
    assert Counter(report.state for report in found) == {"passed": 6, "lost": 1}


def test_at_its_end_nothing_is_left_running_and_the_rest_is_named():
    start = time.monotonic()
    found = _run(["a", "hang", "b"], patience=30.0, seconds=1.0)
    assert time.monotonic() - start < 5
    assert [(r.item, r.state) for r in found] == [("a", "passed"), ("hang", "lost"), ("b", "not run")]
    assert found[1].text == "stopped, the time is up"
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[0].text), 0)


def test_each_report_is_printed_as_it_comes_and_counted_at_the_end(capsys):
    def reports():
        yield Report("a", "passed")
        assert capsys.readouterr().out == "passed a\n"
        yield Report("b", "failed", "why\nwhere")
        assert capsys.readouterr().out == "failed b: why\nwhere\n"
        yield Report("c", "not run")

    assert workers.main(reports()) == 1
    assert capsys.readouterr().out == "failed b: why\n3 items: 1 passed, 1 failed, 1 not run\n"


@pytest.mark.parametrize(
    "states, status",
    [("passed skipped", 0), ("skipped", 1), ("", 1), *((f"passed {bad}", 1) for bad in ("failed", "lost", "not run"))],
)
def test_a_check_of_nothing_is_no_success(states, status):
    found = [states[7:]] if states.endswith("not run") else []
    states = [*(s for s in states.split() if s not in ("not", "run")), *found]
    assert workers.main(iter([Report(str(i), state) for i, state in enumerate(states)])) == status


#: Tests with every fault; the fake device fails every later call of its process, as CUDA does after a bad access.
TESTS = """
import os, signal, sys, time, types
import pytest

def device(error=None):
    def synchronize():
        if error: raise RuntimeError(error)
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

pytestmark = pytest.mark.gpu

def test_cuda_a(): pass
def test_cuda_wrong(): print("seen"); assert 1 + 1 == 3
def test_cuda_dies(): os.kill(os.getpid(), signal.SIGSEGV)
def test_cuda_b(): assert "torch" not in sys.modules
def test_cuda_poisons(): device("CUDA error: an illegal memory access")
def test_cuda_c(): assert "torch" not in sys.modules
def test_cuda_well(): device()
@pytest.mark.skip(reason="needs two GPUs")
def test_cuda_two(): pass
@pytest.fixture
def broken(): yield; raise OSError("gone")
def test_cuda_teardown(broken): pass
def test_cuda_hangs(): time.sleep(60)
def test_cuda_d(): pass
def test_triton_only(): assert False
"""


def test_the_tests_of_a_backend_survive_each_others_faults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    (tmp_path / "test_faults.py").write_text(TESTS)
    (tmp_path / "test_missing.py").write_text("import no_such_module")
    (tmp_path / "test_none.py").write_text("def test_cuda_on_a_cpu(): assert False")
    reports = list(gpu_tests.run("cuda", ["."], 1, 4.0, time.monotonic() + 60))
    found = {report.item.rpartition("test_")[2]: report for report in reports}
    assert {name: report.state for name, report in found.items()} == {
        "missing.py": "failed", "cuda_a": "passed", "cuda_wrong": "failed", "cuda_dies": "lost", "cuda_b": "passed",
        "cuda_poisons": "failed", "cuda_c": "passed", "cuda_well": "passed", "cuda_two": "skipped",
        "cuda_teardown": "failed", "cuda_hangs": "lost", "cuda_d": "passed",
    }  # fmt: skip
    assert "No module named 'no_such_module'" in found["missing.py"].text
    first, *rest = found["cuda_wrong"].text.splitlines()
    assert first == "assert (1 + 1) == 3" and "seen" in rest
    assert found["cuda_dies"].text.startswith("died of SIGSEGV\n") and "test_cuda_dies" in found["cuda_dies"].text
    assert found["cuda_poisons"].text == (
        "it leaves the device unusable: RuntimeError: CUDA error: an illegal memory access"
    )
    assert found["cuda_teardown"].text.startswith("OSError: gone")
    assert found["cuda_two"].text == "Skipped: needs two GPUs"
    assert found["cuda_hangs"].text.startswith("hangs: stopped after 4 s")


def test_a_collection_that_finds_nothing_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_hangs.py").write_text("print('begun', flush=True); import time; time.sleep(60)")
    (lost,) = gpu_tests.run("cuda", ["."], 1, 2.0, time.monotonic() + 60)
    assert (lost.item, lost.state) == ("the collection of the tests", "lost")
    assert lost.text.startswith("hangs: stopped after 2 s")


def test_no_two_files_of_tests_have_one_name():
    """pytest would collect only one of them where both are asked for, as for a GPU."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
