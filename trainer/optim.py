"""timm's optimisers, and the learning rate of each step.

The rate is a function of where the run stands: it has no state that a checkpoint would have to hold.
"""

from __future__ import annotations

import math
from typing import Any

import timm.optim
import torch
from torch import nn

from . import distributed
from .config import Config, UserError, expect, one_line

FUSED = ("adam", "adamw", "sgd", "momentum", "nesterov")  #: PyTorch's own, which have one kernel for all weights


def create(config: Config, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser that ``config.optim`` names, at the run's learning rate.

    Raises:
        UserError: timm knows no such optimiser, or refuses its options.
    """
    options = config.optim
    expected = "adam, adamw, sgd or another one of timm (see timm.optim.list_optimizers())"
    expect(options.optimizer in timm.optim.list_optimizers(), "optim.optimizer", options.optimizer, expected)
    extra, graph = dict(options.options), config.compute.cuda_graph
    if device.type == "cuda" and options.optimizer in FUSED:
        extra["fused"] = True
    if graph and options.optimizer in FUSED[:2]:
        extra["capturable"] = True
    parameters = groups(model, options.weight_decay, decay_all=options.decay_all)
    rate: Any = torch.tensor(config.learning_rate, device=device) if graph else config.learning_rate
    try:
        return timm.optim.create_optimizer_v2(parameters, options.optimizer, rate, options.weight_decay, **extra)
    except Exception as error:  # a package that is missing, an option that the optimiser doesn't have
        raise UserError(f"optim.options: got {options.options} for {options.optimizer!r}: {one_line(error)}") from error


def groups(model: nn.Module, weight_decay: float, *, decay_all: bool) -> list[dict[str, Any]]:
    """The parameters by the factor of their learning rate (see ``Method.rates``) and by whether their weights decay."""
    rates: dict[str, float] = getattr(model, "rates", {})
    found: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((rate for start, rate in rates.items() if name.startswith(start)), 1.0)
            decays = decay_all or parameter.ndim > 1
            group = {"params": [], "factor": factor, "weight_decay": weight_decay if decays else 0.0}
            found.setdefault((factor, decays), group)["params"].append(parameter)
    return list(found.values())


def fewest(config: Config) -> int:
    """Images that a step has at least: two, as BatchNorm needs, for each part of it in each process.

    Raises:
        UserError: the batch is smaller.
    """
    parts, size = config.optim.accumulate * distributed.size(), config.batch_size
    if size == parts == 1:
        return 1
    what = f"{config.optim.accumulate} parts in {distributed.size()} processes" if parts > 1 else "BatchNorm"
    expect(size >= 2 * parts, "batch_size", size, f"at least {2 * parts}: two for {what}")
    return 2 * parts


def learning_rate(config: Config, epoch: int, step: int, steps: int) -> float:
    """Of step ``step`` of ``steps`` in ``epoch``, both from 0."""
    options, done = config.optim, epoch + step / steps
    position = done if options.schedule_by == "step" else epoch
    rate = config.learning_rate * min(1.0, (epoch * steps + step + 1) / max(1, options.warmup_steps))
    if options.schedule == "exponential":
        return rate * options.decay**position
    if options.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * position / config.epochs))
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of all parameters, by the factors of their groups; a tensor, as a CUDA graph reads it, is filled in place."""
    for group in optimizer.param_groups:
        value = rate * group["factor"]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
