"""A whole training step: the trainer's, with other formulations of the head, and as the authors' programs take it.

The trainer's step begins with uint8 images stored on the device: augmentation, both views through the backbone, the
head's loss, backward, Adam. That of the authors begins with JPEG files (see authors.py). From the trainer's own step
comes the time that a whole run would take: extrapolated, and called so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import loop, presets
from trainer.config import Backbone, Compute, Config, as_dict
from trainer.data import Split
from trainer.data.batches import Batch, Source
from trainer.data.synthetic import TRAIN_COUNTS
from trainer.step import Step

from . import authors, baselines, goals, proof, results
from .baselines import Formulation
from .cases import Problem
from .clocks import Clock, Mark
from .measure import LoadMeter, interleave, quartiles

#: What tries the program out.
REHEARSAL = dataclasses.replace(
    presets.paper(),
    backbone=Backbone("resnet10t", {"channels": [8, 8, 8, 16], "stem_width": 8}),
    image_size=64,
    batch_size=4,
    compute=Compute(channels_last=True),
)


def measured(backbone: str, image_size: int, batch_size: int, amp: str | None, device: str) -> Config:
    """The paper's recipe on this backbone."""
    return dataclasses.replace(
        presets.paper(),
        backbone=Backbone(backbone),
        image_size=image_size,
        batch_size=batch_size,
        compute=Compute(amp=amp or ("bf16" if device == "cuda" else "off"), channels_last=True),
    )


WARM_UP = 10  # steps
#: Switches of the trainer's Compute, each way that it can take its steps: on a GPU, and on a CPU.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "cuda": {
        "eager": {},
        "CUDA graph": {"cuda_graph": True},
        "compiled, CUDA graph": {"compile": True, "cuda_graph": True},
    },
    "cpu": {"eager": {}},
}
CONTENDERS: dict[str, Formulation] = {"plain eager": baselines.plain_eager, "released": baselines.released}

#: Of the trainer's step, in its order.
PARTS = ("views", "backbone forward", "head", "backbone backward", "optimiser")

Loss = Callable[[Batch], Tensor]


class Training:
    """The trainer's method, its step and a pool of random images on ``device``."""

    def __init__(self, config: Config, device: torch.device, pool: int) -> None:
        self.config, self.steps = config, 0
        self.method: Any = loop.build(config, TRAIN_COUNTS, device)
        self.method.train()
        self.take = Step(config, self.method, device)  #: the trainer's own step
        self.optimizer = self.take.optimizer
        side = config.image_size
        images = torch.randint(0, 256, (pool, side, side, 1), dtype=torch.uint8, device=device)
        labels = torch.randint(0, len(TRAIN_COUNTS), (pool,), device=device)
        self.source = Source(Split(images, labels), config, self.method.backbone, device)

    def batch(self) -> Batch:
        """The next images, as the trainer's loop makes them."""
        self.steps += 1
        random = torch.Generator().manual_seed(self.steps)
        rows = torch.randint(len(self.source), (self.config.batch_size,), generator=random)
        rows = rows.to(self.source.rows_on, non_blocking=True)
        return Batch(self.source, rows, epoch=self.steps, whole=len(rows), progress=0.0)

    def problem(self, features: Tensor, y: Tensor) -> Problem:
        """The head's arguments with these features."""
        head, weight = self.method.head, self.method.consistency_weight
        return Problem(features, head.weight, head.bias, y, head.target_table, head.map_weights, weight)

    def ours(self, batch: Batch) -> Tensor:
        """The trainer's own loss."""
        return self.method.losses(batch)["loss"]

    def with_head(self, formulation: Formulation) -> Loss:
        """The loss with another formulation of the head on the same features."""
        return lambda batch: formulation(self.problem(self.method.backbone(batch.pair()), batch.labels))

    def step(self, loss: Loss) -> None:
        self.optimizer.zero_grad()
        loss(self.batch()).backward()
        self.optimizer.step()

    @functools.cached_property
    def files(self) -> authors.Files:
        return authors.Files(self.source.images, self.config.image_size)

    def as_authors(self, batch: Batch, workers: ThreadPoolExecutor) -> Tensor:
        """The loss with images from files, a forward pass for each view and the released formulation of the head."""
        return self.two_forwards(self.files.batch(batch.rows, workers).to(self.source.device), batch.labels)

    def two_forwards(self, x: Tensor, labels: Tensor) -> Tensor:
        """The released formulation of the loss on (N, 3, H, W) and its mirror images, one after the other."""
        features = torch.cat([self.method.backbone(x), self.method.backbone(x.flip(-1))])
        return in_features_dtype(baselines.released)(self.problem(features, labels))

    def parts(self, mark: Mark) -> None:
        """A step in four parts: views, backbone forward, head forward and backward, the rest of backward and Adam."""
        method, batch = self.method, self.batch()
        self.optimizer.zero_grad()
        views = batch.pair()
        mark()
        features = method.backbone.pair(views)
        mark()
        detached = features.detach().requires_grad_()
        method.loss_of(detached, batch.labels).loss.backward()
        mark()
        features.backward(detached.grad)
        mark()
        self.optimizer.step()


def in_features_dtype(formulation: Formulation) -> Formulation:
    """The float32 weight and bias cast to the features' dtype, as autocast does for an eager program."""

    def cast(x: Problem) -> Tensor:
        return formulation(x._replace(weight=x.weight.to(x.features.dtype), bias=x.bias.to(x.features.dtype)))

    return cast


