"""Each method's loss and gradients against its formula in float64, written here from the papers without the library."""

import dataclasses
import math

import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from trainer import backbones, presets
from trainer.config import found
from trainer.data import synthetic
from trainer.data.batches import Batch, Source
from trainer.methods import Task
from trainer.methods.tables import TableHead, TableMethod

COUNTS = (40, 7, 300, 12)
N, C, H, W, L = 5, 6, 3, 4, len(COUNTS)
LABELS = torch.tensor([0, 3, 1, 1, 2])
SOFT = torch.tensor([[0.5, 0.25, 0, 0.25], [0, 0, 0, 1], [0.1, 0.8, 0.1, 0], [0, 1, 0, 0], [0.25] * 4])


def effective(beta=0.9999) -> Tensor:
    """Eq. 4 of the paper, with a sum of L."""
    w = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return torch.tensor([x * L / sum(w) for x in w], dtype=torch.float64)


def inverse() -> Tensor:
    """The weights of the released program: (sum n / 10) / n_l."""
    return torch.tensor([sum(COUNTS) / 10 / n for n in COUNTS], dtype=torch.float64)


# What the formulas are made of: features (N or 2N, C, H, W), W (L, C), b (L,), labels (N, L) as distributions.


def logits(features, weight, bias):
    return torch.stack([weight @ f.mean((1, 2)) + bias for f in features])


def cross_entropy(z, targets):
    """(N,) -sum_l t_l log(exp z_l / sum exp z)."""
    return -(targets * (z - z.exp().sum(1, keepdim=True).log())).sum(1)


def difference(features, weight, detached=True):
    """(N, L, H, W) of each class's map of an image and of its mirror image, mirrored back; Eq. 2 and 3."""
    weight = weight.detach() if detached else weight
    maps = [sum(weight[:, c, None, None] * f[c] for c in range(C)) for f in features]
    return torch.stack([a - b[:, :, range(W - 1, -1, -1)] for a, b in zip(maps[:N], maps[N:], strict=True)])


def smooth(targets, weights, alpha):
    """Eq. 8: a share alpha of each label goes to all classes by their weight."""
    return (1 - alpha) * targets + alpha * weights / L


def released_labels(targets, weights, alpha):
    """A share alpha of a label goes to the other classes, by their weight among these."""
    rows = []
    for y in range(L):
        others = torch.where(torch.arange(L) == y, torch.zeros_like(weights), weights)
        rows.append(alpha * others / others.sum() + (1 - alpha) * (torch.arange(L) == y))
    return targets @ torch.stack(rows)


def one_view(loss):
    """A loss of the image; its mirror image plays no part."""
    return lambda f, w, b, t: {"loss": loss(logits(f[:N], w, b), t)}


def summed(classification, lam, consistency):
    return {"loss": classification + lam * consistency, "classification": classification, "consistency": consistency}


def both_views(targets, weights, lam):
    """Eq. 6: cross-entropy of both views, summed (Eq. 1), and mean B_l S^2 (Eq. 5 with p = 2, v = sqrt B)."""

    def losses(f, w, b, t):
        z, t = logits(f, w, b), targets(t)
        classification = (cross_entropy(z[:N], t) + cross_entropy(z[N:], t)).mean()
        consistency = (weights[:, None, None] * difference(f, w) ** 2).mean()
        return {
            "loss": classification + lam * consistency,
            "classification": classification,
            "consistency": consistency,
        }

    return losses


def image_alone(lam, power, detached):
    """Cross-entropy of the image, and the mean of (B_l^power S)^2."""

    def losses(f, w, b, t):
        consistency = (B[:, None, None] ** power * difference(f, w, detached)).square().mean()
        return summed(cross_entropy(logits(f[:N], w, b), t).mean(), lam, consistency)

    return losses


def eac(f, w, b, t):
    return summed(cross_entropy(logits(f[:N], w, b), t).mean(), 5, (difference(f, w) ** 2).mean())


def released(f, w, b, t, lam=0.1, alpha=0.3):
    """lam * mean_i sum_l B_l mean_hw S^2, as FER.md has it, with its own soft labels on the image only."""
    classification = cross_entropy(logits(f[:N], w, b), released_labels(t, inverse(), alpha)).mean()
    return summed(classification, lam, (inverse() * (difference(f, w) ** 2).mean((2, 3))).sum(1).mean())


def adjusted(tau):
    share = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    return one_view(lambda z, t: cross_entropy(z + tau * share.log(), t).mean())


