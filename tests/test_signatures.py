"""A call like an earlier one is not checked again, and yet every error is raised, with the same text."""

import inspect
import os

import numpy as np
import pytest
import torch

import rebalfer_kernels as rk
from rebalfer_kernels import checks, native, signatures

LANGUAGES = ["C++", "Python"]


@pytest.fixture(params=LANGUAGES)
def described(request):
    """The function that describes a call, of either language."""
    if request.param == "Python":
        return signatures.described_in_python
    request.getfixturevalue("cpp_autograd")
    return native.autograd().described


@pytest.fixture(autouse=True)
def _in_one_language(described, monkeypatch):
    monkeypatch.setattr(signatures, "_described", described)
    monkeypatch.setattr(signatures, "describe_by", lambda faster: None)
    signatures._decided.clear()


class Word(str):
    """Equal to a str, and hashed alike."""


class Logged(torch.Tensor):
    """A tensor that says which functions it meets."""

    log: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.log.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def tensors(**names):
    """Good arguments: features of a pair, 3 channels, 2 x 2 maps, 3 classes."""
    return dict(features=torch.ones(2, 3, 2, 2), weight=torch.ones(3, 3)) | names


MAP_WEIGHTS, TABLE = torch.ones(3), torch.eye(3)
HEAD = rk.RebalancedHead(3, 3, [5, 3, 2])
#: name -> the function and its good arguments, every option among them
CALLS = {
    "class_activation_maps": (rk.class_activation_maps, tensors(backend=None)),
    "attention_consistency": (
        rk.attention_consistency,
        tensors(
            map_weights=MAP_WEIGHTS, p=2, transform="hflip", detach_cam_weight=True, reduction="mean", backend=None
        ),
    ),
    "rebalanced_cross_entropy": (
        rk.rebalanced_cross_entropy,
        dict(logits=torch.ones(2, 3), targets=torch.tensor([0, 2]), target_table=TABLE, reduction="mean", backend=None),
    ),
    "rebalanced_head_loss": (
        rk.rebalanced_head_loss,
        tensors(
            bias=torch.ones(3), targets=torch.tensor([2]), target_table=TABLE, map_weights=MAP_WEIGHTS,
            consistency_weight=2.0, p=2, transform="hflip", views="both", detach_cam_weight=True, reduction="mean",
            return_maps=False, backend=None,
        ),
    ),
    "RebalancedHead": (HEAD, dict(features=torch.ones(2, 3, 2, 2), targets=torch.tensor([2]), reduction="mean")),
}  # fmt: skip

#: What may be wrong with a tensor, made of a good one.
WRONG_TENSORS = {
    "rank": lambda x: x[None],
    "batch": lambda x: torch.cat([x, x[:1]]),
    "columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1] + 1],
    "empty": lambda x: x[..., :0],
    "integer": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.as_nested_tensor([x, x]),
    "device": lambda x: x.to("meta"),
    "gradient": lambda x: x.float().clone().requires_grad_(),
    "array": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "none": lambda x: None,
}
#: What may be wrong with an option: first of all values that are equal to a good one.
WRONG_OPTIONS = {
    "p": [2.0, np.int64(2), True, 3, torch.tensor(2), [2], None],
    "transform": [Word("hflip"), np.str_("hflip"), "flip", None, ["hflip"]],
    "views": [Word("both"), "twin", 1],
    "reduction": [Word("mean"), "sum", None],
    "detach_cam_weight": [1, 1.0, np.True_, None, "yes"],
    "return_maps": [0, 0.0, None],
    "consistency_weight": ["2", True, None, 2j, torch.tensor(2), torch.ones(2), torch.tensor(2.0, device="meta")],
    "backend": ["fast", ["cpu"], 0, "cuda"],
}


def _wrong():
    for name, (_, good) in CALLS.items():
        for argument, value in good.items():
            if isinstance(value, torch.Tensor):
                for what, make in WRONG_TENSORS.items():
                    yield pytest.param(name, argument, make(value), id=f"{name}-{argument}-{what}")
            else:
                for i, bad in enumerate(WRONG_OPTIONS[argument]):
                    yield pytest.param(name, argument, bad, id=f"{name}-{argument}-{i}")


