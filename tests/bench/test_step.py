"""A whole training step with each head in the trainer's place."""

import dataclasses
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.benchmark import FakeClock

from bench import baselines, step


@pytest.fixture(scope="module")
def training():
    return step.Training(step.REHEARSAL, torch.device("cpu"), pool=8)


def test_the_heads_of_a_step_are_proven_on_its_features(training, monkeypatch):
    losses, errors, rejected = step.prove(training)
    assert list(losses) == ["ours", "plain eager", "released"] and not rejected
    assert max(errors.values()) < 1e-5
    monkeypatch.setitem(step.CONTENDERS, "plain eager", lambda x: 0.5 * baselines.plain_eager(x))
    losses, _, rejected = step.prove(training)
    assert list(losses) == ["ours", "released"] and [r["contender"] for r in rejected] == ["plain eager"]


def test_a_step_trains_with_every_head_alike(training):
    losses, _, _ = step.prove(training)
    batch = training.batch()
    values = [f(batch).item() for f in losses.values()]
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)
    moved = {"head.weight", "head.bias", "backbone.model.conv1.0.weight"}
    before = {k: v.detach().clone() for k, v in training.method.named_parameters()}
    training.step(losses["ours"])
    assert moved <= {k for k, v in training.method.named_parameters() if not torch.equal(v, before[k])}


def test_the_authors_step_has_the_same_loss_on_the_same_pixels(training, monkeypatch):
    """Decoded from files, called once for each view: equal but for JPEG, if nothing is random and BatchNorm frozen."""
    plain = dataclasses.replace(training.source.augment, flip=0.0, shift=0.0)
    monkeypatch.setattr(training.source, "augment", plain)
    monkeypatch.setattr(training.source, "images", torch.full_like(training.source.images, 255))
    white = torch.ones(1, 3, 64, 64)
    monkeypatch.setattr(training.files, "batch", lambda rows, workers: white.expand(len(rows), -1, -1, -1))
    training.method.eval()
    batch = training.batch()
    ours, theirs = training.ours(batch), training.as_authors(batch, None)
    training.method.train()
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


def test_the_authors_step_is_proven_and_a_wrong_one_is_not_timed(training, monkeypatch, tmp_path):
    assert step.authors_error(training) < 1e-5 and training.method.training
    released = baselines.released
    monkeypatch.setattr(baselines, "released", lambda x: 1.01 * released(x))
    assert step.authors_error(training) == pytest.approx(0.01, rel=1e-2)
    monkeypatch.setitem(step.CONTENDERS, "released", released)
    result, _ = step.run(step.REHEARSAL, "cpu", 0.0, tmp_path, clock=FakeClock(), kind="rehearsal")
    assert [row["contender"] for row in result["rows"]] == ["ours", "plain eager", "released"]
    assert [r["contender"] for r in result["rejected"]] == ["as the authors"]


def test_the_parts_of_a_step_are_the_step(training):
    """The same gradients as by the whole step, from the same batch."""
    before = training.steps
    grads = []
    for run in (lambda: training.step(training.ours), lambda: training.parts(lambda: None)):
        training.steps = before
        monkey = training.optimizer.step
        training.optimizer.step = lambda: None
        run()
        training.optimizer.step = monkey
        grads.append(torch.cat([p.grad.flatten() for p in training.method.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_files_hold_the_images(training):
    """JPEG changes a smooth image little."""
    ramp = torch.arange(64).mul(4).to(torch.uint8).expand(64, 64)[None, :, :, None]
    files = step.authors.Files(ramp, 64)
    files.transform = files.transform.transforms[2]
    with ThreadPoolExecutor(1) as workers:
        x = files.batch(torch.tensor([0, 0]), workers)
    assert x.shape == (2, 3, 64, 64)
    assert (x[1] - ramp[0, :, :, 0] / 255).abs().max() < 0.03


def test_a_whole_run_is_extrapolated_from_images_per_second(training, monkeypatch):
    now, taken = itertools.count(0.0, 0.25), []
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(training, "take", lambda batch, rate: taken.append((len(batch), rate)))
    found = step.whole_run(training, FakeClock(), seconds=0.0)
    assert found["extrapolated"] and found["steps"] == step.WARM_UP
    assert taken == [(4, training.config.learning_rate)] * 2 * step.WARM_UP  # what is not timed, too
    assert found["images_per_s"] == pytest.approx(found["steps"] * 4 / found["seconds"])
    assert found["whole_run_s"] == pytest.approx(60 * 12271 / found["images_per_s"])


def test_the_fastest_way_is_the_whole_run_and_one_that_fails_is_said(monkeypatch, tmp_path):
    """Ways as on a GPU, but that their switches are of a CPU."""
    ways = {"slow": {"threads": 1}, "fails": {"threads": 2}, "fast": {"threads": 3}}
    monkeypatch.setitem(step.WAYS, "cpu", ways)

    def whole_run(training, clock, seconds):
        threads = training.config.compute.threads
        if threads == 2:
            raise RuntimeError("no")
        return {"images_per_s": 10.0 * threads, "whole_run_s": 300.0 / threads}

    monkeypatch.setattr(step, "whole_run", whole_run)
    result, _ = step.run(step.REHEARSAL, "cpu", 0.0, tmp_path, clock=FakeClock(), kind="rehearsal")
    assert list(result["whole_runs"]) == ["slow", "fast"]
    assert result["whole_run"] == {"way": "fast", "images_per_s": 30.0, "whole_run_s": 100.0}
    assert result["errors"] == [{"part": "whole run, fails", "error": "RuntimeError: no"}]
    assert result["goals"][0]["figure"] == 100.0


def test_a_step_run_writes_its_result(tmp_path):
    result, path = step.run(step.REHEARSAL, "cpu", 0.0, tmp_path, clock=FakeClock(), kind="rehearsal")
    assert json.loads(path.read_text())["goals"] == result["goals"]
    assert [row["contender"] for row in result["rows"]] == ["ours", "plain eager", "released", "as the authors"]
    assert list(result["parts_ms"]) == list(step.PARTS)
    assert all(row["error"] < 1e-5 for row in result["rows"]) and result["rejected"] == []
    assert result["rows"][0]["ms"] == [1.0] * 3 and result["rows"][0]["images_per_s"] == pytest.approx(4000)
    assert result["goals"][0]["figure"] == result["whole_run"]["whole_run_s"]
