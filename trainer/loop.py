"""Epochs, steps and the evaluation of any method on any data set."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from tqdm import tqdm

from . import backbones, distributed, metrics, optim
from .config import Config, logger
from .data import Data, Split
from .data.batches import Batch, Source, order
from .data.views import views
from .methods import Method, Task
from .run import Diverged, Run, Signals, Stopped
from .state import State

EVALUATED_AT_ONCE = 256  # images
Measure = Callable[[State, Data], dict]  # of the epoch just trained, for its row of metrics.jsonl


def build(
    config: Config, counts: tuple[int, ...], device: torch.device, backbone: backbones.Backbone | None = None
) -> Method:
    """The method of ``config`` on ``device``, random by its seed."""
    backbone = backbone or backbones.create(config)
    torch.manual_seed(config.seed)
    method = config.method.build(backbone, Task(counts, config.epochs, config.compute.backend)).to(device)
    if config.compute.sync_batchnorm:
        method = convert_sync_batchnorm(method)  # timm's, because its BatchNorm may have an activation inside
    if config.compute.compile:
        backbone.compile()
    return method.to(memory_format=backbone.layout)


def fit(config: Config, method: Method, data: Data, run: Run, measure: Measure = lambda *_: {}) -> State:
    """Train by epochs and evaluate after each; ``run`` keeps what must survive an interruption.

    Raises:
        Diverged: a loss or a logit that is not finite. Stopped: a signal came, and the state is saved.
    """
    device = next(method.parameters()).device
    train = Source(data.train, config, method.backbone, device)
    logger.info("%s", train.describe())
    state = State(config, method, device)
    if run.saved:
        state.restore(run.saved)
    run.begin(state)
    with Signals() as noted:
        while state.epoch < config.epochs:
            started, first = time.perf_counter(), state.step
            steps = _train_epoch(config, train, state, run, noted)
            trained = time.perf_counter() - started
            scores = {name: metrics.accuracies(_evaluate(state, name, data, run)) for name in data.evaluated}
            seconds = time.perf_counter() - started
            speed = len(train) * (steps - first) / steps / trained
            row = {"epoch": state.epoch + 1, **state.means(len(train)), **scores, **measure(state, data)}
            state.finish_epoch(row | {"seconds": seconds, "images_per_s": speed}, scores[data.chooser]["mean"])
            run.finish_epoch(state)
            logger.info("%s %d/%d: %s", config.name, state.epoch, config.epochs, _summary(config, state, data))
            if noted.asked is not None:
                raise Stopped(noted.asked, run.position)
    return state


def _train_epoch(config: Config, train: Source, state: State, run: Run, noted: Signals) -> int:
    """The rest of an epoch; how many steps it has."""
    least, first = optim.fewest(config), state.step
    groups = order(len(train), config.batch_size, config.seed, state.epoch, least=least)
    title = f"{config.name} {state.epoch + 1}/{config.epochs}"
    state.method.train()
    started, check_at = time.perf_counter(), first + 1
    bar = tqdm(groups[first:], initial=first, total=len(groups), desc=title, unit="step", leave=False, disable=None)
    for rows in bar:
        # Dropout and the like: by position and process, so that nothing but the position needs to be saved.
        torch.manual_seed(zlib.crc32(f"{config.seed} {state.epoch} {state.step} {distributed.rank()}".encode()))
        progress = (state.epoch + state.step / len(groups)) / config.epochs
        mine = rows[distributed.share(len(rows))].to(train.rows_on, non_blocking=True)
        batch = Batch(train, mine, state.epoch, len(rows), progress)
        state.count(state.take(batch, optim.learning_rate(config, state.epoch, state.step, len(groups))))

        last = state.step == len(groups)
        check = last or state.step >= check_at
        stop, due = distributed.agreed(noted.asked, check), run.due()
        if check or stop or due:
            _expect_finite(state, groups, run)
        if check:
            check_at += distributed.until_check((time.perf_counter() - started) / (state.step - first))
        if not last and (stop or due):
            run.save(state)
        if stop and not last:  # after the last step, the evaluation belongs to the epoch
            raise Stopped(stop, run.position)
    return len(groups)


def _expect_finite(state: State, groups: tuple[Tensor, ...], run: Run) -> None:
    if (bad := int(state.bad)) >= 0:
        rows = ", ".join(map(str, groups[bad].tolist()))
        raise Diverged(f"in epoch {state.epoch + 1}, step {bad} of the samples {rows}", run.good())


def _evaluate(state: State, name: str, data: Data, run: Run) -> Tensor:
    matrix = evaluate(state.take.evaluated, data.splits[name], len(data.classes))
    if matrix is None:
        raise Diverged(f"in the evaluation on {name} after epoch {state.epoch + 1}", run.good())
    return matrix


def _summary(config: Config, state: State, data: Data) -> str:
    row = state.history[-1]
    scores = (f"{name} overall {row[name]['overall']:.2f} %, mean {row[name]['mean']:.2f} %" for name in data.evaluated)
    left = (config.epochs - state.epoch) * row["seconds"]
    pace = f"{row['seconds']:.1f} s, {row['images_per_s']:.0f} images/s, {left / 60:.0f} min left"
    return f"loss {row.get('loss', float('nan')):.4f}, {', '.join(scores)}, {pace}"


@torch.no_grad()
def logits(method: Method, images: Tensor, *, flip: bool = False) -> Tensor:
    """(M, L) float32 on the CPU of uint8 images (M, h, w, 1 or 3), in eval mode; ``flip``: averaged with the twins'."""
    method.eval()
    device = next(method.parameters()).device
    found = []
    for chunk in images.split(EVALUATED_AT_ONCE):
        z = method(views(chunk.to(device), method.backbone, both=flip)).float()
        found.append(torch.stack(z.chunk(2)).mean(0) if flip else z)
    return torch.cat(found).cpu()


def evaluate(method: Method, split: Split, num_classes: int, *, flip: bool = False) -> Tensor | None:
    """(L, L) confusion matrix, each image counted once by one process; None if a logit is not finite."""
    mine = distributed.share(len(split.labels))
    found = logits(method, split.images[mine], flip=flip)
    matrix = metrics.confusion(split.hard[mine].cpu(), found.argmax(1), num_classes)
    counted = distributed.total(torch.cat([matrix.flatten(), (~found.isfinite()).sum()[None]]))
    return None if counted[-1] else counted[:-1].view_as(matrix)
