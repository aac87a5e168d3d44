"""The GPU's benchmark, tried without one: rotation, clocks, goals, report, training step, and the bounded check."""

import contextlib
import itertools
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import rebalfer_kernels as rk
from bench import baselines, every_op, gpu_check, gpu_goals, gpu_op, gpu_timing, op, report, step
from bench.__main__ import main
from bench.cases import CASES, Case, problem
from bench.gpu_check import Step
from rebalfer_kernels import doctor, ops

TINY = Case(2, 8, "channels_last", torch.float32)
GPU_CASES = [c for c in CASES if c.device == "cuda"]


class FakeClock(gpu_timing.WallClock):
    """Counts: an interval lasts 1 ms, and 1 ms more for each mark, 2 for each captured call."""

    def __init__(self):
        self.waits = 0
        self.replayed = 0

    def wait(self):
        self.waits += 1

    def intervals_ms(self, run):
        self.replayed = 0
        marks = itertools.count(1)
        times = []
        run(lambda: times.append(1.0 * next(marks)))
        return (*times, 1.0 + len(times) + self.replayed)

    def capture(self, run, repetitions):
        def replay():
            run()
            self.replayed += 2 * repetitions

        return replay

    def launches(self, run):
        run()
        return ["forward kernel", "backward kernel"]

    def peak_bytes(self, run):
        run()
        return 1234


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_gpus_cases_are_those_of_the_design():
    groups = {group: [c for c in GPU_CASES if c.group == group] for group in ("paper's batch", "large")}
    for dtype, (n, layout) in itertools.product(
        (torch.bfloat16, torch.float32), itertools.product((32, 64), ("nchw", "channels_last"))
    ):
        assert Case(n, 512, layout, dtype, "cuda") in groups["paper's batch"]
        assert Case(512, 2048, layout, dtype, "cuda") in groups["large"]
        assert Case(64, 2048, layout, dtype, "cuda") in GPU_CASES
    assert len(groups["paper's batch"]) == 8
    assert all(c.dtype == torch.bfloat16 for c in GPU_CASES[: len(GPU_CASES) // 2])  # the goals' dtype comes first
    assert GPU_CASES[0].group == "paper's batch" and GPU_CASES[1].group == "large"


def test_inputs_are_rotated_beyond_three_times_the_cache():
    data = problem(TINY)
    size = data.features.nbytes
    for l2, count in ((size, 3), (10 * size, 30), (10 * size + 1, 31), (1, 2)):
        problems = gpu_timing.rotated(data, l2)
        assert len(problems) == count
        assert len({p.features.data_ptr() for p in problems}) == count
        assert all(torch.equal(p.features, data.features) and p.features.requires_grad for p in problems)
        assert all(p.features.is_contiguous(memory_format=torch.channels_last) for p in problems)
        assert all(p.weight is data.weight for p in problems)


def test_a_rotation_takes_turns_and_keeps_results_until_their_turn():
    data = problem(TINY)
    problems = gpu_timing.rotated(data, data.features.nbytes)
    seen = []

    def formulation(features, *rest):
        seen.append(next(i for i, p in enumerate(problems) if p.features is features))
        return baselines.plain_eager(features, *rest)

    rotation = gpu_timing.Rotation(formulation, problems)
    marks = []
    for _ in range(4):
        rotation.both(lambda: marks.append(len(seen)))
    assert seen == [0, 0, 1, 2, 0] and marks == [2, 3, 4, 5]
    expected = baselines.truth("head", data)[1:]
    for kept in rotation.kept:
        for got, exact in zip(kept, expected, strict=True):
            assert (got - exact).norm() < 1e-5 * exact.norm()
    assert len({kept[0].data_ptr() for kept in rotation.kept}) == 3
    assert rotation.forward().item() == pytest.approx(baselines.truth("head", data)[0].item(), rel=1e-5)
    assert rotation.kept[1] is not None and rotation.kept[1].requires_grad
    rotation.clear()
    assert rotation.kept == [None] * 3


def test_graph_times_are_per_call_and_a_failed_capture_is_told():
    class Refusing(FakeClock):
        def capture(self, run, repetitions):
            if run is bad:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().capture(run, repetitions)

    def bad():
        pass

    calls = []
    timed = gpu_timing.graph_ms(Refusing(), {"good": lambda: calls.append(1), "bad": bad}, 25, 0.0)
    assert timed["good"] == pytest.approx([(2 + 100) / 25] * 3)  # 100: the fake counts both replays
    assert timed["bad"] == {"error": "RuntimeError: operation not permitted when stream is capturing"}
    assert len(calls) >= 5


def test_eager_times_have_phases_and_the_host_is_timed_unwaited():
    clock = FakeClock()
    rotation = gpu_timing.Rotation(baselines.plain_eager, gpu_timing.rotated(problem(TINY), 1))
    timed = gpu_timing.eager_ms(clock, {"plain": rotation}, 0.0)["plain"]
    assert timed == {"forward": [1.0] * 3, "backward": [2.0] * 3, "both": [3.0] * 3}
    assert clock.waits == 0
    assert gpu_timing.host_ms(clock, lambda: time.sleep(2e-3), calls=5, rounds=3) == pytest.approx(2, rel=0.9)
    assert clock.waits == 4


def test_the_cuda_clock_calls_what_torch_documents(monkeypatch):
    """No GPU is needed to see that streams, events and the graph are asked for in the right order."""
    did = []

    class Event:
        made = itertools.count()

        def __init__(self, enable_timing):
            assert enable_timing
            self.at = next(self.made)

        def record(self):
            did.append("event")

        def synchronize(self):
            did.append("synchronize")

        def elapsed_time(self, other):
            return float(10 * (other.at - self.at))

    def stream(name):
        return SimpleNamespace(wait_stream=lambda other: did.append(f"{name} waits for {other.name}"), name=name)

    @contextlib.contextmanager
    def within(what):
        did.append(f"into {getattr(what, 'name', 'graph')}")
        yield
        did.append("out")

    fakes = {
        "Event": Event, "Stream": lambda: stream("side"), "current_stream": lambda: stream("main"), "stream": within,
        "graph": within, "CUDAGraph": lambda: SimpleNamespace(replay=lambda: did.append("replay")),
        "synchronize": lambda: did.append("wait"), "current_device": lambda: 0,
        "get_device_properties": lambda i: SimpleNamespace(L2_cache_size=50),
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 100, "max_memory_allocated": lambda: 350,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = gpu_timing.CudaClock()
    assert clock.l2_bytes() == 50
    assert clock.intervals_ms(lambda mark: mark()) == (10.0, 10.0)
    assert clock.peak_bytes(lambda: did.append("run")) == 250
    did.clear()
    replay = clock.capture(lambda: did.append("run"), 2)
    warm_up = ["side waits for main", "into side", "run", "run", "run", "out", "main waits for side", "wait"]
    assert did == [*warm_up, "into graph", "run", "run", "out"]
    replay()
    assert did[-1] == "replay"


def _half_the_loss(*arguments):
    return 0.5 * baselines.plain_eager(*arguments)


def _broken(*_):
    raise RuntimeError("no compiler")


def _run(tmp_path, cases, limit=1000.0):
    def contenders():
        return {**baselines.FORMULATIONS, "wrong": _half_the_loss, "broken": _broken}

    return gpu_op.run(cases, 0.0, limit, tmp_path, clock=FakeClock(), contenders=contenders, kind="rehearsal")


def test_a_run_has_rows_of_proven_contenders_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_timing, "copy_gb_per_s", lambda *_: 50.0)
    result, path = _run(tmp_path, [TINY, TINY._replace(C=9, layout="nchw")])
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert list(tmp_path.iterdir()) == [path] and path.name.startswith("op-rehearsal-")
    refused = {(r["contender"], r["reason"]) for r in result["rejected"]}
    assert refused == {("wrong", None), ("broken", "RuntimeError: no compiler")}
    assert {row["contender"] for row in result["rows"]} == set(baselines.FORMULATIONS)
    assert len(result["rows"]) == 2 * len(baselines.FORMULATIONS)
    ours = result["rows"][0]
    assert ours["repetitions"] == 20 and ours["buffers"] == 2 and ours["errors"] == {}
    assert ours["both"] == pytest.approx([(2 + 80) / 20] * 3) == ours["forward"]
    assert ours["eager"]["both"] == [3.0] * 3
    assert (ours["launches"], ours["peak_extra_bytes"], ours["ratio_to_identity"]) == (2, 1234, 1.0)
    assert ours["kernels"] == ["forward kernel", "backward kernel"] and "kernels" not in result["rows"][1]
    assert ours["gb_per_s"] == pytest.approx(TINY.floor_bytes / 4.1 / 1e6)
    assert ours["share_of_copy"] == pytest.approx(ours["gb_per_s"] / 50)
    assert result["served_by"][TINY.name] == rk.explain(problem(TINY).features, problem(TINY).weight).backend
    for field in ("device", "driver", "torch", "triton", "cuda", "commit", "date", "goals"):
        assert field in result


def test_a_case_that_fails_is_told_and_the_next_one_measured(tmp_path, monkeypatch):
    real = gpu_op.problem
    monkeypatch.setattr(gpu_op, "problem", lambda case: 1 / 0 if case.C == 9 else real(case))
    result, path = _run(tmp_path, [TINY._replace(C=9), TINY])
    assert result["errors"] == [{"case": "N2-C9-channels_last-float32", "error": "ZeroDivisionError: division by zero"}]
    assert {row["case"] for row in result["rows"]} == {TINY.name}
    assert json.loads(path.read_text())["errors"] == result["errors"]


def test_after_an_error_of_the_device_nothing_is_measured(tmp_path, monkeypatch):
    def broken(case):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_op, "problem", broken)
    result, path = _run(tmp_path, [TINY._replace(C=9), TINY])
    assert [error["case"] for error in result["errors"]] == ["N2-C9-channels_last-float32"]
    assert result["left_out"] == json.loads(path.read_text())["left_out"] == [TINY.name] and result["rows"] == []


def test_cases_there_is_no_time_for_are_left_out_and_named(tmp_path):
    result, path = _run(tmp_path, [TINY, TINY._replace(C=9)], limit=-1.0)
    assert result["left_out"] == json.loads(path.read_text())["left_out"] == [TINY.name, "N2-C9-channels_last-float32"]
    assert result["rows"] == []


PAPER, LARGE, OTHER = "N32-C512-nchw-bfloat16", "N512-C2048-nchw-bfloat16", "N64-C2048-nchw-bfloat16"


def _rows(case, group, share=0.95, launches=2, **us):
    names = {"plain": "plain eager, compiled", "best": "best eager, compiled"}
    return [
        {
            "case": case, "group": group, "contender": names.get(name, name), "both": [0.0, t / 1e3, 0.0],
            "share_of_copy": share, "launches": launches, "gb_per_s": 4000.0, "host_ms": 0.05,
            "peak_extra_bytes": 3_500_000, "eager": {"both": [0.0, 0.07, 0.0]},
        }
        for name, t in us.items()
    ]  # fmt: skip


ROWS = [
    *_rows(PAPER, "paper's batch", share=0.3, ours=10.0, identity=12.0, plain=40.0, best=29.0, released=260.0),
    *_rows(LARGE, "large", share=0.91, ours=110.0, identity=99.0, plain=320.0, best=176.0, released=4000.0),
    *_rows(OTHER, "", share=0.1, launches=9, ours=20.0, identity=1.0, plain=60.0, best=1.0, released=400.0),
    *_rows(PAPER.replace("bfloat16", "float32"), "paper's batch", launches=7, ours=1.0, identity=1.0),
]


def test_goals_are_judged_on_their_own_cases():
    judged = {g["goal"]: (g["figure"] and round(g["figure"], 4), g["met"]) for g in gpu_goals.goals(ROWS)}
    assert judged == {
        "time against the identity op, large": (1.1111, False),
        "share of the copy bandwidth, large": (0.91, True),
        "speed-up over plain eager, compiled": (round(320 / 110, 4), False),
        "speed-up over best eager, compiled, large": (1.6, True),
        "speed-up over best eager, compiled, the paper's batch": (2.9, False),
        "speed-up over the released formulation": (20.0, False),
        "the paper's batch in a CUDA graph": (10.0, True),
        "nodes of the paper's batch in a CUDA graph": (2, True),
    }
    refused = [r for r in ROWS if (r["case"], r["contender"]) != (LARGE, "identity")]
    assert gpu_goals.goals(refused)[0]["figure"] is None and not gpu_goals.goals(refused)[0]["met"]
    ungraphed = [{**r, "both": None} for r in ROWS]
    assert not any(g["met"] for g in gpu_goals.goals(ungraphed) if "graph" in g["goal"] and "nodes" not in g["goal"])
    assert not any(g["met"] or g["figure"] for g in gpu_goals.goals([]))


@pytest.mark.parametrize("seconds, met", [(180.0, True), (180.1, False)])
def test_the_whole_runs_goal(seconds, met):
    (goal,) = gpu_goals.whole_run_goals({"whole_run_s": seconds})
    assert (goal["figure"], goal["met"]) == (seconds, met)
    assert "extrapolated" in goal["goal"]
    assert not gpu_goals.whole_run_goals(None)[0]["met"]


RESULT = {
    "kind": "cuda", "device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0",
    "date": "2027-01-02T00:00:00", "commit": "0123456789abcdef", "dirty": None, "copy_gb_per_s": 4300.0, "rows": ROWS,
    "served_by": {r["case"]: "cuda" for r in ROWS}, "left_out": ["N512-C768-channels_last-float32"],
    "goals": gpu_goals.goals(ROWS),
}  # fmt: skip
STEP = {
    "kind": "cuda", "device": "NVIDIA H200", "date": "2027-01-02T00:00:00", "commit": None, "dirty": None,
    "config": {"backbone": "resnet18", "image_size": 224, "batch_size": 32, "amp": "bf16"},
    "rows": [{"contender": "ours", "ms": [1, 7.5, 9], "images_per_s": 4266.7}],
    "goals": gpu_goals.whole_run_goals({"whole_run_s": 172.6}),
}  # fmt: skip


def test_the_report_has_a_section_of_its_own_for_a_gpu(tmp_path):
    def save(name, result, **changes):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({**result, **changes}))

    assert report.newest_gpu(tmp_path) == []
    assert "not yet run on a GPU" in report.render([], [])
    save("op-old.json", RESULT, date="2026-01-01", copy_gb_per_s=1.0)
    save("gpu/op-cuda-nvidia-h200.json", RESULT)
    save("gpu/op-rehearsal-cpu.json", RESULT, kind="rehearsal", date="2028-01-01")
    save("gpu/step-cuda-nvidia-h200.json", STEP)
    save("op-cpu.json", RESULT, kind="cpu", quiet=True, memory="fresh", device="CPU")
    assert [r["device"] for r in report.newest(tmp_path)] == ["CPU"]
    ((found, found_step),) = report.newest_gpu(tmp_path)
    assert (found, found_step) == (json.loads(json.dumps(RESULT)), json.loads(json.dumps(STEP)))
    text = report.render([], [(found, found_step)])
    assert "not yet run on a GPU" not in text
    assert "### NVIDIA H200" in text and "commit 012345678, copy bandwidth 4300 GB/s" in text
    assert (
        f"| {PAPER} | 10.00 (cuda) | - | - | 12.00 (1.20×) | 40.00 (4.00×) | 29.00 (2.90×) | 260.00 (26.00×) |" in text
    )
    assert f"| {PAPER} | 70.0 | 50.0 | 2 | 3.5 | 4000 | 30% |" in text
    assert "| the paper's batch in a CUDA graph | at most 12 µs | 10.00 µs | yes |" in text
    assert "| share of the copy bandwidth, large | at least 0.9 | 0.91 | yes |" in text
    assert "| ours | 7.50 | 4267 |" in text
    assert "extrapolated from the steady state | at most 180 s | 172.60 s | yes |" in text
    assert "Left out for want of time: N512-C768-channels_last-float32." in text
    assert "A training step" not in report.render([], [(found, None)])


