"""Checkpoints: state dicts, random states and the configuration, never whole modules."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def save(path: Path, state: dict) -> None:
    """Write to a neighbour, then rename: a reader or a crash never meets half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, option: str) -> dict:
    """The state on the CPU, for the command-line ``option``; runs no code of the file.

    Raises:
        ValueError: no such file.
    """
    if not path.is_file():
        raise ValueError(f"{option}: got no file {path}, expected the checkpoint of an earlier run")
    return torch.load(path, weights_only=True, map_location="cpu")


def random_state() -> dict:
    """Of the generators that layers such as dropout draw from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
