"""The device of a run, found and tried before any image is read."""

from __future__ import annotations

import logging
import threading

import torch

import rebalfer_kernels as rk

from .config import Compute, UserError

logger = logging.getLogger(__name__)


def prepare(compute: Compute) -> torch.device:
    """The device, with the backend of the head tried on it, which compiles kernels on the first use.

    Raises:
        UserError: no such device, or a backend that is unknown or can't serve it.
    """
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device: got 'cuda', expected 'cpu' or 'auto': PyTorch sees no CUDA device")
    device = torch.device("cuda" if compute.device != "cpu" and torch.cuda.is_available() else "cpu")
    if compute.threads:
        torch.set_num_threads(compute.threads)
    text = "compiling the kernels for this machine, which takes about a minute and happens once"
    notice = threading.Timer(2.0, logger.info, (text,))
    notice.daemon = True
    notice.start()
    try:
        features, weight = torch.zeros(2, 8, 2, 2, device=device), torch.zeros(2, 8, device=device)
        table = torch.eye(2, device=device)
        labels = torch.zeros(1, dtype=torch.int64, device=device)
        rk.rebalanced_head_loss(
            features, weight, None, labels, target_table=table, map_weights=table[0], backend=compute.backend
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"compute.{error}") from error
    finally:
        notice.cancel()
    return device