@pytest.fixture(scope="module")
def training():
    return step.Training(step.REHEARSAL, torch.device("cpu"), pool=8)


def test_the_heads_of_a_step_are_proven_on_its_features(training, monkeypatch):
    losses, errors, rejected = step.prove(training)
    assert list(losses) == ["ours", "plain eager", "released"] and not rejected
    assert max(errors.values()) < 1e-5
    monkeypatch.setitem(step.CONTENDERS, "plain eager", _half_the_loss)
    monkeypatch.setitem(step.CONTENDERS, "released", _broken)
    losses, _, rejected = step.prove(training)
    assert list(losses) == ["ours"]
    assert [(r["contender"], r["reason"]) for r in rejected] == [
        ("plain eager", None), ("released", "RuntimeError: no compiler"),
    ]  # fmt: skip


def test_a_step_trains_with_every_head_alike(training):
    losses, _, _ = step.prove(training)
    x, y = training.batch()
    values = [f(x, y).item() for f in losses.values()]
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)
    moved = {"head.weight", "head.bias", "backbone.model.conv1.0.weight"}
    before = {k: v.detach().clone() for k, v in training.model.named_parameters()}
    training.step(losses["ours"])
    assert moved <= {k for k, v in training.model.named_parameters() if not torch.equal(v, before[k])}


