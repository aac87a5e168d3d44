"""One training run from top to bottom: data, model, steps, evaluation, pictures."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rebalfer_kernels as rk

from . import backbones, checkpoint, data, figures, metrics
from .config import Config

logger = logging.getLogger(__name__)


class Result(NamedTuple):
    classes: tuple[str, ...]
    counts: list[int]  #: training images per class
    history: list[dict]  #: the rows of metrics.jsonl
    directory: Path


def train(config: Config, *, resume: bool = False, root: Path = Path("runs")) -> Result:
    """Train and evaluate by epochs; ``last.pt``, ``best.pt``, ``metrics.jsonl`` and pictures go to ``root/NAME``.

    "best" is the epoch with the highest mean accuracy on the test set, as is the field's custom; the last epoch is
    the one that no test image chose. Ctrl-C finishes the step, saves ``last.pt`` and raises KeyboardInterrupt.

    Raises:
        ValueError: bad input, by the name of its option.
    """
    device = _device(config.device)
    directory = root / config.name
    saved = checkpoint.read(directory / "last.pt", "resume") if resume else None
    if saved and (changed := {k: v for k, v in config.differences(saved["config"]).items() if k != "epochs"}):
        changes = ", ".join(f"{k} {was!r} -> {now!r}" for k, (was, now) in changed.items())
        raise ValueError(f"resume: got other options than {directory / 'last.pt'} was made with: {changes}")

    # The data lives on the device as uint8.
    sets = data.load(config)
    num_classes = len(sets.classes)
    counts = torch.bincount(sets.train.labels, minlength=num_classes)
    logger.info("%s", data.describe(sets))
    images, labels = sets.train.images.to(device), sets.train.labels.to(device)
    test_images, test_labels = sets.test.images.to(device), sets.test.labels.to(device)

    model, optimizer = build(config, num_classes, counts, device)
    head = model["head"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, config.decay)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    # Where the run stands: steps done in this epoch, their summed losses, and a row for each finished epoch.
    epoch, step, sums, history = 0, 0, torch.zeros(3, device=device), []
    if saved:
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        checkpoint.set_random_state(saved["random"])
        epoch, step, sums, history = saved["epoch"], saved["step"], saved["sums"].to(device), saved["history"]

    def state() -> dict:
        states = {key: part.state_dict() for key, part in parts.items()}
        where = {"epoch": epoch, "step": step, "sums": sums, "history": history}
        about = {"config": asdict(config), "classes": list(sets.classes), "counts": counts}
        return {**states, **where, **about, "random": checkpoint.random_state()}

    directory.mkdir(parents=True, exist_ok=True)
    log = _Log(directory, history, config.tensorboard)
    with _Interrupt() as interrupt:
        while epoch < config.epochs:
            started = time.perf_counter()
            order = torch.randperm(len(labels), generator=_generator(config.seed, epoch, -1)).to(device)
            batches = order.tensor_split(math.ceil(len(order) / config.batch_size))  # none is a leftover of one
            title = f"{config.name} {epoch + 1}/{config.epochs}"
            model.train()
            with tqdm(total=len(batches), initial=step, desc=title, unit="step", leave=False) as progress:
                while step < len(batches):
                    rows = batches[step]
                    x = augment(images[rows], _generator(config.seed, epoch, step))
                    loss = losses(config, model, x, labels[rows])
                    optimizer.zero_grad()
                    loss[0].backward()
                    optimizer.step()
                    sums += loss.detach() * len(rows)
                    step += 1
                    progress.update()
                    if interrupt.asked and step < len(batches):
                        checkpoint.save(directory / "last.pt", state())
                        logger.info("stopped in epoch %d; the same command with --resume continues", epoch + 1)
                        raise KeyboardInterrupt
            scheduler.step()

            matrix = evaluate(lambda x: head(features(config, model, x)), model, test_images, test_labels, num_classes)
            means = dict(zip(("loss", "classification", "consistency"), (sums / len(labels)).tolist(), strict=True))
            row = {"epoch": epoch + 1, **means, **metrics.accuracies(matrix), "seconds": time.perf_counter() - started}
            best = row["mean"] > max((h["mean"] for h in history), default=-1.0)
            history.append(row)
            epoch, step, sums = epoch + 1, 0, torch.zeros(3, device=device)
            checkpoint.save(directory / "last.pt", state())
            if best:
                checkpoint.save(directory / "best.pt", state())
            log.write(row)
            logger.info(
                "%s: loss %.4f, overall %.2f %%, mean %.2f %%, %.1f s",
                title, row["loss"], row["overall"], row["mean"], row["seconds"],
            )  # fmt: skip
            if interrupt.asked:
                logger.info("stopped after epoch %d; the same command with --resume continues", epoch)
                raise KeyboardInterrupt

    log.close()
    matrix = evaluate(lambda x: head(features(config, model, x)), model, test_images, test_labels, num_classes)
    figures.confusion_matrix(directory / "confusion.png", matrix.cpu(), sets.classes)
    draw_maps(directory / "cam.png", config, model, sets)
    return Result(sets.classes, counts.tolist(), history, directory)


@torch.no_grad()
def draw_maps(
    path: Path, config: Config, model: nn.ModuleDict, sets: data.Data, only: Sequence[str] | None = None
) -> None:
    """Fig. 4: a test face of each class, or of ``only`` these, its mirror image, and the maps of all classes."""
    model.eval()
    head, device = model["head"], _device(config.device)
    assert isinstance(head, rk.RebalancedHead)
    labels = [c for c in sets.test.labels.unique().tolist() if only is None or sets.classes[c] in only]
    faces = torch.stack([sets.test.images[sets.test.labels == c][0] for c in labels])
    pair = features(config, model, torch.cat([faces, faces.flip(-1)]).to(device)).float()
    predicted = head(pair).argmax(1).tolist()
    figures.activation_maps(path, faces, head.maps(pair).cpu(), labels, predicted, sets.classes)


def cams(directory: Path, path: Path, only: Sequence[str] | None) -> None:
    """Draw the activation maps of a finished run, as :func:`draw_maps`.

    Raises:
        ValueError: no checkpoint there, or a class that the run does not know.
    """
    saved = checkpoint.read(directory / "last.pt", "run")
    if unknown := sorted(set(only or ()) - set(saved["classes"])):
        raise ValueError(f"classes: got {', '.join(unknown)}, expected some of {', '.join(saved['classes'])}")
    config = Config(**saved["config"])
    model, _ = build(config, len(saved["classes"]), saved["counts"], _device(config.device))
    model.load_state_dict(saved["model"])
    draw_maps(path, config, model, data.load(config), only)


def build(
    config: Config, num_classes: int, counts: Tensor, device: torch.device
) -> tuple[nn.ModuleDict, torch.optim.Adam]:
    """Backbone and head as one module, random by the seed of ``config``, and the optimizer of both."""
    torch.manual_seed(config.seed)
    backbone = backbones.create(config.backbone, config.image_size, config.backbone_options)
    head = rk.RebalancedHead(
        backbone.channels, num_classes, counts, beta=config.beta, alpha=config.alpha,
        consistency_weight=config.consistency_weight, backend=config.backend,
    )  # fmt: skip
    model = nn.ModuleDict({"backbone": backbone, "head": head}).to(device).to(memory_format=_layout(config))
    return model, torch.optim.Adam(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)


def features(config: Config, model: nn.ModuleDict, x: Tensor) -> Tensor:
    """The last maps (M, C, H, W) of uint8 images (M, 1 or 3, h, w)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp == "bf16"):
        return model["backbone"](_normalize(x).contiguous(memory_format=_layout(config)))