def with_consistency(classification, lam=2.0):
    """Of both views, and Eq. 5."""

    def losses(f, w, b, t):
        z = logits(f, w, b)
        consistency = (B[:, None, None] * difference(f, w) ** 2).mean()
        return summed((classification(z[:N], t) + classification(z[N:], t)).mean(), lam, consistency)

    return losses


def focal(gamma):
    return lambda z, t: (t * B * -z.log_softmax(1) * (1 - z.softmax(1)) ** gamma).sum(1)


def nla(f, w, b, t, mix=0.5, offset=0.0):
    """By scipy's normal density, sample by sample; EPOCH of EPOCHS."""
    z = logits(f, w, b)
    p, q = z.softmax(1).split(N)
    epsilon = 1 - math.exp(-15 * EPOCH / EPOCHS)
    classification = 0
    for i in range(N):
        y = int(t[i].argmax())
        others = [float(p[i, k].detach()) for k in range(L) if k != y]
        point = float(p[i, y].detach()), max(others)
        if point[0] > point[1]:
            normal = multivariate_normal([0.5, 0.5], [[0.8, -0.5 * epsilon], [-0.5 * epsilon, 0.8]])
        else:
            normal = multivariate_normal([0.30, 0.15], [[0.85, 0.80], [0.80, 0.85]])
        classification = classification + (normal.pdf(point) + offset) * cross_entropy(z[i : i + 1], t[i : i + 1])[0]
    m = (p + q) / 2
    consistency = ((p * (p / m).log() + q * (q / m).log()) / 2).sum(1).mean()
    classification = classification / N
    return {
        "loss": mix * classification + (1 - mix) * consistency,
        "classification": classification,
        "consistency": consistency,
    }


def one_against_rest(gamma):
    """Each class a yes or no: minus the log of the probability of the right answer, less of it the surer it is."""

    def loss(z, t):
        p = 1 / (1 + (-z).exp())
        of_class = -(t * (1 - p) ** gamma * p.log() + (1 - t) * p**gamma * (1 - p).log())
        return ((t * B).sum(1) * of_class.sum(1)).sum() / N

    return one_view(loss)


def enlarged(images, factors):
    """(N, K, H, W) about their centre, each pixel mixed from its four neighbours; what lies outside is the border."""
    rows = []
    for image, factor in zip(images, factors, strict=True):
        sides = []
        for n in (H, W):
            at = [min(max((i + 0.5 - n / 2) / factor + n / 2 - 0.5, 0), n - 1) for i in range(n)]
            mix = torch.zeros(n, n, dtype=torch.float64)
            for i, x in enumerate(at):
                low = min(int(x), n - 2)
                mix[i, low], mix[i, low + 1] = 1 - (x - low), x - low
            sides.append(mix)
        rows.append(torch.stack([sides[0] @ channel @ sides[1].T for channel in image]))
    return torch.stack(rows)


def transformed(other, change):
    """Both views classified, Eq. 5 between the changed maps of the first and those of the second."""

    def losses(f, w, b, t):
        first, second = f[:N], other(f[:N])
        z, t = logits(torch.cat([first, second]), w, b), smooth(t, B, 0.1)
        maps = [torch.einsum("lc,nchw->nlhw", w.detach(), x) for x in (first, second)]
        consistency = (B[:, None, None] * (change(maps[0]) - maps[1]) ** 2).mean()
        return summed((cross_entropy(z[:N], t) + cross_entropy(z[N:], t)).mean(), 2.0, consistency)

    return losses


DRAWN = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7])
FACTORS = (1 + 0.25 * DRAWN).tolist()


def brighter(f):
    """Of pixels x with f = (x - 0.4) / 0.2."""
    return ((f * 0.2 + 0.4) * (1 + 0.5 * (2 * DRAWN.double() - 1))[:, None, None, None] - 0.4) / 0.2