def test_a_whole_run_is_extrapolated_from_images_per_second(training, monkeypatch):
    now = itertools.count(0.0, 0.25)
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(training, "step", lambda loss: None)
    found = step.whole_run(training, None, FakeClock(), seconds=0.0)
    assert found["extrapolated"] and found["steps"] == step.WARM_UP
    assert found["images_per_s"] == pytest.approx(found["steps"] * 4 / found["seconds"])
    assert found["whole_run_s"] == pytest.approx(60 * 12271 / found["images_per_s"])


def test_a_step_run_writes_its_result(tmp_path):
    result, path = step.run(step.REHEARSAL, "cpu", 0.0, tmp_path, clock=FakeClock(), kind="rehearsal")
    assert json.loads(path.read_text())["goals"] == result["goals"]
    assert [row["contender"] for row in result["rows"]] == ["ours", "plain eager", "released"]
    assert result["rows"][0]["ms"] == [1.0] * 3 and result["rows"][0]["images_per_s"] == pytest.approx(4000)
    assert result["goals"][0]["figure"] == result["whole_run"]["whole_run_s"]


CPU = pytest.mark.skipif(rk.backends()["cpu"] != "available", reason=rk.backends()["cpu"])


@CPU
def test_every_op_runs_all_and_fails_on_a_wrong_one(monkeypatch, capsys):
    assert every_op.main(["cpu"], "cpu", small=True) == 0
    out = capsys.readouterr().out
    assert all(f"cpu, {name}, bfloat16" in out for name in doctor.OPERATIONS)
    assert every_op.main(["cpu"], "cpu", small=False, processes=2) == 0
    assert capsys.readouterr().out == out
    backward = ops.OPERATORS["cpu"]["cam_backward"]
    monkeypatch.setitem(ops.OPERATORS["cpu"], "cam_backward", lambda *a: [g * 1.1 for g in backward(*a)])
    assert every_op.main(["cpu"], "cpu", small=True) == 1


