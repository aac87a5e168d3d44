"""Each formulation is the same loss, and one that is not is refused."""

import math

import pytest
import torch

import rebalfer_kernels as rk
from bench import baselines, measure
from bench.cases import Case, problem

SMALL = {
    (layout, dtype): Case(3, 20, layout, dtype)
    for layout in ("nchw", "channels_last")
    for dtype in (torch.float32, torch.bfloat16)
}


@pytest.mark.parametrize("case", SMALL.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("name", baselines.FORMULATIONS)
def test_formulations_equal_float64(name, case):
    formulation, data = baselines.FORMULATIONS[name], problem(case)
    expected = baselines.truth(name, data)
    assert baselines.worst_error(formulation, data, expected) < baselines.TOLERANCE[case.dtype]
    assert baselines.worst_error(formulation, data.double(), expected) < 1e-12


@pytest.mark.parametrize("name", ["plain eager", "best eager"])
def test_formulations_compile(name):
    data = problem(SMALL["channels_last", torch.float32])
    compiled = torch.compile(baselines.FORMULATIONS[name], fullgraph=True, backend="aot_eager")
    assert baselines.worst_error(compiled, data, baselines.truth(name, data)) < 1e-5


def _lambda_off_by_a_tenth(x):
    return baselines.best_eager(x._replace(consistency_weight=1.1 * x.consistency_weight))


def _flip_left_out(x):
    image, twin = x.features.chunk(2)
    return baselines.plain_eager(x._replace(features=torch.cat([image, twin.flip(-1)])))


def _gradient_doubled(x):
    return baselines.plain_eager(x._replace(features=2 * x.features - x.features.detach()))


def _bias_forgotten(x):
    return baselines.plain_eager(x._replace(bias=x.bias.detach()))


def _not_a_number(x):
    return baselines.plain_eager(x) * math.nan


def _broken(x):
    raise RuntimeError("no compiler")


@pytest.mark.parametrize("case", SMALL.values(), ids=lambda c: c.name)
def test_wrong_formulations_are_refused(case):
    wrong = (_lambda_off_by_a_tenth, _flip_left_out, _gradient_doubled, _bias_forgotten, _not_a_number, _broken)
    formulations = {"ours": baselines.ours, **{f.__name__: f for f in wrong}}
    errors, refused = baselines.prove(problem(case), formulations)
    assert list(errors) == ["ours"] and errors["ours"] <= baselines.TOLERANCE[case.dtype]
    assert [r["contender"] for r in refused] == [f.__name__ for f in wrong]
    assert [r["error"] is None for r in refused] == [False, False, False, True, True, True]
    assert [r["reason"] for r in refused] == [None] * 5 + ["RuntimeError: no compiler"]
    assert all(r["error"] > 2 * baselines.TOLERANCE[case.dtype] for r in refused[:3])


def test_bytes_of_the_formulations_are_those_of_the_design():
    case = Case(16, 256, "channels_last", torch.float32)
    data, s = problem(case), case.floor_bytes / 4
    counted = {name: measure.bytes_moved(f, data) for name, f in baselines.FORMULATIONS.items()}
    assert 4 * s <= counted["identity"] < 4 * s + 100
    assert 6 * s < counted["best eager"] < 8 * s
    assert 14 * s < counted["plain eager"] < 20 * s
    assert 65 * s < counted["released"] < 80 * s
    explained = rk.explain(data.features, data.weight, data.targets)
    if (
        explained.bytes_moved is not None
    ):  # the reference counts nothing; explain leaves out the weight and its gradient
        assert counted["ours"] == pytest.approx(explained.bytes_moved, rel=0.03)


def test_each_fused_backend_of_a_device_is_a_contender():
    assert baselines.fused_backends("cuda")[0] == "cuda" and "reference" not in baselines.fused_backends("cpu")
    available = [name for name in baselines.fused_backends("cpu") if rk.backends()[name] == "available"]
    assert list(baselines.on_each_backend(baselines.fused_backends("cpu"))) == available