WRONG = list(_wrong())


def error_of(function, arguments):
    """Class and text of what is raised, or None."""
    try:
        function(**arguments)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(("name", "argument", "bad"), WRONG)
def test_an_error_is_raised_after_a_good_call_as_it_is_before_any(name, argument, bad):
    function, good = CALLS[name]
    signatures._decided.clear()
    first = error_of(function, good | {argument: bad})
    for _ in range(2):
        assert error_of(function, good) is None
        assert error_of(function, good | {argument: bad}) == first
    with torch.no_grad():
        assert error_of(function, good) is None
        assert error_of(function, good | {argument: bad}) == first
    if isinstance(good[argument], torch.Tensor):
        return
    assert first is not None and argument in first[1], "a wrong option is named"


@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_a_tensor_that_is_not_dense_is_named(kind):
    for function, good in CALLS.values():
        for argument, value in good.items():
            if isinstance(value, torch.Tensor):
                error, text = error_of(function, good | {argument: WRONG_TENSORS[kind](value)})
                assert error is TypeError and text.startswith(f"{argument}: got a {kind}")


def test_most_wrong_tensors_are_errors():
    """Else the test above would compare nothing with nothing."""
    raised = [error_of(CALLS[n][0], CALLS[n][1] | {a: b}) is not None for n, a, b in (case.values for case in WRONG)]
    assert sum(raised) > 0.75 * len(raised)


def test_every_argument_of_every_function_is_among_the_calls():
    for function, good in CALLS.values():
        assert set(inspect.signature(getattr(function, "forward", function)).parameters) == set(good)


TENSOR = torch.ones(2, 3)
#: Lists of tensors, no two of which are alike, and the same of options
TENSORS = [
    (), (None,), (TENSOR,), (TENSOR, TENSOR), (TENSOR, None), (None, TENSOR), (None, None), (torch.ones(3, 2),),
    (torch.ones(3, 2).t(),), (torch.ones(2, 6)[:, ::2],), (torch.ones(6),), (torch.ones(1, 2, 3),), (torch.ones(()),),
    (torch.ones(0, 3),), (torch.ones(2, 0),), (torch.ones(2), torch.ones(3)), (TENSOR.double(),), (TENSOR.half(),),
    (TENSOR.bfloat16(),), (TENSOR.long(),), (TENSOR.to("meta"),), (TENSOR.clone().requires_grad_(),),
    (TENSOR.to("meta").requires_grad_(),),
]  # fmt: skip
OPTIONS = [
    (), (None,), (2,), (1,), (True,), (0,), (False,), (-1,), (2, 1), (1, 2), ("a",), ("ab",), ("a", "b"), ("", "ab"),
    ("ab", ""), ("a\0",), ("hflip and more",), ("é",), (b"a",), (b"",), ("",), ("mean", None), (None, "mean"), (97,),
]  # fmt: skip
DEFAULTS = [None, b"cpu", "cpu", b"triton"]
#: What has no description.
TOO_MUCH = [
    ((TENSOR.tolist(),), ()), ((TENSOR.numpy(),), ()), (("text",), ()), ((TENSOR.as_subclass(Logged),), ()),
    ((TENSOR.to_sparse(),), ()), ((torch.nested.as_nested_tensor([TENSOR]),), ()), ((), (2.0,)),
    ((), (np.int64(2),)), ((), (Word("a"),)), ((), ([1],)), ((), (TENSOR,)), ((), ((),)), ((), (1j,)),
]  # fmt: skip


def test_descriptions_differ_where_arguments_do(described):
    for all_tensors, all_options, defaults in ((TENSORS, OPTIONS[:2], DEFAULTS[:1]), (TENSORS[:3], OPTIONS, DEFAULTS)):
        seen = [described(t, o, d) for t in all_tensors for o in all_options for d in defaults]
        assert None not in seen and len(set(seen)) == len(seen)
    for tensors in TENSORS:
        like = tuple(x if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in tensors)
        if all(x is None or x.is_contiguous() for x in tensors):
            assert described(tensors, (), None) == described(like, (), None)
    assert described((torch.nn.Parameter(TENSOR),), (), None) == described((TENSOR.clone().requires_grad_(),), (), None)