EPOCH, EPOCHS = 3, 60
B = effective()
FORMULAS = {
    "baseline": ("baseline", {}, one_view(lambda z, t: cross_entropy(z, t).mean())),
    "cb: divided by N": ("cb", {}, one_view(lambda z, t: cross_entropy(z, t * B).sum() / N)),
    "cb, beta 0.9": ("cb", {"beta": 0.9}, one_view(lambda z, t: cross_entropy(z, t * effective(0.9)).sum() / N)),
    "cb, sigmoid": ("cb", {"loss": "sigmoid"}, one_against_rest(0)),
    "cb, focal": ("cb", {"loss": "focal"}, one_against_rest(1)),
    "cb, focal, gamma 2": ("cb", {"loss": "focal", "gamma": 2.0}, one_against_rest(2)),
    "rac_transform, scale": (
        "rac_transform",
        {},
        transformed(lambda f: enlarged(f, FACTORS), lambda maps: enlarged(maps, FACTORS)),
    ),
    "rac_transform, intensity": (
        "rac_transform",
        {"transform": "intensity", "strength": 0.5},
        transformed(brighter, lambda maps: maps),
    ),
    "eac": ("eac", {}, eac),
    "rac": ("rac", {}, both_views(lambda t: t, B, 2.0)),
    "rac, other options": (
        "rac",
        {"consistency_weight": 3.0, "beta": 0.9},
        both_views(lambda t: t, effective(0.9), 3.0),
    ),
    "rac, lambda 0": ("rac", {"consistency_weight": 0.0}, both_views(lambda t: t, B, 0.0)),
    "rac_ablation": ("rac_ablation", {"consistency_weight": 3.5}, both_views(lambda t: t, B, 3.5)),
    "rac_ablation, image alone, all classes alike": (
        "rac_ablation",
        {"views": "original", "power": 0.0, "consistency_weight": 2.5},
        image_alone(2.5, 0, detached=True),
    ),
    "rac_ablation, image alone, B squared, not detached": (
        "rac_ablation",
        {"views": "original", "power": 1.0, "detach": False, "consistency_weight": 1.5},
        image_alone(1.5, 1, detached=False),
    ),
    "rsl": ("rsl", {}, one_view(lambda z, t: cross_entropy(z, smooth(t, B, 0.1)).mean())),
    "rsl, alpha 0.3": ("rsl", {"alpha": 0.3}, one_view(lambda z, t: cross_entropy(z, smooth(t, B, 0.3)).mean())),
    "rebalanced": ("rebalanced", {}, both_views(lambda t: smooth(t, B, 0.1), B, 2.0)),
    "rebalanced, other options": (
        "rebalanced",
        {"alpha": 0.3, "consistency_weight": 0.5, "beta": 0.9},
        both_views(lambda t: smooth(t, effective(0.9), 0.3), effective(0.9), 0.5),
    ),
    "rebalanced, released": ("rebalanced", {"convention": "released"}, released),
    "rebalanced, released, other options": (
        "rebalanced",
        {"convention": "released", "alpha": 0.2, "consistency_weight": 1.0},
        lambda *a: released(*a, lam=1.0, alpha=0.2),
    ),
    "rac_cb": ("rac_cb", {}, with_consistency(lambda z, t: cross_entropy(z, t * B))),
    "rac_logit_adjust": (
        "rac_logit_adjust",
        {"consistency_weight": 3.0, "tau": 0.5},
        with_consistency(
            lambda z, t: cross_entropy(z + 0.5 * (torch.tensor(COUNTS).double() / sum(COUNTS)).log(), t), 3.0
        ),
    ),
    "rac_focal": ("rac_focal", {}, with_consistency(focal(2.0))),
    "rac_focal, other options": (
        "rac_focal",
        {"gamma": 0.5, "consistency_weight": 1.0},
        with_consistency(focal(0.5), 1.0),
    ),
    "nla": ("nla", {}, nla),
    "nla, as in the text": ("nla", {"mix": 0.7, "offset": 1.0}, lambda *a: nla(*a, mix=0.7, offset=1.0)),
    "logit_adjust": ("logit_adjust", {}, adjusted(1.0)),
    "logit_adjust, tau 0.5": ("logit_adjust", {"tau": 0.5}, adjusted(0.5)),
}


class Features(nn.Module):
    """A backbone whose features are its images."""

    channels, mean, std = C, (0.4,), (0.2,)

    def forward(self, images):
        return images

    pair = forward


class Views:
    """A batch whose views are given."""

    epoch = EPOCH

    def __init__(self, pair, labels):
        self.views, self.labels = pair, labels

    def pair(self):
        return self.views

    def view(self):
        return self.views[:N]

    def uniform(self, draw):
        return torch.stack([DRAWN] * 4, 1)

    def __len__(self):
        return N


def built(name, options) -> TableMethod:
    torch.manual_seed(0)
    return found("methods")[name](**options).build(Features(), Task(COUNTS, EPOCHS, "reference"))


