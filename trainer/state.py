"""Where a run stands, and all of it as plain values for a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checkpoint, optim
from .config import Config
from .methods import Method

#: Attributes that a checkpoint holds as they are.
PLAIN = ("epoch", "step", "names", "history", "best", "epoch_bound")


class State:
    """The method, its optimiser, the position, the losses of this epoch so far, the history and the best epoch.

    ``sums`` (k,) are the losses, times the images of their steps, by ``names``. ``bad`` is the first step of this
    epoch with a loss that is not finite, -1 if there was none; it stays on the device until it is asked for.
    """

    def __init__(self, config: Config, method: Method, device: torch.device) -> None:
        self.method, self.optimizer, self.device = method, optim.create(config, method.parameters()), device
        #: Whether what a step does depends on how many epochs the run has.
        self.epoch_bound = config.optim.schedule == "cosine" or method.follows_progress
        self.names: list[str] = []
        self.history: list[dict] = []
        self.best: dict[str, Any] = {}
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        self.sums: Tensor | None = None
        self.bad = torch.full((), -1, device=self.device)

    def count(self, losses: dict[str, Tensor], images: int) -> None:
        """A step is done; nothing here waits for the device."""
        values = torch.stack(list(losses.values())).detach()
        self.names = list(losses)
        self.sums = values * images if self.sums is None else self.sums + values * images
        self.bad = torch.where((self.bad < 0) & ~values.isfinite().all(), self.step, self.bad)
        self.step += 1

    def means(self, images: int) -> dict[str, float]:
        """The losses of this epoch by name, over its ``images``; empty if it had no step."""
        return {} if self.sums is None else dict(zip(self.names, (self.sums / images).tolist(), strict=True))

    def finish_epoch(self, row: dict, score: float) -> None:
        """``row`` is what the log says of the epoch, ``score`` what the best epoch has the most of."""
        if not self.best or score > self.best["score"]:
            weights = {k: v.detach().to("cpu", copy=True) for k, v in self.method.state_dict().items()}
            self.best = {"epoch": self.epoch, "score": score, "model": weights}
        self.history.append(row)
        self.begin_epoch(self.epoch + 1)

    def as_dict(self) -> dict:
        parts = {"model": self.method.state_dict(), "optimizer": self.optimizer.state_dict(), "sums": self.sums}
        return {**parts, **{key: getattr(self, key) for key in PLAIN}, "random": checkpoint.random_state()}

    def restore(self, saved: dict) -> None:
        """From what :meth:`as_dict` made, to continue bit for bit."""
        self.method.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for key in PLAIN:
            setattr(self, key, saved[key])
        self.sums = None if saved["sums"] is None else saved["sums"].to(self.device)
        checkpoint.set_random_state(saved["random"])