@pytest.mark.parametrize(("tensors", "options"), TOO_MUCH)
def test_what_may_be_anything_has_no_description(tensors, options, described):
    assert described(tensors, options, None) is None
    assert described((), (), Word("cpu")) is None


def test_what_cpp_cannot_read_has_no_description(cpp_autograd):
    cpp = native.autograd().described
    assert cpp((), (2**70,), None) is None and cpp((), ("\udc80",), None) is None
    for wrong in ((), ((), ()), ([], (), None), ((), [], None)):
        with pytest.raises(TypeError, match="described: expected"):
            cpp(*wrong)


def test_under_a_transform_or_a_trace_there_is_no_description(described):
    seen = []

    def look(x):
        seen.append(described((TENSOR,), (), None))
        return x.sum()

    look(TENSOR)
    assert seen.pop() is not None
    torch.vmap(look)(TENSOR)
    torch.func.grad(look)(TENSOR)
    torch.func.functionalize(look)(TENSOR)
    torch.func.jvp(look, (TENSOR,), (TENSOR,))
    with torch.autograd.forward_ad.dual_level():
        look(TENSOR)
    with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):
        torch.jit.trace(look, TENSOR, check_trace=False)
    assert seen == [None] * 6
    look(TENSOR)
    assert seen.pop() is not None


@pytest.mark.skipif(rk.backends()["cpu"] != "available", reason=rk.backends()["cpu"])
def test_a_subclass_of_tensor_meets_the_operators():
    features = torch.randn(2, 3, 2, 2)
    plain = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(features=plain).loss, plain)
    for _ in range(2):
        leaf = features.clone().as_subclass(Logged).requires_grad_()
        Logged.log.clear()
        out = loss(features=leaf)
        assert type(out.loss) is Logged
        assert any("head_forward_cpu" in name for name in Logged.log)
        (got,) = torch.autograd.grad(out.loss, leaf)
        assert torch.equal(got.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("name", ["rebalanced_cross_entropy", "rebalanced_head_loss", "RebalancedHead"])
@pytest.mark.parametrize("label", [3, -1])
def test_classes_are_checked_in_every_call(name, label):
    function, good = CALLS[name]
    targets = good["targets"].clone()
    arguments = good | {"targets": targets}
    for _ in range(2):
        assert error_of(function, arguments) is None
        targets[-1] = label
        kind, text = error_of(function, arguments)
        assert kind is IndexError and text.startswith("targets")
        targets[-1] = 2


@pytest.mark.parametrize(
    ("name", "argument", "change", "message"),
    [
        ("rebalanced_head_loss", "target_table", lambda x: x.requires_grad_(), "target_table: got a tensor that requ"),
        ("rebalanced_head_loss", "map_weights", lambda x: x.resize_(2), r"map_weights: got shape \(2,\)"),
        ("rebalanced_head_loss", "bias", lambda x: setattr(x, "data", torch.ones(4)), r"bias: got shape \(4,\)"),
        ("rebalanced_head_loss", "weight", lambda x: setattr(x, "data", x.data.half()), "weight: got dtype"),
        ("attention_consistency", "features", lambda x: x.resize_(1, 3, 2, 2), "features: got a batch of 1"),
        ("class_activation_maps", "features", lambda x: x.squeeze_().resize_(2, 3, 4), "features: got shape"),
        ("rebalanced_cross_entropy", "logits", lambda x: x.t_(), r"logits: got shape|target_table: got shape"),
    ],
)
def test_a_tensor_that_was_changed_in_place_is_checked(name, argument, change, message):
    function, good = CALLS[name]
    changed = good[argument].clone()
    arguments = good | {argument: changed}
    assert error_of(function, arguments) is None
    change(changed)
    with pytest.raises((ValueError, TypeError), match=message):
        function(**arguments)


@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_signature_is_not_checked_again(name, monkeypatch):
    function, good = CALLS[name]
    called = []
    for check in ("features_and_weight", "table_matrix"):
        original = getattr(checks, check)
        monkeypatch.setattr(checks, check, lambda *a, o=original, **k: called.append(1) or o(*a, **k))
    signatures._decided.clear()
    function(**good)
    first = len(called)
    assert first
    function(**{k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in good.items()})
    assert len(called) == first
    function(
        **good
        | (
            {"logits": torch.ones(1, 3), "targets": good["targets"][:1]}
            if "logits" in good
            else {"features": torch.ones(2, 3, 4, 1)}
        )
    )
    assert len(called) > first


def loss(**changes):
    return rk.rebalanced_head_loss(**CALLS["rebalanced_head_loss"][1] | changes)


@pytest.mark.skipif(rk.backends()["cpu"] != "available", reason=rk.backends()["cpu"])
def test_the_default_backend_may_change_between_calls(monkeypatch):
    features = torch.randn(2, 3, 2, 2, requires_grad=True)

    def fused():
        return "HeadLoss" in loss(features=features).loss.grad_fn.name()

    monkeypatch.delenv("REBALFER_BACKEND", raising=False)
    assert fused()
    monkeypatch.setenv("REBALFER_BACKEND", "reference")
    assert not fused()
    monkeypatch.setenv("REBALFER_BACKEND", "fast")
    with pytest.raises(ValueError, match="REBALFER_BACKEND: got 'fast'"):
        fused()
    monkeypatch.delenv("REBALFER_BACKEND")
    assert fused()
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, "REBALFER_BACKEND": "reference"})  # a plain dict
        assert not fused()
    with torch.autograd.forward_ad.dual_level():
        assert not fused()
    assert fused()