def prove(training: Training) -> tuple[dict[str, Loss], dict[str, float], list[dict[str, Any]]]:
    """The losses whose value and gradients are float64's on one batch's features, their errors, and the refused."""
    method, batch = training.method, training.batch()
    with torch.no_grad():
        features = method.backbone(batch.pair())
    others = {name: in_features_dtype(f) for name, f in CONTENDERS.items()}
    formulations = {"ours": lambda x: method.loss_of(x.features, x.targets).loss, **others}
    errors, refused = proof.prove(training.problem(features.requires_grad_(), batch.labels), formulations)
    losses = {"ours": training.ours, **{name: training.with_head(f) for name, f in others.items()}}
    return {name: losses[name] for name in errors}, errors, refused


def authors_error(training: Training) -> float:
    """Largest relative error of the authors' loss and the head's gradients, against the trainer's on the same pixels.

    BatchNorm keeps its statistics here: of one view they are not those of both.
    """
    method, batch = training.method, training.batch()
    method.eval()
    try:
        pair = batch.pair()
        parameters = [method.head.weight, method.head.bias]
        found = []
        for loss in (
            method.loss_of(method.backbone.pair(pair), batch.labels).loss,
            training.two_forwards(pair[: len(pair) // 2], batch.labels),
        ):
            found.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    finally:
        method.train()
    ours, theirs = found
    return max(proof.relative_error(a, b.double()) for a, b in zip(theirs, ours, strict=True))


def run(
    config: Config, device: str, seconds: float, directory: Path, *, clock: Clock, kind: str
) -> tuple[dict[str, Any], Path]:
    """Time a step with each head and the trainer's steady state, about ``seconds`` in all; the result and its file."""
    result: dict[str, Any] = {**results.environment(kind), "config": as_dict(config), "whole_run": None}
    result |= {"whole_runs": {}, "rows": [], "errors": []}
    meter = LoadMeter()
    path = directory / results.file_name(f"step-{config.backbone.name}", result)
    # All of the trainer's images where they are measured, 616 MB at 224 pixels; a rehearsal needs no more than a few.
    pool = goals.IMAGES if kind == "cuda" else 64
    training = Training(config, torch.device(device), pool)
    losses, errors, result["rejected"] = prove(training)
    if "ours" in losses:
        ways = WAYS[device]
        for way, switches in ways.items():
            try:
                compute = dataclasses.replace(config.compute, **switches)
                taken = Training(dataclasses.replace(config, compute=compute), torch.device(device), pool)
                found = whole_run(taken, clock, seconds / 3 / len(ways))
                result["whole_runs"][way] = found
                print(f"{way:<21} {found['images_per_s']:8.1f} images/s of a run's steps", flush=True)
            except Exception as error:
                result["errors"].append({"part": f"whole run, {way}", "error": results.reason(error)})
                print(f"{way}: {results.reason(error)}", flush=True)
        fastest = min(result["whole_runs"].items(), key=lambda item: item[1]["whole_run_s"], default=None)
        result["whole_run"] = fastest and {"way": fastest[0], **fastest[1]}
    result["goals"] = goals.judged("step", result)
    results.write(result, path)
    errors[goals.AUTHORS] = authors_error(training)
    proven = errors[goals.AUTHORS] <= proof.TOLERANCE[torch.float32 if config.compute.amp == "off" else torch.bfloat16]
    if not proven:
        finite = errors[goals.AUTHORS] if math.isfinite(errors[goals.AUTHORS]) else None
        result["rejected"].append({"contender": goals.AUTHORS, "error": finite, "reason": None})
    with ThreadPoolExecutor(torch.get_num_threads()) as workers:
        if proven:
            losses[goals.AUTHORS] = functools.partial(training.as_authors, workers=workers)
        runs = {name: functools.partial(_step_ms, training, loss, clock) for name, loss in losses.items()}
        timed: dict[str, Any] = interleave({**runs, "parts": lambda: clock.intervals_ms(training.parts)}, seconds / 2)
    parts = zip(*timed.pop("parts"), strict=True)
    result["parts_ms"] = dict(zip(PARTS, (quartiles(samples)[1] for samples in parts), strict=True))
    for name, samples in timed.items():
        ms = quartiles(samples)
        row = {"contender": name, "error": errors.get(name), "ms": ms, "rounds": len(samples)}
        result["rows"].append({**row, "images_per_s": 1e3 * config.batch_size / ms[1]})
        print(f"{name:<15} {ms[1]:9.3f} ms a step, {1e3 * config.batch_size / ms[1]:8.1f} images/s", flush=True)
    result |= meter.verdict()
    print("of ours: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in result["parts_ms"].items()), flush=True)
    return result, results.write(result, path)


def _step_ms(training: Training, loss: Loss, clock: Clock) -> float:
    return clock.intervals_ms(lambda _: training.step(loss))[0]


def whole_run(training: Training, clock: Clock, seconds: float) -> dict[str, Any]:
    """Images per second of the trainer's steps, which follow each other unwaited, and from it the s of 60 epochs."""

    def step() -> None:
        training.take(training.batch(), training.config.learning_rate)

    for _ in range(WARM_UP):
        step()
    clock.wait()
    steps, start = 0, time.perf_counter()
    while steps < WARM_UP or time.perf_counter() - start < seconds:
        step()
        steps += 1
        if steps % 50 == 0:
            clock.wait()  # or the host would run ahead by more than it is timed for
    clock.wait()
    taken = time.perf_counter() - start
    images_per_s = steps * training.config.batch_size / taken
    return {
        "extrapolated": True,
        "steps": steps,
        "seconds": taken,
        "images_per_s": images_per_s,
        "epochs": goals.EPOCHS,
        "images": goals.IMAGES,
        "whole_run_s": goals.EPOCHS * goals.IMAGES / images_per_s,
    }
