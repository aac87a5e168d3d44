"""Goals are judged by the worst of their own cases, and one with a missing figure is not met."""

import pytest
from support.benchmark import GPU_ROWS, LARGE, PAPER, rows

from bench.goals import judged, summary


def _cpu(rows, memory="fresh", **ratios):
    fixed = {"c-float32": {"forward": 2.0, "backward": 1.625}}
    return {"kind": "cpu", "memory": memory, "rows": rows, "bfloat16_over_float32": ratios, "fixed_cost": fixed}


def _figures(goals):
    return {g["goal"]: (g["figure"] and round(g["figure"], 4), g["met"]) for g in goals}


def test_a_cpus_goals_take_the_worst_case_of_float32():
    measured = [
        *rows("a-float32", ours=10, identity=8, released=150, best=12),
        *rows("b-float32", ours=10, identity=7, released=130, best=27),
        *rows("b-bfloat16", ours=10, identity=1, released=1, best=1),
    ]
    measured += rows("c-float32", "fixed cost", ours=1000, identity=1, best=1, released=1)
    assert _figures(judged("op", _cpu(measured, a=0.9, b=1.0))) == {
        "time against the identity op": (1.4286, False),
        "speed-up over plain eager, compiled": (None, False),
        "speed-up over best eager, compiled": (1.2, True),
        "speed-up over best eager, compiled, geometric mean": (1.8, True),
        "speed-up over the released formulation": (13.0, True),
        "fixed cost of a forward against the identity op, by turns": (2.0, True),
        "fixed cost of a backward against the identity op, by turns": (1.625, False),
        "time of bfloat16 against float32, by turns": (1.0, True),
    }
    goals = judged("op", _cpu(measured, "reused", a=0.9, b=1.01))
    assert goals[0]["met"] and goals[0]["bound"] == 1.5 and not goals[-1]["met"]
    assert goals[0]["cases"] == {"a-float32": 1.25, "b-float32": pytest.approx(10 / 7)}
    assert not judged("op", _cpu(measured))[-1]["met"]


def test_a_gpus_goals_are_judged_on_their_own_cases():
    def gpu(rows):
        return judged("op", {"kind": "cuda", "rows": rows})

    assert _figures(gpu([*GPU_ROWS, *rows(PAPER, "paper's batch", launches=1, cuda=10.0)])) == {
        "time against the identity op, large and wide": (1.1111, False),
        "share of the copy bandwidth, large and wide": (0.91, True),
        "fixed cost of a forward against the identity op": (None, False),
        "fixed cost of a backward against the identity op": (None, False),
        "speed-up over plain eager, compiled": (round(320 / 110, 4), False),
        "speed-up over best eager, compiled, large": (1.6, True),
        "speed-up over best eager, compiled, the paper's batch": (2.9, False),
        "speed-up over the released formulation": (20.0, False),
        "the paper's batch in a CUDA graph": (10.0, True),
        "nodes of the paper's batch in a CUDA graph, CUDA kernels": (1, True),  # of ours, by Triton, 2
    }
    smallest = rows("N1-C16-nchw-bfloat16", "fixed cost", ours=1.0, identity=1.0)
    for row, (forward, backward) in zip(smallest, ((50.0, 39.0), (20.0, 30.0)), strict=True):
        row["eager"] = {"forward": [0.0, forward, 0.0], "backward": [0.0, backward, 0.0]}
    fixed = _figures(gpu([*GPU_ROWS, *smallest]))
    assert fixed["fixed cost of a forward against the identity op"] == (2.5, True)
    assert fixed["fixed cost of a backward against the identity op"] == (1.3, True)
    narrow = rows("N512-C512-nchw-bfloat16", "large", share=0.5, ours=10.0, identity=5.0, best=15.9)
    judged_of_all = _figures(gpu([*GPU_ROWS, *narrow]))
    assert judged_of_all["share of the copy bandwidth, large and wide"] == (0.91, True)
    assert judged_of_all["speed-up over best eager, compiled, large"] == (1.59, True)
    without = gpu([*GPU_ROWS, *rows("N512-C512-nchw-bfloat16", "large", ours=10.0)])
    assert "NOT speed-up over best eager, compiled, large: measured in 1 of 2 cases" in "\n".join(map(summary, without))
    refused = [r for r in GPU_ROWS if (r["case"], r["contender"]) != (LARGE, "identity")]
    assert gpu(refused)[0]["figure"] is None and not gpu(refused)[0]["met"]
    ungraphed = [{**r, "both": None} for r in GPU_ROWS]
    assert not any(g["met"] for g in gpu(ungraphed) if "graph" in g["goal"] and "nodes" not in g["goal"])
    assert not any(g["met"] or g["figure"] for g in gpu([]))


@pytest.mark.parametrize("seconds, met", [(180.0, True), (180.1, False)])
def test_the_whole_runs_goal(seconds, met):
    (goal,) = judged("step", {"kind": "cuda", "whole_run": {"whole_run_s": seconds}})
    assert (goal["figure"], goal["met"]) == (seconds, met)
    assert "extrapolated" in goal["goal"]
    assert not judged("step", {"kind": "cuda", "whole_run": None})[0]["met"]
    assert judged("step", {"kind": "cpu", "whole_run": {"whole_run_s": seconds}}) == []
