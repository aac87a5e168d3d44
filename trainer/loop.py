"""One training run, from data to pictures."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import rebalfer_kernels as rk

from . import backbones, checkpoint, data, figures, metrics
from .config import Config

logger = logging.getLogger(__name__)


def train(config: Config, *, resume: bool = False, root: Path = Path("runs")) -> dict:
    """Train, evaluate each epoch, save ``last`` and ``best``, draw; the final accuracies are returned."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    directory = root / config.name
    directory.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(config.seed)
    sets = data.load(config.data, image_size=config.image_size, seed=config.seed, train_size=config.train_size)
    images, labels = (t.to(device) for t in sets.train)
    counts = torch.bincount(sets.train.labels, minlength=len(sets.classes))
    backbone = backbones.create(config.backbone, config.image_size, config.backbone_options)
    backbone = backbone.to(device, memory_format=layout)
    plain = config.method == "baseline"  # cross-entropy on one view
    head = rk.RebalancedHead(
        backbone.channels, len(sets.classes), counts, beta=config.beta, alpha=config.alpha,
        consistency_weight=config.consistency_weight, backend=config.backend, device=device,
    )  # fmt: skip
    model = torch.nn.ModuleDict({"backbone": backbone, "head": head})
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, config.decay)
    generator = torch.Generator().manual_seed(config.seed)
    step_state = {"epoch": 0, "best": -1.0}
    saved_parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def state() -> dict:
        states = {name: part.state_dict() for name, part in saved_parts.items()}
        random = {"generator": generator.get_state(), "torch": torch.get_rng_state()}
        return {**states, **random, **step_state, "config": asdict(config), "classes": list(sets.classes)}

    if resume:
        saved = checkpoint.read(directory / "last.pt")
        for name, part in saved_parts.items():
            part.load_state_dict(saved[name])
        generator.set_state(saved["generator"])
        torch.set_rng_state(saved["torch"])
        step_state |= {k: saved[k] for k in step_state}

    result: dict = {}
    log = directory / "metrics.jsonl"
    with log.open("a" if resume else "w") as log_file:
        for epoch in range(step_state["epoch"], config.epochs):
            started, seen, total = time.perf_counter(), 0, torch.zeros(3)
            before = state()
            order = torch.randperm(len(labels), generator=generator).to(device)
            batches = order.split(config.batch_size)
            model.train()
            try:
                for rows in tqdm(batches, desc=f"{config.name} {epoch + 1}/{config.epochs}", leave=False):
                    x, y = _augment(images[rows], generator), labels[rows]
                    if plain:
                        loss = torch.nn.functional.cross_entropy(head(backbone(x.to(memory_format=layout))), y)
                        parts = torch.stack([loss, loss, loss.new_zeros(())])
                    else:
                        pair = torch.cat([x, x.flip(-1)]).to(memory_format=layout)  # one pass for both views
                        out = head(backbone(pair), y)
                        loss, parts = out.loss, torch.stack(out[:3])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    total += parts.detach().cpu() * len(rows)
                    seen += len(rows)
            except KeyboardInterrupt:
                checkpoint.save(directory / "last.pt", before)
                logger.info("interrupted: epoch %d will be repeated by --resume", epoch + 1)
                raise
            scheduler.step()
            matrix = evaluate(backbone, head, sets.test, device, len(sets.classes))
            result = metrics.accuracies(matrix)
            mean_loss, classification, consistency = (total / seen).tolist()
            row = {
                "epoch": epoch + 1, "loss": mean_loss, "classification": classification, "consistency": consistency,
                **result, "seconds": time.perf_counter() - started,
            }  # fmt: skip
            log_file.write(json.dumps(row) + "\n")
            log_file.flush()
            improved = result["mean"] > step_state["best"]
            step_state |= {"epoch": epoch + 1, "best": max(step_state["best"], result["mean"])}
            checkpoint.save(directory / "last.pt", state())
            if improved:
                checkpoint.save(directory / "best.pt", state())

    matrix = evaluate(backbone, head, sets.test, device, len(sets.classes))
    figures.confusion_matrix(directory / "confusion.png", matrix, sets.classes)
    _picture(directory / "cam.png", backbone, head, sets, device)
    return {**metrics.accuracies(matrix), "classes": sets.classes, "counts": counts.tolist(), "directory": directory}


@torch.no_grad()
def evaluate(backbone, head, split: data.Split, device: torch.device, num_classes: int) -> Tensor:
    """Confusion matrix of a split."""
    backbone.eval()
    predictions = [head(backbone(_normalize(x.to(device)))).argmax(1).cpu() for x in split.images.split(256)]
    return metrics.confusion(split.labels, torch.cat(predictions), num_classes)


def _normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random mirror image and a shift of up to 1/16 of the size, padded by the edge; the batch shares the shift."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
    images = torch.where(flip, images.flip(-1), images)
    size = images.shape[-1]
    pad = max(1, size // 16)
    dy, dx = torch.randint(0, 2 * pad + 1, (2,), generator=generator).tolist()
    padded = torch.nn.functional.pad(_normalize(images), (pad,) * 4, mode="replicate")
    return padded[..., dy : dy + size, dx : dx + size]


@torch.no_grad()
def _picture(path: Path, backbone, head, sets: data.Data, device: torch.device) -> None:
    """The maps of the first test image of the rarest class."""
    rare = int(torch.bincount(sets.train.labels, minlength=len(sets.classes)).argmin())
    image = sets.test.images[(sets.test.labels == rare).nonzero()[0]].to(device)
    pair = _normalize(torch.cat([image, image.flip(-1)]))
    maps = head.maps(backbone.eval()(pair)).cpu()
    faces = (pair.mean(1).cpu() + 1) / 2
    figures.activation_maps(path, faces, maps, sets.classes, f"class activation maps, true class {sets.classes[rare]}")
