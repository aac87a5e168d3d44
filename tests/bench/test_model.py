"""The model of the kernels' times: its arithmetic by hand, its page, and what GPUs have measured."""

import json

import pytest

from bench import model
from bench.__main__ import main

FITTED = (
    "a800626"  # what the model's constants were fitted to; of later kernels it leaves out more of what they wait for
)
PART = {"blocks": 5, "instructions": 400, "wavefronts": 0, "cycles": 1000}


def launch(*parts, **changed):
    usual = {"cluster": 1, "resident": 2, "fetched": 0, "last": 0, "bytes": 0, "shared": 0}
    return usual | {"parts": list(parts or [PART])} | changed


def test_the_page_is_what_the_counts_give():
    assert model.PAGE.read_text() == model.page(), "python -m bench model"
    assert main(["model", "--check"]) == 0


def test_the_page_and_the_counts_are_compared(monkeypatch, tmp_path):
    launches = model.present()
    launches["forward N32 C512 nchw"]["parts"][0]["cycles"] += 5000
    other = tmp_path / "chains.json"
    other.write_text(json.dumps(launches))
    monkeypatch.setattr(model, "CHAINS", other)
    assert main(["model", "--check"]) == 1


def test_changed_kernels_are_said_to_be_others(monkeypatch):
    known = model.counted()
    newest = list(known["launches"])[-1]
    then = known["launches"][newest]
    of_newest = [row for row in model.measured() if row.commit == newest]
    monkeypatch.setattr(model, "measured", lambda: of_newest)
    assert "The kernels are still these" in model._measured(then)
    text = model._measured(then | {"forward N32 C512 nchw": launch()})
    assert "changed since in 1 of these" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| forward N32 C512 nchw"))
    assert row.endswith(f"| {model.predict(launch(), model.H200).us:.1f} |")


def test_a_measurement_is_compared_with_the_model_of_its_gpu():
    moved = launch(bytes=10**9)
    for device, gpu in (("NVIDIA H200", model.H200), ("NVIDIA H100 80GB HBM3", model.H100)):
        row = model.Measured("forward N32 C512 nchw", device, "a", 1.0)
        assert model.of_measured(row, moved) == pytest.approx(model.LAUNCH_US + 1e9 / (0.87e3 * gpu.peak_gb_per_s))
    filled = launch(bytes=10**6, shared=10**6)  # no kernel of Triton's fills
    triton = model.Measured("triton head_forward N32 C512 nchw", "NVIDIA H200", "a", 1.0)
    assert model.of_measured(triton, filled) == model.predict(filled, model.H200, fills=False).us
    assert model.of_measured(triton, filled) < model.of_measured(row, filled)


def test_a_commit_that_was_measured_knows_which_kernels_are_others_now(monkeypatch):
    for commit in model.counted()["commits"]:
        then = model.then(commit)
        monkeypatch.setattr(model, "present", lambda then=then: then)
        assert model.changed_since(commit) == []
        monkeypatch.setattr(model, "present", lambda then=then: then | {"forward N32 C512 nchw": launch()})
        assert model.changed_since(commit) == ["forward"]
        both = dict.fromkeys(["backward N32 C512 nchw", "forward N32 C512 nchw"], launch())
        monkeypatch.setattr(model, "present", lambda then=then, both=both: then | both)
        assert model.changed_since(commit) == ["forward", "backward"]
    assert model.changed_since("another") == model.changed_since(None) == []


def test_a_commit_that_was_measured_knows_which_of_tritons_kernels_are_others_now(monkeypatch):
    for commit in model.counted()["commits"]:
        then = {name: figures for name, figures in model.then(commit).items() if name.startswith("triton ")}
        (other,) = (name for name in then if name == "triton head_forward N32 C512 nchw")
        monkeypatch.setattr(model, "triton_now", lambda then=then: then)
        assert model.triton_changed_since(commit) == []
        changed = then | {other: launch() | {"kernel": "head_forward"}}
        monkeypatch.setattr(model, "triton_now", lambda changed=changed: changed)
        assert model.triton_changed_since(commit) == ["head_forward"]
    assert model.triton_changed_since("another") == model.triton_changed_since(None) == []


def test_the_kernels_that_the_model_was_fitted_to_are_within_two_fifths_and_later_ones_within_half():
    """But for those whose time is little more than that of a launch."""
    launches = model.counted()["launches"]
    rows = [row for row in model.measured() if row.us > model.SHORT_US]
    assert sum("triton" in row.launch for row in rows) >= 12 and len(rows) >= 28
    for row in rows:
        least = 1 / 1.4 if row.commit == FITTED else 0.5
        assert least < model.of_measured(row, launches[row.commit][row.launch]) / row.us < 1.4, row


def test_blocks_that_share_a_multiprocessor_wait_for_each_other():
    assert model.schedule(launch(), 132) == [1000]  # each by itself
    assert model.schedule(launch(), 3) == [1100]  # 400 instructions are 100 for each scheduler
    assert model.schedule(launch(resident=5), 1) == [1400]
    assert model.schedule(launch(resident=1), 1) == [5000]
    assert model.schedule(launch({**PART, "blocks": 8}, cluster=4), 2) == [2200]


def test_another_kind_of_block_is_slowed_as_much():
    few = {"blocks": 1, "instructions": 100, "wavefronts": 0, "cycles": 2000}
    assert model.schedule(launch(few, {**PART, "blocks": 19}, resident=4), 1) == [2600, 7500]
    assert model.schedule(launch(few, {**PART, "blocks": 3}, resident=4), 1) == [2400, 1300]  # there are but four


