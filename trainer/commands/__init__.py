"""The commands, one file each, found by its file's name.

A new command is one file: a frozen dataclass ``Options``, whose docstring's first line is its help, whose fields become
its flags, and whose ``run`` does the work.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .. import backbones, checkpoint, compute, loop
from ..config import Checked, Compute, Config, UserError, expect, option, restored
from ..methods import Method


@dataclass(frozen=True)
class OfCheckpoint(Checked):
    """Base of the options of a command that uses a trained method."""

    checkpoint: str = option("", "a run's folder, or its best.pt or last.pt", positional=True)
    device: str = option("auto", choices=("auto", "cpu", "cuda"))
    overwrite: bool = option(False, "replace what the command writes, if it exists")


class Trained(NamedTuple):
    """A method with its weights, ready to classify."""

    config: Config
    classes: tuple[str, ...]
    method: Method
    about: str  #: the run, the epoch and how it was chosen
    saved: dict


def load(path: str, device: str) -> Trained:
    """From ``best.pt`` or ``last.pt``; a folder stands for its ``best.pt``.

    Raises:
        UserError: no such file, a damaged or foreign one, or no such device.
    """
    file = Path(path).expanduser()
    file = file / "best.pt" if file.is_dir() else file
    saved = checkpoint.read(file)
    if missing := sorted({"config", "identity", "model", "epoch"} - set(saved)):
        raise UserError(f"{file}: not a checkpoint of this program: it has no {', '.join(missing)}")
    config = restored(saved["config"])
    kept = {name: getattr(config.compute, name) for name in ("amp", "channels_last")}
    options = Compute(device=device, **kept)  # the rest is about training, and may need another machine
    config = dataclasses.replace(config, compute=options)
    identity = saved["identity"]
    target = compute.device_of(options, "device")
    compute.try_backend(options, target)
    backbone = backbones.create(config, saved.get("weights", {}))
    method = loop.build(config, tuple(identity["counts"]["train"]), target, backbone)
    method.load_state_dict(saved.get("average") or saved["model"])
    # Of last.pt: how many are done.
    epoch = f"{saved['epoch'] + 1}, the best on {saved['chooser']}" if "score" in saved else saved["epoch"]
    return Trained(config, tuple(identity["classes"]), method, f"{config.name}, epoch {epoch}", saved)


def new_file(path: str, overwrite: bool, name: str = "out") -> Path:
    """Raises :class:`UserError` by the option ``name`` if ``path`` may not be replaced or has no folder to be in."""
    file = Path(path).expanduser()
    if file.exists() and not overwrite:
        raise UserError(f"{name}: got {file}, which exists: --overwrite replaces it")
    expect(file.parent.is_dir(), name, path, "a path in a folder that exists")
    return file