def _python(code, **options):
    return {"command": lambda _: [sys.executable, "-c", code], **options}


def test_the_check_goes_on_past_what_fails_hangs_or_is_not_there(tmp_path, capsys):
    saved = json.dumps(
        {"goals": [{"goal": "g", "figure": 1.0, "bound": 2.0, "sense": "at most", "met": True, "unit": ""}]}
    )
    seen = tmp_path / "op-cuda-x.json"
    todo = [
        Step("good", 0.9, **_python(f"open({str(seen)!r}, 'w').write({saved!r})")),
        Step("hangs", 0.2, **_python("print('begun', flush=True); import time; time.sleep(99)"), log="doctor.txt"),
        Step("dies", 0.9, **_python("import os; os.abort()")),
        Step("errors", 0.9, **_python("print('why'); raise SystemExit(9)"), statuses={9: "errors found"}),
        Step("absent", 0.9, lambda _: ["/nonexistent/program"]),
        Step("left out", 0.9, lambda _: ["true"], skip="needs a GPU"),
        Step("environment", 0.9, **_python("import os; assert os.environ['A'] == 'b'"), environment={"A": "b"}),
    ]
    summary = gpu_check.run(tmp_path, "cpu", 12.0, todo)
    assert [(s["step"], s["state"]) for s in summary["steps"]] == [
        ("good", "passed"), ("hangs", "stopped"), ("dies", "failed"), ("errors", "failed"), ("absent", "failed"),
        ("left out", "skipped"), ("environment", "passed"),
    ]  # fmt: skip
    reasons = {s["step"]: s["reason"] for s in summary["steps"]}
    assert reasons["dies"] == "died of SIGABRT" and reasons["errors"] == "errors found"
    assert reasons["left out"] == "needs a GPU"
    assert summary["steps"][3]["output"] == "why\n"
    assert (tmp_path / "doctor.txt").read_text() == "begun\n"
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["goals"][0]["goal"] == "g" and len(summary["goals"]) == 2  # the op's, and the whole run's
    for field in ("device", "driver", "torch", "triton", "cuda", "commit", "date", "goals"):
        assert field in summary
    assert "met g: 1 (at most 2)" in gpu_check.table(summary)