def test_a_call_under_a_transform_is_decided_anew():
    features = torch.randn(2, 3, 2, 2)
    plain = loss(features=features).loss
    leaf = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(features=leaf).loss, leaf)
    torch.testing.assert_close(torch.func.grad(lambda f: loss(features=f).loss)(features), expected)
    torch.testing.assert_close(torch.vmap(lambda f: loss(features=f).loss)(features[None]), plain[None])
    assert torch.equal(loss(features=features).loss, plain)


def test_like_calls_that_differ_in_one_thing_have_results_of_their_own():
    """Gradient mode, which inputs require a gradient, layout, stride, λ, maps, batch: each in turn, twice."""
    features, weight = torch.randn(4, 3, 2, 2), torch.randn(3, 3)
    wide = torch.randn(4, 6, 2, 2)
    wide[:, ::2] = features
    layouts = [features, features.contiguous(memory_format=torch.channels_last), wide[:, ::2]]
    targets = torch.tensor([1, 0])
    expected = rk.reference.rebalanced_head_loss(
        features, weight, None, targets, target_table=TABLE, map_weights=MAP_WEIGHTS
    )
    for _ in range(2):
        for layout in layouts:
            for lam in (2.0, 0.5, torch.tensor(2.0), 2, np.float64(2)):
                for maps in (False, True):
                    arguments = dict(
                        weight=weight, bias=None, targets=targets, consistency_weight=lam, return_maps=maps
                    )
                    out = loss(features=layout, **arguments)
                    total = expected.classification + float(lam) * expected.consistency
                    torch.testing.assert_close(out.loss, total)
                    assert (out.maps is not None) == maps
        f, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.no_grad():
            assert not loss(features=f, weight=w, targets=targets).loss.requires_grad
        for inputs in ([f], [w], [f, w]):
            arguments = dict(features=features, weight=weight, targets=targets)
            arguments |= {"features" if x is f else "weight": x for x in inputs}
            exact = {k: x for k, x in CALLS["rebalanced_head_loss"][1].items() if k not in ("backend",)} | arguments
            grads = [
                torch.autograd.grad(function(**a).loss, inputs)
                for function, a in ((rk.reference.rebalanced_head_loss, exact), (loss, arguments))
            ]
            torch.testing.assert_close(*grads)
    one = [x[::2] for x in (features, torch.tensor([1, 0]))]
    torch.testing.assert_close(loss(features=one[0], targets=one[1]).logits.shape, (2, 3))


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(signatures, "LIMIT", 3)
    signatures._decided.clear()
    for n in (1, 2, 3, 4, 5, 1, 2):
        assert rk.class_activation_maps(torch.ones(n, 3, 2, 2), torch.ones(3, 3)).shape[0] == n
        assert len(signatures._decided) <= 3
