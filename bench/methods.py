"""A training step of every method of the trainer, in turns, and how long it takes against the baseline's."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from trainer.config import Config, as_dict, found
from trainer.step import Step

from . import results
from .clocks import Clock, Mark
from .measure import LoadMeter, interleave, quartiles
from .step import Training

REFERENCE = "baseline"
POOL = 64  # images


def run(
    config: Config, device: str, seconds: float, directory: Path, *, clock: Clock, kind: str
) -> tuple[dict[str, Any], Path]:
    """Time the step of each method with its own defaults, about ``seconds`` in all; the result and its file.

    A ratio is the median over rounds, in each of which every method takes one step.
    """
    rows: list[dict[str, Any]] = []
    result = {**results.environment(kind), "config": as_dict(config), "rows": rows}
    steps = {name: Steps(config, name, torch.device(device)) for name in found("methods")}
    runs = {name: functools.partial(clock.intervals_ms, step) for name, step in steps.items()}
    meter = LoadMeter()
    ms = {name: [sample[0] for sample in samples] for name, samples in interleave(runs, seconds).items()}
    for name, samples in ms.items():
        ratios = [a / b for a, b in zip(samples, ms[REFERENCE], strict=True)]
        row: dict[str, Any] = {
            "contender": name,
            "ms": quartiles(samples),
            "ratio": quartiles(ratios),
            "rounds": len(samples),
        }
        rows.append(row)
        print(f"{name:<18} {row['ms'][1]:9.2f} ms a step, {row['ratio'][1]:5.2f} times {REFERENCE}", flush=True)
    result |= meter.verdict()
    path = directory / results.file_name(f"methods-{config.backbone.name}", result)
    return result, results.write(result, path)


class Steps:
    """A method's steps on one pool of images, everything as in the trainer's loop."""

    def __init__(self, config: Config, name: str, device: torch.device) -> None:
        self.training = Training(dataclasses.replace(config, method=found("methods")[name]()), device, POOL)
        self.step = Step(self.training.config, self.training.method, device)

    def __call__(self, mark: Mark = lambda: None) -> None:
        """One step, on the next images."""
        self.step(self.training.batch(), self.training.config.learning_rate)
