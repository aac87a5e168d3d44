"""Tiny runs of the trainer through its command line: a few tenths of a second each, on the CPU.

runs.train(root, "--name=a", "--epochs=2")    the exit status
"""

import json
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint
from trainer.__main__ import main

TINY = {"channels": [8, 8, 8, 16], "stem_width": 8}
#: A thin ResNet on 40 faces of 32 pixels, in 5 steps an epoch; without pictures, which take most of the time.
FLAGS = [
    "--preset=demo", f"--backbone.options={json.dumps(TINY)}", "--image-size=32", "--batch-size=8", "--epochs=1",
    "--data.train-size=40", "--data.test-size=30", "--learning-rate=0.02", "--seed=4",
    "--no-output.pictures", "--compute.device=cpu", "--compute.backend=reference",
]  # fmt: skip
#: Flags under which every part of a run's state matters: moments, moving average, schedule, random layers and views.
STATEFUL = [
    f"--backbone.options={json.dumps(TINY | {'drop_path_rate': 0.3})}", "--split.choose-on=held-out",
    "--optim.average=0.9", "--optim.accumulate=2", "--optim.clip=5", "--optim.warmup-steps=7",
    "--optim.schedule-by=step", "--augment.crop=0.6", "--augment.noise=9", "--augment.erase=0.5",
]  # fmt: skip


def train(root: Path, *options: str) -> int:
    """The exit status of a run in ``root``."""
    return main(["train", *FLAGS, f"--output.root={root}", *options])


def rows(run: Path) -> list[dict]:
    """The log of a run without what differs from one machine to another."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in lines]


def state(run: Path, name: str = "last.pt") -> dict:
    """What a checkpoint of a run holds, without what differs from one machine to another."""
    saved = checkpoint.read(run / name)
    if "history" in saved:
        saved["history"] = [
            {k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in saved["history"]
        ]
    for key in ("row", "config"):
        saved.pop(key, None)
    return saved


def differ(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ in a bit; [] if nowhere."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{path}.{key}" for key in a.keys() ^ b.keys()]
        return keys + [line for key in a.keys() & b.keys() for line in differ(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differ(*pair, f"{path}.{i}")]
    return [] if type(a) is type(b) and a == b else [path]
