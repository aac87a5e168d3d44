"""Where a run stands, and all of it as plain values for a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import Config
from .methods import Method
from .step import Step

#: Attributes that a checkpoint holds as they are.
PLAIN = ("epoch", "step", "history", "best", "epoch_bound")


class State:
    """The method, its optimiser, the position, the losses of this epoch so far, the history and the best epoch.

    ``sums`` (k,) are the losses, summed over images, as the step names them. ``bad`` is the first step of this epoch
    with a loss that is not finite, -1 if there was none; it stays on the device until it is asked for. No random
    state is kept: what a step draws follows from its position.
    """

    def __init__(self, config: Config, method: Method, device: torch.device) -> None:
        self.take = step = Step(config, method, device)
        self.method, self.device = method, device
        #: What has a state dict, by its name in a checkpoint.
        self.parts: dict[str, Any] = {"model": method, "optimizer": step.optimizer, "scaler": step.scaler}
        if step.average is not None:
            self.parts["average"] = step.average.module
        #: Whether what a step does depends on how many epochs the run has.
        self.epoch_bound = config.optim.schedule == "cosine" or method.follows_progress
        self.history: list[dict] = []
        self.best: dict[str, Any] = {}
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        self.sums: Tensor | None = None
        self.bad = torch.full((), -1, device=self.device)

    def count(self, sums: Tensor) -> None:
        """A step is done, with these losses summed over its images; nothing here waits for the device."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.bad = torch.where((self.bad < 0) & ~sums.isfinite().all(), self.step, self.bad)
        self.step += 1

    def means(self, images: int) -> dict[str, float]:
        """The losses of this epoch by name, over its ``images``; empty if it had no step."""
        return {} if self.sums is None else dict(zip(self.take.names, (self.sums / images).tolist(), strict=True))

    def finish_epoch(self, row: dict, score: float) -> None:
        """``row`` is what the log says of the epoch, ``score`` what the best epoch has the most of."""
        if not self.best or score > self.best["score"]:
            weights = {k: v.detach().to("cpu", copy=True) for k, v in self.take.evaluated.state_dict().items()}
            self.best = {"epoch": self.epoch, "score": score, "model": weights}
        self.history.append(row)
        self.begin_epoch(self.epoch + 1)

    def as_dict(self) -> dict:
        plain = {key: getattr(self, key) for key in PLAIN} | {"taken": self.take.taken, "names": self.take.names}
        parts = {key: part.state_dict() for key, part in self.parts.items()}
        return {"average": None, **parts, **plain, "sums": self.sums}

    def restore(self, saved: dict) -> None:
        """From what :meth:`as_dict` made, to continue bit for bit."""
        for key, part in self.parts.items():
            part.load_state_dict(saved[key])
        for key in PLAIN:
            setattr(self, key, saved[key])
        self.take.taken, self.take.names = saved["taken"], saved["names"]
        self.sums = None if saved["sums"] is None else saved["sums"].to(self.device)