def losses(config: Config, model: nn.ModuleDict, x: Tensor, y: Tensor) -> Tensor:
    """(3,): loss, classification and consistency of a batch."""
    if config.method == "baseline":
        loss = nn.functional.cross_entropy(model["head"](features(config, model, x)), y)
        return torch.stack([loss, loss, loss.new_zeros(())])
    out = model["head"](features(config, model, torch.cat([x, x.flip(-1)])), y)  # both views in one pass
    return torch.stack([out.loss, out.classification, out.consistency])


@torch.no_grad()
def evaluate(logits, model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(L, L) confusion matrix of ``logits(images)``, with ``model`` in eval mode."""
    model.eval()
    predictions = torch.cat([logits(x).argmax(1) for x in images.split(256)])
    return metrics.confusion(labels, predictions, num_classes)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not and shifted by up to 1/16 of its side, the border repeated; uint8 in and out."""
    n, _, height, width = images.shape
    reach = max(height, width) // 16
    shift_y, shift_x = (torch.randint(-reach, reach + 1, (n, 1), generator=generator) for _ in range(2))
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    y = (torch.arange(height) + shift_y).clamp(0, height - 1)
    x = (torch.arange(width) + shift_x).clamp(0, width - 1)
    x = torch.where(mirrored, width - 1 - x, x)
    y, x, i = (t.to(images.device) for t in (y[:, :, None], x[:, None, :], torch.arange(n)[:, None, None]))
    return images.movedim(1, -1)[i, y, x].movedim(-1, 1)


def _layout(config: Config) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def _normalize(images: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def _generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """Random numbers by position, not by what was drawn before: a resumed run draws the same."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch} {step}".encode()))


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', expected 'cpu' or 'auto': PyTorch sees no CUDA device here")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


class _Log:
    """``metrics.jsonl``, begun with the rows of the checkpoint, and TensorBoard if wanted."""

    def __init__(self, directory: Path, history: list[dict], tensorboard: bool) -> None:
        self.file = (directory / "metrics.jsonl").open("w")
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self.board = SummaryWriter(str(directory), purge_step=len(history) + 1)
        self.file.writelines(json.dumps(row) + "\n" for row in history)
        self.file.flush()

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board:
            for key in ("loss", "classification", "consistency", "overall", "mean"):
                self.board.add_scalar(key, row[key], row["epoch"])

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


class _Interrupt(AbstractContextManager):
    """Ctrl-C sets ``asked``, so that the step in progress ends; a second one stops at once."""

    asked = False

    def __enter__(self) -> _Interrupt:
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
