"""A training step of every method, in turns."""

import json

import pytest
import torch
from support.benchmark import FakeClock

from bench import methods, page, results, step
from trainer.config import found


def test_every_method_is_timed_against_the_baseline_round_by_round(tmp_path, monkeypatch):
    taken = []

    def steps(config, name, device):
        return lambda mark: taken.append(name)

    class Clock(FakeClock):
        """A step takes 2 ms more each round; the paper's method takes thrice that, but in the last two rounds."""

        def intervals_ms(self, run):
            run(lambda: None)
            done = taken.count(taken[-1])
            return ((10.0 + 2 * done) * (3 if taken[-1] == "rebalanced" and done <= 6 else 1),)

    monkeypatch.setattr(methods, "Steps", steps)
    result, path = methods.run(step.REHEARSAL, "cpu", 0.0, tmp_path, clock=Clock(), kind="rehearsal")
    assert json.loads(path.read_text())["rows"] == result["rows"]
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows.keys() == found("methods").keys()
    assert {row["ratio"][1] for name, row in rows.items() if name != "rebalanced"} == {1.0}
    assert rows["rebalanced"]["ratio"] == [1.0, 3.0, 3.0]
    # After 3 rounds of warm-up 18 to 26 ms, and 54, 60, 66, 24, 26: the ratio of the medians would be 2.45.
    assert rows["baseline"]["ms"][1] == 22.0 and rows["rebalanced"]["ms"][1] == 54.0
    *_, table = page._method_section(result)
    assert ["`rebalanced`", "3.00×"] in table.lines
    assert [line[1] for line in table.lines] == ["1.00×"] * (len(rows) - 1) + ["3.00×"]
    assert [r["rows"] for r in results.newest_by_backbone("methods", tmp_path)] == []  # a rehearsal is no result


@pytest.mark.parametrize("name", ["mean_teacher", "scn", "rac_transform"])
def test_a_step_is_the_trainers(name):
    """Weights move, and what a method does after a step is done."""
    steps, called = methods.Steps(step.REHEARSAL, name, torch.device("cpu")), []
    method = steps.step.method
    method.after_step = lambda batch, do=method.after_step: (called.append(len(batch)), do(batch))
    before = [p.detach().clone() for p in method.parameters()]
    steps()
    assert called == [step.REHEARSAL.batch_size]
    assert any(not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))
