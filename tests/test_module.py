"""RebalancedHead: nn.Linear's parameters, the same logits in training and evaluation, tables that nothing spoils."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from support import oracle
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import rebalfer_kernels as rk
from rebalfer_kernels.modules import ClassTables

COUNTS = [50, 20, 3]
WEIGHTS = rk.effective_number_weights(COUNTS)
FEATURES, TARGETS = torch.randn(4, 6, 2, 2), torch.tensor([0, 2])
TRAINED = rk.RebalancedHead(6, 3, COUNTS)


def test_head_module():
    linear = nn.Linear(6, 3)
    head = rk.RebalancedHead(6, 3, COUNTS)
    head.load_state_dict(linear.state_dict(), strict=True)
    torch.testing.assert_close(head(FEATURES), linear(FEATURES.mean((2, 3))))
    out = head(FEATURES, TARGETS)
    parameters = head.weight.detach(), head.bias.detach()
    truth = oracle.head(FEATURES, *parameters, TARGETS, rk.target_table(WEIGHTS), WEIGHTS.sqrt())
    oracle.assert_close(out.loss, truth["loss"], 1e-5)


@pytest.mark.parametrize("dtype, head_dtype", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_logits_are_those_of_training(dtype, head_dtype):
    """float32 and accumulated there, under autocast too."""
    head = rk.RebalancedHead(512, 3, COUNTS, dtype=head_dtype)
    features = (100 + torch.randn(4, 512, 7, 7)).to(dtype)
    exact = features.double().mean((2, 3)) @ head.weight.double().T + head.bias.double()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, training = head(features), head(features, torch.tensor([0, 2])).logits
        assert logits.dtype == training.dtype == torch.float32
        oracle.assert_close(logits.detach(), exact.detach(), 1e-5)
        oracle.assert_close(training.detach(), exact.detach(), 1e-5)


def test_logits_of_bad_features_are_refused():
    head = rk.RebalancedHead(3, 3, COUNTS)
    for features, error, message in (
        (torch.zeros(4, 3, 2), ValueError, r"features: got shape \(4, 3, 2\)"),
        (torch.zeros(4, 5, 2, 2), ValueError, "weight: got shape"),
        (torch.zeros(4, 3, 0, 2), ValueError, "features: got shape"),
        (torch.zeros(4, 3, 2, 2, dtype=torch.float64), TypeError, "weight: got dtype"),
        (np.zeros((4, 3, 2, 2), np.float32), TypeError, "features: got ndarray"),
    ):
        with pytest.raises(error, match=message):
            head(features)


def assert_trains_as(head, trained=TRAINED, features=FEATURES):
    """Loss and gradients of the tables and parameters that the trained head has."""
    weight, bias = (x.detach().to(head.weight.dtype).requires_grad_() for x in (trained.weight, trained.bias))
    expected = rk.rebalanced_head_loss(
        features, weight, bias, TARGETS, target_table=rk.target_table(WEIGHTS), map_weights=WEIGHTS.sqrt()
    )
    out = head(features, TARGETS)
    torch.testing.assert_close(out, expected)
    got = torch.autograd.grad(out.loss, (head.weight, head.bias))
    torch.testing.assert_close(got, torch.autograd.grad(expected.loss, (weight, bias)))
    assert set(head.state_dict()) == {"weight", "bias"}


def on_meta():
    with torch.device("meta"):
        return rk.RebalancedHead(6, 3, COUNTS)


def emptied():
    head = on_meta().to_empty(device="cpu")
    head.load_state_dict(TRAINED.state_dict())
    return head


def assigned():
    head = on_meta()
    head.load_state_dict(TRAINED.state_dict(), assign=True)
    return head


def skipped():
    head = nn.utils.skip_init(rk.RebalancedHead, 6, 3, COUNTS)
    head.load_state_dict(TRAINED.state_dict())
    return head


def with_empty_weights(monkeypatch):
    """As accelerate's ``init_empty_weights`` makes a model and ``set_module_tensor_to_device`` fills it."""
    register = nn.Module.register_parameter

    def register_on_meta(module, name, parameter):
        register(module, name, nn.Parameter(parameter.to("meta")))

    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "register_parameter", register_on_meta)
        head = rk.RebalancedHead(6, 3, COUNTS)
    assert head.weight.is_meta
    head._parameters |= {name: nn.Parameter(x.clone()) for name, x in TRAINED.state_dict().items()}
    return head


def cast_and_back():
    head = copy.deepcopy(TRAINED).half().bfloat16().float()
    head.load_state_dict(TRAINED.state_dict())
    return head


