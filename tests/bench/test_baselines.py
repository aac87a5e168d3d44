"""Each formulation is the same loss, and one that is not is refused."""

import math

import pytest
import torch

import rebalfer_kernels as rk
from bench import baselines, measure, proof
from bench.cases import DTYPES, LAYOUTS, OPS, Case, problem

SMALL = {
    (layout, dtype): Case(3, 20, layout, dtype)
    for layout in ("nchw", "channels_last")
    for dtype in (torch.float32, torch.bfloat16)
}
OTHER = [Case(3, 20, x, t, side=5, L=11, op=op) for op in OPS[:3] for x in LAYOUTS for t in DTYPES]
OTHER += [Case(5, 1, "nchw", dtype, L=9, op="cross_entropy") for dtype in DTYPES]
OTHER += [Case(3, 3, "channels_last", dtype, side=12, op="views") for dtype in DTYPES]
OTHER.append(Case(3, 20, "nchw", torch.float16))


def _equal_float64(name, case):
    formulation, data = baselines.OPERATIONS[case.op][name], problem(case)
    expected = proof.truth(name, data)
    assert len(expected) == 1 + len(data.leaves)
    assert proof.worst_error(formulation, data, expected) < proof.tolerance(data)
    if case.op != "views":  # drawn in float32
        assert proof.worst_error(formulation, data.double(), expected) < 1e-12


@pytest.mark.parametrize("case", SMALL.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("name", baselines.FORMULATIONS)
def test_formulations_equal_float64(name, case):
    _equal_float64(name, case)


@pytest.mark.parametrize("case", OTHER, ids=lambda c: c.name)
def test_formulations_of_the_other_operations_equal_float64(case):
    for name in baselines.OPERATIONS[case.op]:
        if name != "torch-cam" or case.dtype == torch.float32:
            _equal_float64(name, case)


def test_the_gradient_in_the_forward_is_the_same_and_scales():
    data = problem(SMALL["nchw", torch.float32])
    expected = proof.truth("ours", data)
    assert proof.worst_error(baselines.gradient_in_forward, data, expected) < 1e-5
    scaled = [expected[0], *(3 * gradient for gradient in expected[1:])]
    assert proof.worst_error(baselines.gradient_in_forward, data._replace(seed=torch.tensor(3.0)), scaled) < 1e-5


@pytest.mark.skipif("torch-cam" not in baselines.OPERATIONS["maps"], reason="torchcam is not installed")
def test_torch_cams_maps_are_these():
    data = problem(Case(2, 6, "nchw", torch.float32, L=3, op="maps"))
    by_hand = sum(data.weight[1, c] * data.features[0, c] for c in range(6))
    torch.testing.assert_close(baselines.maps_by_torch_cam(data)[0, 1], by_hand)


@pytest.mark.parametrize("op", ["undetached", "maps", "cross_entropy", "consistency"])
def test_wrong_results_of_the_other_operations_are_refused(op):
    data = problem(Case(3, 20, "nchw", torch.float32, op=op))
    right = baselines.OPERATIONS[op]["plain eager"]

    def detached(x):
        return baselines.plain_eager(x._replace(op="head"))

    wrong = {"scaled": lambda x: 1.001 * right(x), "shape": lambda x: right(x)[None]}
    if op == "undetached":
        wrong["detached"] = detached
    errors, refused = proof.prove(data, {"plain eager": right, **wrong})
    assert list(errors) == ["plain eager"] and [r["contender"] for r in refused] == list(wrong)


def test_contenders_are_compiled_and_more_on_request(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, mode="": modes.append(mode) or f)
    head = Case(2, 8, "nchw", torch.float32)
    few = [*baselines.FORMULATIONS, "plain eager, compiled", "best eager, compiled"]
    assert list(baselines.contenders(head)) == few and modes == ["", ""]
    assert list(baselines.contenders(head, more=True))[len(few) :] == [
        "plain eager, max-autotune", "best eager, max-autotune", "gradient in forward"
    ]  # fmt: skip
    assert modes[-1] == "max-autotune-no-cudagraphs"
    rows = head._replace(op="cross_entropy")
    assert list(baselines.contenders(rows)) == ["ours", "identity", "plain eager", "plain eager, compiled"]
    assert "released" not in baselines.contenders(head._replace(N=4096, C=2048))
    assert list(baselines.contenders(Case(2, 3, "nchw", torch.float32, op="views"))) == [
        "ours",
        "identity",
        "plain eager",
    ]


@pytest.mark.parametrize("name", ["plain eager", "best eager"])
def test_formulations_compile(name):
    data = problem(SMALL["channels_last", torch.float32])
    compiled = torch.compile(baselines.FORMULATIONS[name], fullgraph=True, backend="aot_eager")
    assert proof.worst_error(compiled, data, proof.truth(name, data)) < 1e-5


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
    errors, refused = proof.prove(problem(case), formulations)
    assert list(errors) == ["ours"] and errors["ours"] <= proof.TOLERANCE[case.dtype]
    assert [r["contender"] for r in refused] == [f.__name__ for f in wrong]
    assert [r["error"] is None for r in refused] == [False, False, False, True, True, True]
    assert [r["reason"] for r in refused] == [None] * 5 + ["RuntimeError: no compiler"]
    assert all(r["error"] > 2 * proof.TOLERANCE[case.dtype] for r in refused[:3])


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
