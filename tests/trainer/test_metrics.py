"""The metrics against scikit-learn's, and that an evaluation counts each image once, however it is cut up."""

import warnings

import numpy as np
import pytest
import sklearn.metrics as sklearn
import torch
from torch import nn

from trainer import distributed, loop, metrics
from trainer.data import Split

CLASSES = 7


def drawn(seed, without_truth=(), without_prediction=(), n=300):
    """Labels and predictions that are right in about half of the cases, without some classes."""
    random = torch.Generator().manual_seed(seed)

    def classes(without):
        kept = torch.tensor([c for c in range(CLASSES) if c not in without])
        weights = torch.rand(len(kept), generator=random) + 0.05
        return kept[weights.multinomial(n, replacement=True, generator=random)]

    labels, others = classes(without_truth), classes(without_prediction)
    right = torch.rand(n, generator=random) < 0.5
    for c in without_prediction:
        right &= labels != c
    return labels, torch.where(right, labels, others)


CASES = {
    "all classes": {},
    "a class without images": {"without_truth": (3,)},
    "a class that is never predicted": {"without_prediction": (2,)},
    "a class in neither": {"without_truth": (0, 6), "without_prediction": (6, 1)},
    "one image": {"n": 1},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn(case, seed):
    labels, predictions = drawn(seed, **CASES[case])
    matrix = metrics.confusion(labels, predictions, CLASSES)
    got = metrics.accuracies(matrix)
    truth = (labels.numpy(), predictions.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes in the predictions only
        assert matrix.tolist() == sklearn.confusion_matrix(*truth, labels=range(CLASSES)).tolist()
        assert got["overall"] == pytest.approx(100 * sklearn.accuracy_score(*truth))
        assert got["mean"] == pytest.approx(100 * sklearn.balanced_accuracy_score(*truth))
        assert got["f1"] == pytest.approx(100 * sklearn.f1_score(*truth, average="macro"))
        recalls = sklearn.recall_score(*truth, labels=range(CLASSES), average=None, zero_division=np.nan)
    assert got["per_class"] == [None if np.isnan(r) else pytest.approx(100 * r) for r in recalls]


class Sums(nn.Module):
    """Classifies an image by its first pixel, and its mirror image by its last."""

    def __init__(self):
        super().__init__()
        self.none, self.backbone = nn.Parameter(torch.zeros(())), None

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), CLASSES).float()


def plain_views(images, backbone, *, both):
    x = images.float().permute(0, 3, 1, 2)
    return torch.cat([x, x.flip(-1)]) if both else x


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("at_once", [1, 4, 256])
@pytest.mark.parametrize("flip", [False, True])
def test_each_image_is_counted_once(processes, at_once, flip, monkeypatch):
    labels, predictions = drawn(0, n=29)
    images = torch.zeros(29, 2, 2, 1, dtype=torch.uint8)
    images[:, 0, 0, 0] = images[:, 0, 1, 0] = predictions.to(torch.uint8)
    monkeypatch.setattr(loop, "EVALUATED_AT_ONCE", at_once)
    monkeypatch.setattr(loop, "views", plain_views)
    monkeypatch.setattr(distributed, "size", lambda: processes)
    monkeypatch.setattr(distributed, "total", lambda values: values)
    matrix = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        matrix += loop.evaluate(Sums(), Split(images, labels), CLASSES, flip=flip)
    expected = sklearn.confusion_matrix(labels.numpy(), predictions.numpy(), labels=range(CLASSES))
    assert matrix.sum() == 29 and matrix.tolist() == expected.tolist()