def loaded_whole():
    file = io.BytesIO()
    torch.save(TRAINED, file)
    file.seek(0)
    head = torch.load(file, weights_only=False, map_location="meta").to_empty(device="cpu")
    head.load_state_dict(TRAINED.state_dict())
    return head


def unpickled():
    return pickle.loads(pickle.dumps(TRAINED))


def replica():
    """As DataParallel makes them: the attributes of the head, and copies of its parameters."""
    head = TRAINED._replicate_for_data_parallel()
    head._parameters = {name: nn.Parameter(x) for name, x in TRAINED.state_dict().items()}
    return head


WAYS = [emptied, assigned, skipped, cast_and_back, loaded_whole, unpickled, replica]


@pytest.mark.parametrize("make", WAYS)
def test_the_tables_do_not_depend_on_how_the_parameters_came(make):
    assert_trains_as(make())


def test_empty_weight_initialisation(monkeypatch):
    assert_trains_as(with_empty_weights(monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_head_has_unrounded_tables(dtype):
    head = copy.deepcopy(TRAINED).to(dtype)
    assert_trains_as(head, TRAINED, FEATURES.to(dtype))
    assert head.target_table.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(head.target_table.float(), rk.target_table(WEIGHTS))
    assert torch.equal(head.map_weights.float(), WEIGHTS.sqrt())


def test_tables_without_data_beside_a_weight_without_data():
    head = on_meta()
    assert {t.device.type for t in (head.weight, head.target_table, head.map_weights)} == {"meta"}
    assert head(FEATURES.to("meta"), TARGETS.to("meta")).loss.device.type == "meta"


def test_the_tables_are_kept_from_the_first_call_and_from_a_move():
    for head in (rk.RebalancedHead(6, 3, COUNTS, dtype=torch.float64), copy.deepcopy(TRAINED).double()):
        kept = dict(head._tables.copies)
        assert (head.weight.device, torch.float64) in kept
        head(FEATURES.double(), TARGETS)
        assert head._tables.copies == kept and head.target_table is head.target_table


def test_tables_made_in_inference_mode_or_under_a_transform_serve_training():
    parameters = {name: x.double() for name, x in TRAINED.state_dict().items()}

    def loss(parameters):
        return torch.func.functional_call(head, parameters, (FEATURES.double(), TARGETS)).loss

    for use in (loss, torch.func.grad(loss)):
        with torch.inference_mode():
            head = copy.deepcopy(TRAINED)
            head._tables = ClassTables(tuple(COUNTS), 0.9999, 0.1, "all", 2)
        with torch.inference_mode(use is loss):
            use(parameters)
        head = head.double()
        head.load_state_dict(parameters, assign=True)
        assert_trains_as(head, TRAINED, FEATURES.double())


@pytest.mark.parametrize("make", [emptied, assigned, loaded_whole, lambda: copy.deepcopy(TRAINED).double()])
def test_a_compiled_step_reads_the_tables_and_does_not_make_them(make):
    torch._dynamo.reset()
    head, graphs = make(), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(head, fullgraph=True, backend=keep)
    features = FEATURES.to(head.weight.dtype)
    for _ in range(3):
        torch.testing.assert_close(compiled(features, TARGETS), head(features, TARGETS))
    (graph,) = graphs
    tables = [node.meta["example_value"].shape for node in graph.graph.nodes if "tables" in node.name]
    assert {torch.Size([3, 3]), torch.Size([3])} <= set(tables)
    assert not [node for node in graph.graph.nodes if node.target in (torch.tensor, torch.eye)]


def test_what_the_tables_are_made_of_can_be_read_and_not_changed():
    head = rk.RebalancedHead(6, 3, {2: 3, 0: 50, 1: 20}, beta=0.99, alpha=0.2, p=1, spread="non_target")
    weights = rk.effective_number_weights(COUNTS, 0.99)
    assert torch.equal(head.target_table, rk.target_table(weights, 0.2, spread="non_target"))
    assert torch.equal(head.map_weights, weights)
    made_of = {"class_counts": (50, 20, 3), "beta": 0.99, "alpha": 0.2, "spread": "non_target", "p": 1}
    for name, value in made_of.items():
        assert getattr(head, name) == value
        with pytest.raises(AttributeError, match=name):
            setattr(head, name, value)


def test_reset_parameters_is_that_of_linear():
    for bias in (True, False):
        torch.manual_seed(3)
        linear = nn.Linear(6, 3, bias=bias)
        torch.manual_seed(3)
        head = rk.RebalancedHead(6, 3, COUNTS, bias=bias)
        torch.testing.assert_close(head.state_dict(), linear.state_dict(), rtol=0, atol=0)


def test_numpy_numbers_are_numbers():
    options = {"beta": np.float32(0.999), "alpha": np.float64(0.1), "consistency_weight": np.float32(1.5)}
    head = rk.RebalancedHead(np.int64(6), np.int32(3), np.array(COUNTS), **options)
    plain = rk.RebalancedHead(6, 3, COUNTS, beta=float(np.float32(0.999)), consistency_weight=1.5)
    plain.load_state_dict(head.state_dict())
    for value in (None, np.float64(0.5), np.int64(3)):
        if value is not None:
            head.consistency_weight, plain.consistency_weight = value, float(value)
        torch.testing.assert_close(head(FEATURES, TARGETS), plain(FEATURES, TARGETS))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_consistency_weight_of_one_element(backend):
    head = rk.RebalancedHead(6, 3, COUNTS, consistency_weight=torch.tensor([1.5], requires_grad=True), backend=backend)
    out = head(FEATURES, TARGETS)
    assert out.loss.shape == ()
    torch.testing.assert_close(out.loss, out.classification + 1.5 * out.consistency)
    (gradient,) = torch.autograd.grad(out.loss, head.consistency_weight)
    torch.testing.assert_close(gradient, out.consistency[None])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(class_counts=[1, 2]), ValueError, "class_counts: got 2 counts"),
        (dict(class_counts={"a": 5, "b": 2, "c": 1}), ValueError, "class_counts: got the keys"),
        (dict(num_classes=True), ValueError, "num_classes: got True"),
        (dict(num_classes=1), ValueError, "num_classes: got 1"),
        (dict(in_features=6.0), ValueError, "in_features: got 6.0"),
        (dict(in_features=np.float64(6)), ValueError, "in_features: got"),
        (dict(beta=np.float32(1)), ValueError, "beta: got"),
        (dict(alpha=True), ValueError, "alpha: got True"),
        (dict(spread="some"), ValueError, "spread: got 'some'"),
        (dict(consistency_weight=True), TypeError, "consistency_weight: got True"),
        (dict(consistency_weight=torch.ones(2)), ValueError, "consistency_weight: got torch.float32 of shape"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        rk.RebalancedHead(**(dict(in_features=6, num_classes=3, class_counts=COUNTS) | change))


class Model(nn.Module):
    """A backbone with the head, called as its subclasses say."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.head = rk.RebalancedHead(6, 3, COUNTS)


class Training(Model):
    def forward(self, x, y):
        return self.head(self.body(x), y)


class PerSample(Model):
    def forward(self, x, y):
        out = self.head(self.body(x), y, reduction="none")
        return out.loss.sum(), out.logits


class Evaluation(Model):
    def forward(self, x):
        return self.head(self.body(x)), self.head.maps(self.body(x))


@pytest.mark.parametrize("kind", [Training, PerSample, Evaluation])
def test_a_symbolic_trace_keeps_the_head_as_a_leaf(kind):
    model = kind()
    traced = torch.fx.symbolic_trace(model)
    call = (torch.randn(4, 3, 4, 4),) if kind is Evaluation else (torch.randn(4, 3, 4, 4), TARGETS)
    again = pickle.loads(pickle.dumps(traced))
    for copied in (traced, again, torch.compile(traced, fullgraph=True, backend="eager")):
        torch.testing.assert_close(copied(*call), model(*call))
    assert set(traced.state_dict()) == set(model.state_dict())
    grads = [torch.autograd.grad(m(*call)[0].sum(), list(m.parameters())) for m in (traced, model)]
    torch.testing.assert_close(*grads)
    model.head.consistency_weight = 0.5  # as a leaf, the head is the model's own
    torch.testing.assert_close(traced(*call), model(*call))
    torch.testing.assert_close(
        traced.double()(call[0].double(), *call[1:]), model.double()(call[0].double(), *call[1:])
    )


def test_torchvision_extracts_features_around_the_head():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = Evaluation().eval()
    extract = extraction.create_feature_extractor(model, ["body", "head.head_logits"])
    x = torch.randn(4, 3, 4, 4)
    out = extract(x)
    torch.testing.assert_close(out["body"], model.body(x))
    torch.testing.assert_close(out["head.head_logits"], model(x)[0])


def test_a_head_can_be_built_where_tensors_are_fake():
    """As nn.Linear can; only the parameters are fake."""
    with FakeTensorMode():
        head = rk.RebalancedHead(6, 3, COUNTS)
    assert isinstance(head.weight, FakeTensor)
    torch.testing.assert_close(head.target_table, rk.target_table(rk.effective_number_weights(COUNTS)))