def test_shared_memory_is_waited_for_too():
    assert model.schedule(launch({**PART, "wavefronts": 50}, resident=5), 1) == [1600]


def test_tritons_kernels_keep_to_the_bounds_or_are_faster_by_the_model(monkeypatch):
    figures = launch(registers=169, resident=3, kernel="head_forward")
    fast, slow = (launch({**PART, "cycles": cycles}, tiles=[32, 4, 3]) for cycles in (999_000, 1_001_000))
    of = {"launches": {"forward N32 C512 nchw": [figures]}, "alternatives": {}}
    monkeypatch.setattr(model, "triton", lambda: {"3.9": of})
    figures["parts"] = [{**PART, "cycles": 1_000_000}]
    us = model.predict(figures, model.H100).us
    for other, met, says in (
        (None, False, "no tiles are known"),
        (
            slow,
            True,
            f"{us:.1f} µs; with 168 at most and 3 at least, the best tiles (32, 4, 3) take {us + 1000 / 1980:.1f}",
        ),
        (fast, False, f"the best tiles (32, 4, 3) take {us - 1000 / 1980:.1f}"),
    ):
        of["alternatives"] = {} if other is None else {"forward N32 C512 nchw": other}
        (found,) = (goal for goal in model.goals(model.present()) if "Triton" in goal[0])
        assert says in found[0] and "169 registers, 3 blocks" in found[0] and found[1] is met
    for few in ({"registers": 168, "resident": 3}, {"registers": 40, "resident": 9}):
        of["launches"]["forward N32 C512 nchw"] = [figures | few]
        assert not [goal for goal in model.goals(model.present()) if "Triton" in goal[0]]


def test_a_kernel_takes_as_long_as_the_slowest_of_waiting_and_memory():
    gpu = model.Gpu("", 5, 1.0, 1000.0)
    once = model.predict(launch(fetched=100, last=50), gpu)
    assert once.us == pytest.approx(model.LAUNCH_US + 1.0 + 0.1 + 0.05)
    assert (once.bound, once.issue_us) == ("latency", pytest.approx(0.1))
    moved = model.predict(launch(bytes=8_700_000), gpu)
    assert moved.us == pytest.approx(model.LAUNCH_US + 10.0) and moved.bound == "memory"
    assert model.predict(launch({**PART, "instructions": 3000}), gpu).bound == "issue"


def test_what_blocks_ask_for_at_once_comes_before_all_else():
    """Of 5 blocks on one multiprocessor 2 begin, each of which asks for as much as its shared memory holds."""
    gpu = model.Gpu("", 1, 1.0, 1000.0)  # 870 bytes a nanosecond
    of = launch(resident=2, bytes=5 * 1_740_000, shared=870_000)
    found = model.predict(of, gpu)
    assert found.filling_us == pytest.approx(2.0) and found.memory_us == pytest.approx(10.0)
    assert found.us == pytest.approx(model.LAUNCH_US + max(found.latency_us + 2.0, 10.0))
    assert model.predict(of, gpu, fills=False).filling_us == 0
    assert found.bound == "memory"
    slow = model.predict(launch(resident=2, bytes=5 * 87_000, shared=870_000), gpu)  # memory is done before
    assert slow.bound == "latency" and slow.us == pytest.approx(model.LAUNCH_US + slow.latency_us + 0.2)
    between = model.predict(launch({**PART, "cycles": 1}, resident=5, bytes=5 * 870_000, shared=870_000), gpu)
    assert between.latency_us < between.memory_us < between.latency_us + between.filling_us
    assert between.bound != "memory" and between.us == pytest.approx(model.LAUNCH_US + between.latency_us + 5.0)
    assert slow.filling_us == pytest.approx(0.2)


def test_the_share_is_that_of_the_bytes_that_must_move():
    name = "N512 C2048 nchw"
    launches = {f"{way} {name}": launch(bytes=205_520_896) for way in ("forward", "backward")}
    found = model.head(launches, (512, 2048), "nchw", model.H200)
    copied = 205_520_896 / (0.87 * 4.8e6)
    assert found.us == pytest.approx(2 * (copied + 0.9))
    assert found.share == pytest.approx(2 * copied / found.us)


def test_goals_are_judged():
    def with_cycles(weight, features):
        parts = {
            "forward": [PART | {"blocks": 8, "cycles": features}],
            "backward": [PART | {"blocks": 8, "cycles": weight}, PART | {"blocks": 8, "cycles": features}],
        }
        moved = {name: figures["bytes"] for name, figures in model.present().items()}
        return {name: launch(*parts[name.split()[0]], bytes=moved[name]) for name in moved}

    def missed(launches):
        return [text for text, met in model.goals(launches) if not met and "Triton" not in text]

    assert missed(with_cycles(1000, 2000)) == []
    late = missed(with_cycles(4000, 2000))  # where memory is not what takes longest
    assert len(late) == 2 and all("N = 32" in text and "ends after 2.0 µs" in text for text in late)
    assert sum("the weight's gradient ends after" in text for text in missed(with_cycles(600_000, 2000))) == 8
    slow = missed(with_cycles(50_000, 180_000))
    assert [text.partition(":")[0] for text in slow[:2]] == [
        "the paper's batch on an H100, nchw",
        "the paper's batch on an H100, channels_last",
    ]
    assert "N = 512, C = 2048 on an H100, nchw: 77% of the copy bandwidth, at least 85%" in slow
