"""Optimisers and the learning rate of each step, a function of where the run stands and so without a state."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import Config


def create(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that ``config.optim`` names, at the run's learning rate."""
    options, rate = config.optim, config.learning_rate
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=options.weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    return kind(parameters, lr=rate, weight_decay=options.weight_decay)


def learning_rate(config: Config, epoch: int, step: int, steps: int) -> float:
    """Of step ``step`` of ``steps`` in ``epoch``, both from 0."""
    options, done = config.optim, epoch * steps + step
    rate = config.learning_rate * min(1.0, (done + 1) / max(1, options.warmup_steps))
    if options.schedule == "exponential":
        return rate * options.decay**epoch
    if options.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * done / (config.epochs * steps)))
    return rate


def step(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float) -> None:
    """Zero, backward, clip, step."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        if clip:
            nn.utils.clip_grad_norm_(group["params"], clip)
    optimizer.step()