def features():
    return torch.randn(2 * N, C, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("labels", [LABELS, SOFT], ids=["classes", "distributions"])
@pytest.mark.parametrize("case", FORMULAS)
def test_loss_and_gradients_are_those_of_the_formula(case, labels):
    name, options, formula = FORMULAS[case]
    method = built(name, options).train()
    assert isinstance(method.head, TableHead) and method.head.weight.shape == (L, C)
    inputs = [features().requires_grad_(), method.head.weight, method.head.bias]
    got = method.losses(Views(inputs[0], labels))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    targets = labels.double() if labels.is_floating_point() else torch.eye(L, dtype=torch.float64)[labels]
    expected = formula(*exact, targets)
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].shape == () and got[key].item() == pytest.approx(value.item(), rel=1e-5)
    gradients = torch.autograd.grad(got["loss"], inputs)
    for gradient, truth in zip(gradients, torch.autograd.grad(expected["loss"], exact), strict=True):
        assert (gradient.double() - truth).norm() < 1e-5 * truth.norm()


def test_every_method_of_one_head_has_its_formula_here():
    """A method with modules of its own is tested in a file of its own."""
    tables = {n for n, options in found("methods").items() if isinstance(_built_or_none(options), TableMethod)}
    assert tables == {name for name, _, _ in FORMULAS.values()}


def _built_or_none(options):
    try:
        return options().build(Features(), Task(COUNTS, EPOCHS, "reference"))
    except Exception:  # it needs more of a backbone than Features has
        return None


def test_the_formulas_of_this_file_tell_the_methods_apart():
    """A factor that is left out would be seen: no two cases have the same loss."""
    exact = features().double(), *(x.detach().double() for x in (built("baseline", {}).head.weight, torch.randn(L)))
    targets = torch.eye(L, dtype=torch.float64)[LABELS]
    losses = [formula(*exact, targets)["loss"].item() for _, _, formula in FORMULAS.values()]
    assert all(abs(a - b) > 1e-3 for i, a in enumerate(losses) for b in losses[:i])


@pytest.mark.parametrize("name", ["eac", "rac", "rebalanced"])
def test_the_twin_is_compared_where_it_came_from(name):
    """A twin whose maps are the mirror image costs nothing; the same maps unmirrored do."""
    method, image = built(name, {}), features()[:N]
    for twin, consistent in ((image.flip(-1), True), (image, False), (image.flip(-2), False)):
        consistency = method.losses(Views(torch.cat([image, twin]), LABELS))["consistency"]
        assert (consistency < 1e-10) == consistent


@pytest.mark.parametrize("name", found("methods"))
def test_a_method_classifies_as_it_was_trained_to(name):
    """In training mode or not, by the logits of its head; a shift of the logits is for training only."""
    method = _built_or_none(found("methods")[name])
    if not isinstance(method, TableMethod):
        pytest.skip("it has modules of its own, and tests of its own")
    z = method.eval()(features())
    expected = logits(features().double(), method.head.weight.double(), method.head.bias.double())
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-6)
    maps = method.maps(features())
    torch.testing.assert_close(maps.mean((2, 3)) + method.head.bias, z, rtol=1e-4, atol=1e-5)  # Eq. 2 is exact


@pytest.mark.parametrize("loss", ["sigmoid", "focal"])
def test_the_classes_of_a_one_against_rest_loss_start_equally_likely(loss):
    assert built("cb", {"loss": loss}).head.bias.sigmoid().tolist() == pytest.approx([1 / L] * L)


def test_the_released_weights_are_the_numbers_in_its_program():
    counts = (1290, 281, 717, 4772, 1982, 705, 2524)  # RAF-DB, in its own order
    options = presets.released().method
    method = options.build(Features(), Task(counts, backend="reference"))
    weights = method.head.map_weights.double() ** 2 / 7
    assert weights.tolist() == pytest.approx([0.95124, 4.36690, 1.71144, 0.25715, 0.61912, 1.74057, 0.48617], abs=1e-5)


def test_the_views_of_a_batch_are_mirror_images():
    """What a method gets of real images, by the operator that makes both views."""
    config = dataclasses.replace(presets.demo(), image_size=32)
    source = Source(synthetic.draw([2] * 7, 32, seed=0), config, backbones.create(config), torch.device("cpu"))
    pair = Batch(source, torch.arange(6), epoch=0, whole=6, progress=0.0).pair()
    assert len(pair) == 12 and torch.equal(pair[6:], pair[:6].flip(-1)) and not torch.equal(pair[6:], pair[:6])
