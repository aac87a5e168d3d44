"""A step and its options, each against a computation of its own; several processes against one."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from support.machine import ROOT

import rebalfer_kernels as rk
from trainer import backbones, checkpoint, loop, optim, presets
from trainer.__main__ import main
from trainer.config import Backbone, Compute, Optim, UserError, found
from trainer.data import Split, batches, synthetic
from trainer.data.batches import Batch, Source, order
from trainer.methods import baseline
from trainer.step import Step

COUNTS = (9, 5, 6, 8, 4, 7, 9)
TINY = {"channels": [8, 8, 8, 16], "stem_width": 8}
CPU = torch.device("cpu")


def config(*, backbone=None, **changes):
    backbone = Backbone("resnet10t", TINY, **(backbone or {}))
    return dataclasses.replace(presets.demo(), image_size=32, batch_size=8, backbone=backbone, **changes)


@pytest.fixture(scope="module")
def faces():
    return synthetic.draw([3] * 7, 32, seed=0)


def batch_of(faces: Split, rows=range(8), device=CPU):
    rows = torch.tensor(list(rows), device=device)
    source = Source(faces, config(), backbones.create(config()), device)
    return Batch(source, rows, epoch=0, whole=len(rows), progress=0.0)


def test_images_that_the_device_has_no_room_for_give_the_same_batches(faces, monkeypatch):
    """The rows of a batch stay on the CPU, where nothing waits for them."""
    whole = batch_of(faces)
    source = Source(faces, config(), whole.source.backbone, CPU)
    source.resident, source.rows_on = False, CPU
    copied = []
    monkeypatch.setattr(batches, "_copied", lambda images, device: copied.append(images) or images)
    own = Batch(source, whole.rows, epoch=0, whole=len(whole), progress=0.0)
    assert torch.equal(own.pair(), whole.pair()) and torch.equal(own.labels, whole.labels)
    assert torch.equal(copied[0], faces.images[:8]) and torch.equal(own.uniform(3), whole.uniform(3))


class OnAnyDevice:
    def __init__(self, labels):
        self.labels = labels

    def to(self, device):
        return self

    def __len__(self):
        return len(self.labels)


def test_a_graph_of_images_that_stay_on_the_host_is_refused(faces, monkeypatch):
    graph = config(compute=Compute(cuda_graph=True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    with pytest.raises(UserError, match="compute.cuda_graph: got true, but 21 training images, .* more than 50%"):
        Source(Split(faces.images, OnAnyDevice(faces.labels)), graph, backbones.create(config()), torch.device("cuda"))


def gradients(method):
    return torch.cat([p.grad.flatten() for p in method.parameters()])


def test_an_epoch_has_every_image_once_in_batches_of_nearly_one_size():
    for n, size, least in ((23, 4, 1), (23, 4, 2), (5, 2, 2), (64, 64, 2), (3, 2, 2)):
        groups = order(n, size, 0, 0, least=least)
        assert torch.cat(groups).sort().values.equal(torch.arange(n))
        lengths = {len(rows) for rows in groups}
        assert max(lengths) - min(lengths) <= 1 and min(lengths) >= min(n, least)
    assert not torch.equal(torch.cat(order(64, 8, 0, 0)), torch.cat(order(64, 8, 0, 1)))
    assert not torch.equal(torch.cat(order(64, 8, 0, 0)), torch.cat(order(64, 8, 1, 0)))


def test_the_learning_rate_follows_its_formula():
    def rates(steps=4, epochs=3, **options):
        c = config(epochs=epochs, learning_rate=0.5, optim=Optim(**options))
        return [optim.learning_rate(c, e, s, steps) for e in range(epochs) for s in range(steps)]

    assert rates(schedule="constant") == [0.5] * 12
    assert rates(decay=0.9) == pytest.approx([0.5 * 0.9**e for e in range(3) for _ in range(4)])
    assert rates(decay=0.9, schedule_by="step") == pytest.approx([0.5 * 0.9 ** (i / 4) for i in range(12)])
    cosine = [0.25 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    assert rates(schedule="cosine", schedule_by="step") == pytest.approx(cosine)
    assert rates(schedule="cosine") == pytest.approx([cosine[i - i % 4] for i in range(12)])
    warm = [min(1, (i + 1) / 6) * 0.5 for i in range(12)]
    assert rates(schedule="constant", warmup_steps=6) == pytest.approx(warm)


def test_timm_is_asked_for_pytorchs_optimisers_with_the_decay_that_was_asked_for():
    c = config(optim=Optim(weight_decay=0.03))
    method = loop.build(c, COUNTS, CPU)
    adam = optim.create(c, method, CPU)
    assert type(adam) is torch.optim.Adam and {g["weight_decay"] for g in adam.param_groups} == {0.03}
    assert sum(p.numel() for g in adam.param_groups for p in g["params"]) == sum(p.numel() for p in method.parameters())
    spared = optim.create(dataclasses.replace(c, optim=Optim(weight_decay=0.03, decay_all=False)), method, CPU)
    without = [p for g in spared.param_groups if g["weight_decay"] == 0 for p in g["params"]]
    assert without and all(p.ndim <= 1 for p in without)
    method.rates = {"head.": 10.0}
    optim.set_learning_rate(fast := optim.create(c, method, CPU), 0.01)
    rates = {p: g["lr"] for g in fast.param_groups for p in g["params"]}
    assert rates[method.head.weight] == pytest.approx(0.1)
    assert {rates[p] for p in method.backbone.parameters()} == {0.01}
    with pytest.raises(UserError, match="optim.optimizer: got 'adan2', expected adam"):
        optim.create(dataclasses.replace(c, optim=Optim("adan2")), method, CPU)
    with pytest.raises(UserError, match="optim.options: got .*momentums"):
        optim.create(dataclasses.replace(c, optim=Optim(options={"momentums": 1})), method, CPU)


def test_accumulated_parts_have_the_gradient_and_the_losses_of_the_whole(faces):
    found = []
    for accumulate in (1, 3):
        c = config(optim=Optim(accumulate=accumulate), backbone={"frozen_batchnorm": True})
        step = Step(c, loop.build(c, COUNTS, CPU).train(), CPU)
        sums = step(batch_of(faces), 0.0)
        found.append((gradients(step.method), sums))
    (whole, sums), (parts, sums_of_parts) = found
    assert whole.norm() > 0.1
    assert (whole - parts).norm() < 1e-5 * whole.norm()
    torch.testing.assert_close(sums, sums_of_parts)


def test_the_losses_are_summed_over_images(faces):
    c = config()
    step = Step(c, loop.build(c, COUNTS, CPU).train(), CPU)
    losses = loop.build(c, COUNTS, CPU).train().losses(batch_of(faces))
    sums = step(batch_of(faces), 0.0)
    assert step.names == ["loss", "classification", "consistency"] == list(losses)
    torch.testing.assert_close(sums, 8 * torch.stack(list(losses.values())).detach())


def test_the_gradient_is_clipped_by_its_norm_over_all_parameters(faces):
    free, clipped = (
        Step(c, loop.build(c, COUNTS, CPU).train(), CPU) for c in (config(), config(optim=Optim(clip=0.2)))
    )
    for step in (free, clipped):
        step(batch_of(faces), 0.0)
    a, b = gradients(free.method), gradients(clipped.method)
    assert a.norm() > 0.2 and b.norm() == pytest.approx(0.2, rel=1e-4)
    torch.testing.assert_close(b, a * (0.2 / a.norm()), rtol=1e-4, atol=1e-7)


def test_the_moving_average_is_the_recursion_of_its_formula_and_classifies(faces):
    c = config(optim=Optim(average=0.7))
    method = loop.build(c, COUNTS, CPU).train()
    step = Step(c, method, CPU)
    expected = method.head.weight.detach().clone()
    for i in range(5):
        step(batch_of(faces, range(i, i + 8)), 1e-2)
        t = max(0, i + 1 - 1)  # the first step is copied; then the decay grows to its value
        decay = min(0.7, 1 - (1 + t) ** (-2 / 3)) if t else 0.0
        expected += (1 - decay) * (method.head.weight.detach() - expected)
    assert step.evaluated is not method
    torch.testing.assert_close(step.evaluated.head.weight.detach(), expected)
    assert (expected - method.head.weight).abs().max() > 1e-4


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_mixed_precision_step_moves_nearly_as_a_float32_step(faces, amp):
    full, mixed = (
        Step(c, loop.build(c, COUNTS, CPU).train(), CPU) for c in (config(), config(compute=Compute(amp=amp)))
    )
    assert mixed.method.backbone(batch_of(faces).view()).dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    for step in (full, mixed):
        step(batch_of(faces), 0.0)
    a, b = gradients(full.method), gradients(mixed.method)  # the step has taken the scale out again
    assert 1e-5 < (a - b).norm() / a.norm() < {"bf16": 0.3, "fp16": 0.15}[amp]


def test_a_float16_step_that_overflows_is_skipped_and_the_scale_halved(faces):
    c = config(compute=Compute(amp="fp16"))
    step = Step(c, loop.build(c, COUNTS, CPU).train(), CPU)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = [p.detach().clone() for p in step.method.parameters()]
    assert step(batch_of(faces), 1e-2).isfinite().all()
    assert all(torch.equal(p, q) for p, q in zip(step.method.parameters(), before, strict=True))
    assert step.scaler.get_scale() == 2.0**119


@pytest.mark.parametrize("method", ["rebalanced", "eac"])
def test_two_hundred_steps_by_the_fused_operators_are_those_by_the_reference(method):
    """To 1e-4, or to twice what a last bit of the weights it starts with is worth: training multiplies it."""
    if rk.backends()["cpu"] != "available":
        pytest.skip(rk.backends()["cpu"])
    faces = synthetic.draw([6, 2, 4, 20, 6, 4, 14], 32, seed=0)

    def curve(backend: str, nudge: float = 0.0) -> torch.Tensor:
        c = config(method=found("methods")[method](), compute=Compute(device="cpu", backend=backend))
        step, rate = Step(c, built := loop.build(c, tuple(faces.counts(7)), CPU), CPU), presets.paper().learning_rate
        with torch.no_grad():
            for i, weight in enumerate(built.parameters()):
                weight *= 1 + nudge * torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(i))
        source, losses = Source(faces, c, built.backbone, CPU), []
        for epoch in range(25):
            for rows in order(len(source), 7, c.seed, epoch, least=2):
                losses.append(step(Batch(source, rows, epoch, len(rows), 0.0), rate) / len(rows))
        assert step.names == ["loss", "classification", "consistency"]
        return torch.stack(losses)

    fused, reference, nudged = curve("cpu"), curve("reference"), curve("reference", nudge=2.0**-23)
    assert len(fused) == 200
    assert reference[-8:, 0].mean() < 0.97 * reference[:8, 0].mean()  # it learns
    # The consistency is a difference of two near maps.
    for column, tolerance in ((0, 1e-4), (1, 1e-4), (2, 2e-3)):
        ours, of_a_bit = ((x[:, column] / reference[:, column] - 1).abs() for x in (fused, nudged))
        assert ours[:100].max() < tolerance and of_a_bit.max() < 50 * tolerance  # or the test would say nothing
        assert (ours < tolerance + 2 * of_a_bit.cummax(0).values).all(), (column, ours.max(), of_a_bit.max())


def test_a_compiled_backbone_trains_as_an_eager_one(faces, monkeypatch):
    """In training and evaluation; here its graphs are run as they are, which takes no minute to compile."""
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(backbones.Backbone, "compile", lambda self: torch.nn.Module.compile(self, backend=as_it_is))
    found = []
    for compiled in (False, True):
        c = config(compute=Compute(compile=compiled))
        method = loop.build(c, tuple(faces.counts(7)), CPU)
        step = Step(c, method, CPU)
        losses = [step(batch_of(faces, rows), 0.01) for rows in (range(8), range(8, 16))]
        found.append([*losses, loop.logits(method, faces.images)])
        assert bool(graphs) == compiled
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-6)


def test_separate_views_are_two_forward_passes(faces):
    pair = batch_of(faces).pair()
    one, two = (backbones.create(config(backbone={"separate_views": s})) for s in (False, True))
    statistics = {k: v for k, v in one.state_dict().items() if k.endswith("running_mean")}
    expected = torch.cat([one(pair[:8]), one(pair[8:])])
    assert torch.equal(two.pair(pair), expected)
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in statistics.items())
    assert (one.pair(pair) - expected).abs().max() > 1e-3


def test_frozen_batchnorm_keeps_its_statistics(faces):
    backbone = backbones.create(config(backbone={"frozen_batchnorm": True})).train()
    before = {k: v.clone() for k, v in backbone.named_buffers()}
    pair = batch_of(faces).pair()
    features = backbone(pair)
    assert before and all(torch.equal(v, before[k]) for k, v in backbone.named_buffers())
    torch.testing.assert_close(features[:1], backbone(pair[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": Optim(accumulate=5)}, "batch_size: got 8, expected at least 10: two for 5 parts"),
        ({"batch_size": 1, "optim": Optim(accumulate=2)}, "batch_size: got 1, expected at least 4"),
    ],
)
def test_a_batch_too_small_for_its_parts_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        optim.fewest(dataclasses.replace(config(), **changes))


def test_what_only_a_gpu_has_is_refused_on_a_cpu(capsys):
    for option in ("cuda_graph", "sync_batchnorm"):
        assert main(["train", "--preset", "demo", f"--compute.{option}", "--compute.device", "cpu"]) == 2
        assert f"compute.{option}: got True, expected a GPU: this run uses the CPU" in capsys.readouterr().err


TRAIN = [
    "train", "--preset", "demo", "--data.train_size", "90", "--data.test_size", "33", "--image_size", "32",
    "--batch_size", "16", "--backbone.options", str(TINY), "--compute.device", "cpu",
    "--no_output.pictures",
]  # fmt: skip


def test_average_scaler_accumulation_and_schedule_resume_bit_for_bit(tmp_path):
    options = [
        *TRAIN, "--output.root", str(tmp_path), "--compute.amp", "fp16", "--optim.average", "0.9", "--optim.clip", "1",
        "--optim.accumulate", "2", "--optim.schedule_by", "step", "--optim.warmup_steps", "9",
    ]  # fmt: skip
    assert main([*options, "--name", "whole", "--epochs", "2"]) == 0
    assert main([*options, "--name", "parts", "--epochs", "1"]) == 0
    assert main([*options, "--name", "parts", "--epochs", "2", "--resume"]) == 0
    whole, parts = (checkpoint.read(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert whole["scaler"] and whole["average"] and whole["taken"] == 12
    for key in ("model", "average", "scaler", "optimizer", "taken"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    assert [row["loss"] for row in parts["history"]] == [row["loss"] for row in whole["history"]]


def test_two_processes_train_as_one_does(tmp_path):
    """Losses, scores and weights to rounding: the same global batch, frozen BatchNorm, odd numbers on purpose."""
    options = [*TRAIN, "--batch_size", "11", "--backbone.frozen_batchnorm", "--optim.accumulate", "2", "--epochs", "2"]
    assert main([*options, "--output.root", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "trainer"]
    done = subprocess.run(
        [*command, *options, "--output.root", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("macro-F1") == 1 and done.stderr.count("demo 1/2") == 1  # one of them speaks
    one, two = (checkpoint.read(tmp_path / name / "demo" / "last.pt") for name in ("one", "two"))
    assert two["processes"] == 2
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=1e-5)
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in ("loss", "classification", "consistency"):
            assert b[name] == pytest.approx(a[name], rel=1e-5)
        assert b["test"] == a["test"]  # each of the images counted once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["rebalanced", "baseline"])
def test_a_step_captured_on_cuda_trains_as_an_eager_step_does(method, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # or two eager runs differ by 1e-2 after 8 steps
    found = []
    for graph in (False, True):
        c = config(compute=Compute(cuda_graph=graph), optim=Optim(clip=1.0))
        c = c if method == "rebalanced" else dataclasses.replace(c, method=baseline.Options())
        device = torch.device("cuda")
        faces = synthetic.draw([3] * 7, 32, seed=0)
        step = Step(c, loop.build(c, COUNTS, device).train(), device)
        for i in range(8):
            sums = step(batch_of(faces, range(i, i + 7 + i % 2), device), 1e-3 * (i + 1))
        found.append((sums, [p.detach().clone() for p in step.method.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
