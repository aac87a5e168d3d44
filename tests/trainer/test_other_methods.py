"""Methods with modules of their own, each against its formula, its schedule and its state."""

import math

import pytest
import timm
import torch
from torch import nn

from trainer.config import UserError, found
from trainer.methods import Task
from trainer.methods.bbn import last_block

COUNTS = (4, 3, 5)
N, C, SIDE = 10, 6, 2


class Features(nn.Module):
    """A backbone whose features are its images."""

    channels, map_size = C, (SIDE, SIDE)

    def forward(self, images):
        return images


class Source:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 0, 2])


class Batch:
    """Given features of the first images."""

    source = Source()

    def __init__(self, features, epoch=0, rows=None):
        self.features, self.epoch = features, epoch
        self.rows = torch.arange(N) if rows is None else rows

    @property
    def labels(self):
        return self.source.labels[self.rows]

    def view(self):
        return self.features

    def uniform(self, draw):
        return torch.rand(len(self.rows), 4, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def features():
    return torch.randn(N, C, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def built(name, **options):
    torch.manual_seed(0)
    return found("methods")[name](**options).build(Features(), Task(COUNTS, 60, "reference"))


def cross_entropy(z, y):
    return -math.log(math.exp(z[y]) / sum(map(math.exp, z)))


def test_scn_weighs_images_and_ranks_the_weights(features):
    method = built("scn", margin=0.5)
    losses = method.losses(Batch(features))
    pooled = features.double().mean((2, 3))
    a = [
        1 / (1 + math.exp(-x))
        for x in ((pooled @ method.attention.weight.double().T)[:, 0] + method.attention.bias).tolist()
    ]
    z = pooled @ method.head.weight.double().T + method.head.bias.double()
    z = [[a[i] * x for x in row] for i, row in enumerate(z.tolist())]
    classification = sum(cross_entropy(z[i], int(Source.labels[i])) for i in range(N)) / N
    ranked = sorted(a, reverse=True)
    ranking = max(0, 0.5 - (sum(ranked[:7]) / 7 - sum(ranked[7:]) / 3))
    assert ranking > 0.1
    assert losses["classification"].item() == pytest.approx(classification, rel=1e-5)
    assert losses["ranking"].item() == pytest.approx(ranking, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(classification + ranking, rel=1e-5)
    torch.testing.assert_close(method(features), torch.tensor(z, dtype=torch.float32), rtol=1e-5, atol=1e-6)
    assert built("scn", margin=0.0).losses(Batch(features))["ranking"].item() == 0


def test_scn_replaces_labels_from_its_epoch_on_and_keeps_them(features):
    method = built("scn")
    with torch.no_grad():
        method.attention.bias.fill_(20)  # every weight is 1
        method.head.weight.zero_()
        method.head.bias.copy_(torch.tensor([0.7, 0.0, 0.35]).log1p() * 3)
    p = method.head.bias.softmax(0).tolist()  # the same for all: class 0 leads
    assert p[0] - p[1] > 0.2 and 0.1 < p[0] - p[2] < 0.2 + 0.3
    rows = torch.tensor([3, 1, 2, 5])
    for epoch, expected in ((9, []), (10, [r for r in (1, 2, 5) if p[0] - p[int(Source.labels[r])] > 0.2])):
        batch = Batch(features[:4], epoch, rows)
        method.losses(batch)
        method.after_step(batch)
        assert [i for i, new in enumerate(method.replaced.tolist()) if new >= 0] == expected
    assert 1 in expected and all(method.replaced[i] == 0 for i in expected)
    again = built("scn")
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.replaced, method.replaced)
    z = method.head.bias.tolist()
    expected = sum(cross_entropy(z, 0 if r in expected else int(Source.labels[r])) for r in rows.tolist()) / 4
    assert method.losses(Batch(features[:4], 11, rows))["classification"].item() == pytest.approx(expected, rel=1e-4)


def test_scn_replaces_labels_of_all_parts_of_a_step(features):
    whole, parts = built("scn", relabel_margin=0.0), built("scn", relabel_margin=0.0)
    batch = Batch(features, 10)
    whole.losses(batch)
    for rows in (range(4), range(4, N)):
        parts.losses(Batch(features[list(rows)], 10, torch.tensor(list(rows))))
    for method in (whole, parts):
        method.after_step(batch)
        assert not method.seen
    assert (whole.replaced >= 0).any() and torch.equal(whole.replaced, parts.replaced)


def test_rul_mixes_pairs_by_their_uncertainty(features):
    method = built("rul", size=5, dropout=0.0).train()
    losses = method.losses(Batch(features))
    x = features.double()
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 2e-5).sqrt()

    def branch(sequence):
        y = x.flatten(1) @ sequence[3].weight.double().T + sequence[3].bias.double()
        return (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()

    mean, u = branch(method.mean), branch(method.log_variance).exp().mean(1)
    partner = Batch(features).uniform(0)[:, 0].argsort().tolist()
    assert sorted(partner) == list(range(N)) and partner != list(range(N))
    total = 0.0
    for i, j in enumerate(partner):
        mixed = (u[i] * mean[i] + u[j] * mean[j]) / (u[i] + u[j])
        z = (method.head.weight.double() @ mixed + method.head.bias.double()).tolist()
        total += 0.5 * cross_entropy(z, int(Source.labels[i])) + 0.5 * cross_entropy(z, int(Source.labels[j]))
    assert losses["loss"].item() == pytest.approx(total / N, rel=1e-4)
    assert method.rates == {"head.": 10.0}


def test_rul_classifies_by_the_mean_and_has_no_maps(features):
    method = built("rul", size=5).eval()
    torch.testing.assert_close(method(features), method.head(method.mean(features)))
    with pytest.raises(UserError, match="rul, which has no class activation maps"):
        method.maps(features)


class Blocks(Features):
    """A backbone of one block, a convolution of single pixels."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layer4 = nn.Sequential(nn.Identity(), nn.Conv2d(C, C, 1, bias=False))

    def forward(self, images):
        return self.model.layer4(images)


class Sampled(Batch):
    """Whose views are given for every row."""

    def view(self):
        return self.features[self.rows % len(self.features)]

    def at(self, rows):
        return Sampled(self.features, self.epoch, rows)


@pytest.mark.parametrize("epoch", [0, 30, 59])
def test_bbn_weighs_its_branches_by_its_schedule(features, epoch):
    torch.manual_seed(0)
    method = found("methods")["bbn"]().build(Blocks(), Task(COUNTS, 60, "reference"))
    with torch.no_grad():
        method.rebalancing.weight.mul_(-2)
    batch = Sampled(features, epoch, torch.arange(N))
    rows = method.reversed_rows(batch)
    a = 1 - (epoch / 60) ** 2

    def mean(x, weight):
        return x.double().mean((2, 3)) @ weight.double()[:, :, 0, 0].T

    first = mean(features, method.backbone.model.layer4[1].weight)
    second = mean(features[rows % N], method.rebalancing.weight)
    z = torch.cat([2 * a * first, 2 * (1 - a) * second], 1) @ method.head.weight.double().T + method.head.bias
    z = z.tolist()
    conventional = sum(cross_entropy(z[i], int(Source.labels[i])) for i in range(N)) / N
    rebalanced = sum(cross_entropy(z[i], int(Source.labels[rows[i]])) for i in range(N)) / N
    losses = method.losses(batch)
    assert losses["loss"].item() == pytest.approx(a * conventional + (1 - a) * rebalanced, rel=1e-5)
    gradients = torch.autograd.grad(losses["loss"], [method.backbone.model.layer4[1].weight, method.rebalancing.weight])
    assert (gradients[0].norm() > 0) and (gradients[1].norm() > 1e-4) == (epoch > 0)
    both = torch.cat([first, mean(features, method.rebalancing.weight)], 1)
    expected = both @ method.head.weight.double().T + method.head.bias
    torch.testing.assert_close(method(features).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_reversed_sampler_draws_classes_by_their_weights():
    method = found("methods")["bbn"]().build(Blocks(), Task((5, 3, 4), 60, "reference"))

    class Many(Sampled):
        def uniform(self, draw):
            return torch.rand(30000, 4, generator=torch.Generator().manual_seed(2))

    rows = method.reversed_rows(Many(None))
    labels = Source.labels[rows]
    n = Source.labels.bincount().tolist()
    assert n == [4, 3, 5]
    weights = [5 / 5, 5 / 3, 5 / 4]
    shares = labels.bincount() / 30000
    assert shares.tolist() == pytest.approx([w / sum(weights) for w in weights], abs=0.01)
    within = rows.bincount(minlength=12)[Source.labels == 0] / (labels == 0).sum()
    assert within.tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_the_last_block_of_the_papers_backbones():
    options = {"resnet18": "layer4.1", "mobilenetv1_100": "blocks.4.1"}
    for name, place in options.items():
        model = timm.create_model(name)
        assert last_block(model)[0] == place and model.get_submodule(place) is last_block(model)[1]
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 2), img_size=64)
    assert last_block(swin)[0] == "layers.3.blocks.1"


class Pairs(Batch):
    def pair(self):
        return self.features


@pytest.mark.parametrize("epoch", [0, 5, 40])
def test_a_mean_teacher_chooses_small_losses_and_grows_its_demands(features, epoch):
    torch.manual_seed(0)
    options = {"left_out": 0.4, "warmup": 10, "consistency_weight": 3.0, "decay": 0.75}
    method = found("methods")["mean_teacher"](**options).build(Blocks(), Task(COUNTS, 60, "reference")).train()
    with torch.no_grad():
        method.head.weight.mul_(-1.5)  # the teacher has another
    n = N // 2

    def classified(x, model, head):
        pooled = x.double().mean((2, 3)) @ model.layer4[1].weight.double()[:, :, 0, 0].T
        return (pooled @ head.weight.double().T + head.bias.double()).tolist()

    z = classified(features[:n], method.backbone.model, method.head)
    taught = classified(features[n:], method.teacher["backbone"].model, method.teacher["head"])
    labels = Source.labels[:n].tolist()
    grown = min(1, epoch / 10)
    chosen = sorted(range(n), key=lambda i: cross_entropy(taught[i], labels[i]))[: round((1 - 0.4 * grown) * n)]
    classification = sum(cross_entropy(z[i], labels[i]) for i in chosen) / len(chosen)
    p, q = (torch.tensor(x).softmax(1) for x in (z, taught))
    consistency = float((p - q).square().sum(1).mean())
    losses = method.losses(Pairs(features, epoch, torch.arange(n)))
    assert losses["classification"].item() == pytest.approx(classification, rel=1e-5)
    assert losses["consistency"].item() == pytest.approx(consistency, rel=1e-4)
    assert losses["loss"].item() == pytest.approx(classification + grown * 3 * consistency, rel=1e-5)
    for decay in (1 / 2, 2 / 3, 3 / 4, 3 / 4, 3 / 4):  # of the steps 1, 2, ...
        before = method.teacher["head"].weight.clone()
        method.after_step(None)
        expected = decay * before + (1 - decay) * method.head.weight.detach()
        torch.testing.assert_close(method.teacher["head"].weight, expected)
        with torch.no_grad():
            method.head.weight.add_(0.1)
    torch.testing.assert_close(
        method(features).double(),
        torch.tensor(classified(features, method.teacher["backbone"].model, method.teacher["head"])).double(),
        rtol=1e-4,
        atol=1e-5,
    )
    assert all(not p.requires_grad for p in method.teacher.parameters())
