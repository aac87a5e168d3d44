"""The programs of docs/integrations.md, each as it is written there: all end with the weights of the formulas."""

import importlib.util
import re

import pytest
import timm
import torch
from support.machine import ROOT

COUNTS = [40, 5, 12]
OPTIONS = {"backbone": "resnet10t", "channels": [8, 8, 8, 16], "stem_width": 8}
TEXT = (ROOT / "docs/integrations.md").read_text()
MODEL = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
PROGRAMS = dict(re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", TEXT, re.S | re.M))


@pytest.fixture(autouse=True, scope="module")
def float64():
    """Adam divides each gradient by its size, so that float32's rounding of a gradient near zero would be a step."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def data(float64):
    random = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 32, 32, generator=random)
    return torch.utils.data.TensorDataset(images, torch.tensor([0, 0, 1, 2, 0, 1, 0, 2, 0, 0, 1, 0]))


@pytest.fixture(scope="module")
def truth(data):
    """Weights after three steps of plain PyTorch, from the equations alone."""
    n = torch.tensor(COUNTS, dtype=torch.float64)
    weights = (1 - 0.9999) / (1 - 0.9999**n)  # Eq. 4
    weights = weights / weights.sum() * 3
    table = 0.9 * torch.eye(3) + 0.1 * weights / 3  # Eq. 8

    torch.manual_seed(0)
    backbone = timm.create_model(OPTIONS["backbone"], num_classes=0, channels=OPTIONS["channels"], stem_width=8)
    linear = torch.nn.Linear(16, 3)  # initialised as the head is
    parameters = [*backbone.parameters(), *linear.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4)
    for i in range(0, 12, 4):
        x, y = data.tensors[0][i : i + 4], data.tensors[1][i : i + 4]
        features = backbone.forward_features(torch.cat([x, x.flip(-1)]))
        log_p = linear(features.mean((2, 3))).log_softmax(1)
        classification = -(table[y].repeat(2, 1) * log_p).sum(1).mean() * 2  # Eq. 1: both views
        maps = torch.einsum("lc,mchw->mlhw", linear.weight.detach(), features)
        residual = maps[:4] - maps[4:].flip(-1)
        consistency = (weights[:, None, None] * residual.square()).mean()  # Eq. 5
        optimizer.zero_grad()
        (classification + 2 * consistency).backward()  # Eq. 6
        optimizer.step()
    return [p.detach() for p in parameters]


def test_there_are_four():
    assert list(PROGRAMS) == ["Plain PyTorch", "timm", "Lightning", "Accelerate"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_trains_as_the_formulas_do(name, data, truth, tmp_path, monkeypatch):
    package = {"Lightning": "lightning", "Accelerate": "accelerate"}.get(name, "timm")
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    scope = {
        "counts": COUNTS,
        "options": OPTIONS,
        "device": "cpu",
        "loader": torch.utils.data.DataLoader(data, batch_size=4),
        "trainer_options": {
            "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }  # fmt: skip
    exec(MODEL, scope)
    exec(PROGRAMS[name].replace('accelerator="auto"', 'accelerator="cpu"'), scope)
    model = scope["model"]
    found = [p.detach().cpu() for p in (*model.backbone.parameters(), *model.head.parameters())]
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
    torch.manual_seed(0)
    untrained = scope["Expressions"](COUNTS, **OPTIONS)
    assert all(
        (a - b.detach()).abs().max() > 1e-3 for a, b in zip(found[-2:], untrained.head.parameters(), strict=True)
    )
    model.eval()
    images = data.tensors[0][:2]
    maps = model.head.maps(model.backbone.forward_features(images))
    torch.testing.assert_close(model(images), maps.mean((2, 3)) + model.head.bias)
