"""A whole training step of the first trainer with our head, plain eager and the released formulation in its place.

A step takes images that lie on the device as uint8: augmentation, both views through the backbone, the head's loss,
backward, Adam. From the trainer's own step comes the time that a whole run would take: extrapolated, and called so.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer import loop
from trainer.config import Config
from trainer.data.synthetic import TRAIN_COUNTS

from . import baselines, gpu_timing
from .cases import Problem
from .gpu_goals import EPOCHS, IMAGES, whole_run_goals
from .gpu_op import environment
from .gpu_timing import Clock
from .op import slug, write_json
from .timing import interleave

#: What is measured on a GPU, and the small one that tries the program out.
MEASURED = Config(amp="bf16", channels_last=True)
REHEARSAL = Config(
    backbone="resnet10t", backbone_options={"channels": [8, 8, 8, 16], "stem_width": 8}, image_size=64, batch_size=4,
    channels_last=True,
)  # fmt: skip
WARM_UP = 10  # steps
CONTENDERS = {"plain eager": baselines.plain_eager, "released": baselines.released}


class Training:
    """The trainer's model, optimizer and a pool of random images on ``device``."""

    def __init__(self, config: Config, device: torch.device, pool: int) -> None:
        self.config, self.steps = config, 0
        self.model, self.optimizer = loop.build(config, len(TRAIN_COUNTS), torch.tensor(TRAIN_COUNTS), device)
        self.model.train()
        side = config.image_size
        self.images = torch.randint(0, 256, (pool, 1, side, side), dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, len(TRAIN_COUNTS), (pool,), device=device)

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next augmented images and their labels, as the trainer's loop makes them."""
        self.steps += 1
        random = torch.Generator().manual_seed(self.steps)
        rows = torch.randint(len(self.labels), (self.config.batch_size,), generator=random).to(self.images.device)
        return loop.augment(self.images[rows], random), self.labels[rows]

    def ours(self, x: Tensor, y: Tensor) -> Tensor:
        """The trainer's own loss."""
        return loop.losses(self.config, self.model, x, y)[0]

    def with_head(self, formulation: baselines.Formulation) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss with another formulation of the head on the same features."""

        def loss(x: Tensor, y: Tensor) -> Tensor:
            features = loop.features(self.config, self.model, torch.cat([x, x.flip(-1)]))
            head = self.model["head"]
            return formulation(
                features, head.weight, head.bias, y, head.target_table, head.map_weights, head.consistency_weight
            )

        return loss

    def step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        value = loss(*self.batch())
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()


def in_features_dtype(formulation: baselines.Formulation) -> baselines.Formulation:
    """The float32 weight and bias cast to the features' dtype, as autocast does for an eager program."""

    def cast(features, weight, bias, *rest):
        return formulation(features, weight.to(features.dtype), bias.to(features.dtype), *rest)

    return cast


def prove(training: Training) -> tuple[dict[str, Callable[[Tensor, Tensor], Tensor]], dict[str, float], list[dict]]:
    """The losses whose value and gradients are float64's on one batch's features, their errors, and the refused."""
    head: nn.Module = training.model["head"]
    x, y = training.batch()
    with torch.no_grad():
        features = loop.features(training.config, training.model, torch.cat([x, x.flip(-1)]))
    data = Problem(
        features.requires_grad_(), head.weight, head.bias, y, head.target_table, head.map_weights,
        head.consistency_weight,
    )  # fmt: skip
    expected = baselines.truth("head", data)
    formulations = {name: in_features_dtype(f) for name, f in CONTENDERS.items()}
    losses = {"ours": training.ours, **{name: training.with_head(f) for name, f in formulations.items()}}
    formulations["ours"] = lambda features, weight, bias, y, *_: head(features, y).loss
    errors, rejected = {}, []
    for name in list(losses):
        error, reason = None, None
        try:
            error = baselines.worst_error(formulations[name], data, expected)
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}"[:300]
        if error is not None and error <= baselines.TOLERANCE[features.dtype]:
            errors[name] = error
        else:
            known = None if error is None or error == float("inf") else error
            rejected.append({"contender": name, "error": known, "reason": reason})
            del losses[name]
    return losses, errors, rejected


def run(config: Config, device: str, seconds: float, directory: Path, *, clock: Clock, kind: str) -> tuple[dict, Path]:
    """Time a step with each head and the trainer's steady state, about ``seconds`` in all; the result and its file."""
    result = {
        **environment(kind), "config": dataclasses.asdict(config), "rows": [], "rejected": [], "errors": [],
        "whole_run": None, "goals": whole_run_goals(None),
    }  # fmt: skip
    path = directory / f"step-{slug(kind, result['device'])}.json"
    # All of the trainer's images where they are measured, 616 MB at 224 pixels; a rehearsal needs no more than a few.
    training = Training(config, torch.device(device), pool=IMAGES if kind == "cuda" else 64)
    losses, errors, result["rejected"] = prove(training)
    for refused in result["rejected"]:
        print(f"{refused['contender']}: refused, {refused['reason'] or refused['error']}", flush=True)
    if "ours" in losses:
        try:
            result["whole_run"] = whole_run(training, losses["ours"], clock, seconds / 3)
        except Exception as error:
            result["errors"].append({"part": "whole run", "error": f"{type(error).__name__}: {error}"[:500]})
        result["goals"] = whole_run_goals(result["whole_run"])
        write_json(result, path)
    timed = interleave(
        {name: lambda f=f: clock.intervals_ms(lambda _: training.step(f)) for name, f in losses.items()}, seconds / 2
    )
    for name, samples in timed.items():
        quartiles = gpu_timing.quartiles([ms for (ms,) in samples])
        images_per_s = 1e3 * config.batch_size / quartiles[1]
        result["rows"].append(
            {"contender": name, "error": errors[name], "ms": quartiles, "images_per_s": images_per_s,
             "rounds": len(samples)}
        )  # fmt: skip
        print(f"{name:<12} {quartiles[1]:9.3f} ms a step, {images_per_s:8.0f} images/s", flush=True)
    return result, write_json(result, path)


def whole_run(training: Training, loss: Callable[[Tensor, Tensor], Tensor], clock: Clock, seconds: float) -> dict:
    """Images per second of steps that follow each other unwaited, and from it the seconds of 60 epochs."""
    for _ in range(WARM_UP):
        training.step(loss)
    clock.wait()
    steps, start = 0, time.perf_counter()
    while steps < WARM_UP or time.perf_counter() - start < seconds:
        training.step(loss)
        steps += 1
        if steps % 50 == 0:
            clock.wait()  # or the host would run ahead by more than it is timed for
    clock.wait()
    taken = time.perf_counter() - start
    images_per_s = steps * training.config.batch_size / taken
    return {
        "extrapolated": True, "steps": steps, "seconds": taken, "images_per_s": images_per_s, "epochs": EPOCHS,
        "images": IMAGES, "whole_run_s": EPOCHS * IMAGES / images_per_s,
    }  # fmt: skip