def test_the_check_writes_its_summary_after_every_step(tmp_path):
    names = f"import json; print([s['step'] for s in json.load(open({str(tmp_path / 'summary.json')!r}))['steps']])"
    todo = [Step("a", 0.5, **_python("")), Step("b", 0.9, **_python(names))]
    summary = gpu_check.run(tmp_path, "cpu", 20.0, todo)
    assert summary["steps"][1]["output"] == "['a']\n"


def test_the_check_stops_when_its_time_is_up(tmp_path):
    summary = gpu_check.run(tmp_path, "cpu", 0.0, [Step("a", 1.0, **_python(""))])
    assert [(s["state"], s["reason"]) for s in summary["steps"]] == [("skipped", "no time left")]


def test_the_steps_of_the_check(tmp_path):
    on_gpu, rehearsed = gpu_check.steps(tmp_path, "cuda"), gpu_check.steps(tmp_path, "cpu")
    tests = ["cuda tests", "triton tests"]
    names = ["build cpu", "build cuda", "every op", "doctor", *tests, "op", "step", "memcheck", "racecheck"]
    assert [s.name for s in on_gpu] == [s.name for s in rehearsed] == names
    assert [s.name for s in rehearsed if s.skip] == ["build cuda", "every op", *tests, "memcheck", "racecheck"]
    assert all(("REBALFER_BUILD" in s.environment) == (not s.name.startswith("build")) for s in on_gpu)
    commands = {s.name: s.command(100.0) for s in on_gpu}
    assert "--rehearse" not in commands["op"] and "--rehearse" in rehearsed[6].command(9.0)
    assert commands["op"][commands["op"].index("--limit") + 1] == "90"
    assert commands["racecheck"][2] == "racecheck" and commands["memcheck"][-2:] == ["cuda", "triton"]
    logs = {s.log for s in on_gpu if s.log}
    assert len(logs) + len({"summary.json", "doctor.json", "op.json", "step.json"}) == 8
    left = 480.0
    for each in on_gpu:  # were each to use all it may, the later ones would still have their turn
        limit = left * each.share
        left -= limit
        assert limit >= 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_commands_say_so(tmp_path, capsys):
    assert main(["gpu-check", "--out", str(tmp_path / "out")]) == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["gpu-check", "--out", str(tmp_path / "out"), "--device", "cpu", "--only", "nothing"]) == 2
    assert "--only: got 'nothing', expected some of 'build cpu'" in capsys.readouterr().err
    assert main(["op", "--device", "cuda"]) == 2
    assert main(["step", "--device", "cuda"]) == 2


def test_the_commit_comes_from_the_environment_where_there_is_no_checkout(monkeypatch):
    monkeypatch.setattr(op, "_git", lambda *_: None)
    monkeypatch.setenv("REBALFER_COMMIT", "abc")
    assert (op.version()["commit"], op.version()["dirty"]) == ("abc", None)
    monkeypatch.delenv("REBALFER_COMMIT")
    assert op.version()["commit"] is None
