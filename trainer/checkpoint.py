"""Atomic checkpoints: state dicts and the configuration, never whole modules."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def save(path: Path, state: dict) -> None:
    """Write to a neighbour and rename, so that a reader or an interruption never meets half a file."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def read(path: Path) -> dict:
    if not path.exists():
        raise ValueError(f"resume: got no checkpoint at {path}, expected one written by an earlier run")
    return torch.load(path, weights_only=True, map_location="cpu")
