"""One optimiser step: accumulation, mixed precision, clipping, moving average; eager or as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import distributed, optim
from .config import Config
from .data.batches import Batch
from .methods import Method

WARM_UP = 3  #: eager steps before a graph is captured, in which libraries choose algorithms and allocate


class Step:
    """A step of ``method`` by ``optimizer``, counted in ``taken``. Nothing in it waits for the device.

    ``scaler`` scales the loss of float16; ``average`` is the moving average of the weights from their start, or None.
    ``graphs`` are captured when they are first needed.
    """

    def __init__(self, config: Config, method: Method, device: torch.device) -> None:
        self.config, self.method, self.taken, self.eager = config, method, 0, 0
        self.optimizer = optim.create(config, method, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.compute.amp == "fp16")
        decay = config.optim.average
        self.average = ModelEmaV3(method, decay=decay, use_warmup=True) if decay else None
        #: Its backward averages the gradients of all processes.
        self.model = DistributedDataParallel(_Losses(method)) if distributed.size() > 1 else _Losses(method)
        self.names: list[str] = []  #: of the losses
        self.graphs: dict[int, Callable[[Batch], Tensor]] = {}  #: by the number of images

    @property
    def evaluated(self) -> Method:
        """The method with the weights that classify: their moving average if there is one."""
        return self.method if self.average is None else self.average.module

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """(k,) float32 on the device: the losses named ``names``, summed over the images of all processes."""
        optim.set_learning_rate(self.optimizer, rate)
        if self.config.compute.cuda_graph and self.eager >= WARM_UP:
            if len(batch) not in self.graphs:
                self.graphs[len(batch)] = _captured(self._eager, batch)
            sums = self.graphs[len(batch)](batch)
        else:
            sums = self._eager(batch)
            self.eager += 1  # of this process: a resumed run warms up anew
        self.taken += 1
        if self.average is not None:
            self.average.update(self.method, self.taken)
        return sums

    def _eager(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        parts = batch.parts(self.config.optim.accumulate)
        sums = [self._accumulate(part, last=part is parts[-1]) for part in parts]
        if self.config.optim.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.method.parameters(), self.config.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step(batch)
        return distributed.total(torch.stack(sums).sum(0))

    def _accumulate(self, part: Batch, *, last: bool) -> Tensor:
        """Adds the gradient of ``part`` to that of the step; (k,) its losses times its images."""
        exchange = last or distributed.size() == 1
        with contextlib.nullcontext() if exchange else self.model.no_sync():  # type: ignore[operator]
            losses = self.model(part)
            # Gradients are averaged over processes, so a mean over ``len(part)`` images counts that often.
            self.scaler.scale(losses["loss"] * (len(part) * distributed.size() / part.whole)).backward()
        self.names = list(losses)
        return torch.stack([loss.detach() for loss in losses.values()]) * len(part)


class _Losses(nn.Module):
    """The losses of a method as the forward pass that DistributedDataParallel expects."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.method.losses(batch)


def _captured(step: Callable[[Batch], Tensor], batch: Batch) -> Callable[[Batch], Tensor]:
    """``step`` as a CUDA graph that reads the batch from memory of its own."""
    held, graph = batch.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = step(held)

    def replay(batch: Batch) -> Tensor:
        held.copy_(batch)
        graph.replay()
        return sums.clone()

    return replay
