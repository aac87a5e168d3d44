"""The device of a run, found and tried before any image is read."""

from __future__ import annotations

import re
import threading

import torch

import rebalfer_kernels as rk

from .config import Compute, UserError, expect, logger


def device_of(compute: Compute, option: str = "compute.device") -> torch.device:
    """The device of this process, which ``option`` names.

    Raises:
        UserError: there is no such device, or an option needs another.
    """
    possible = compute.device != "cuda" or torch.cuda.is_available()
    expect(possible, option, compute.device, "'cpu' or 'auto': PyTorch sees no CUDA device")
    on_gpu = compute.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.distributed.get_node_local_rank(0)) if on_gpu else torch.device("cpu")
    for name in ("cuda_graph", "sync_batchnorm"):
        expect(on_gpu or not getattr(compute, name), f"compute.{name}", True, "a GPU: this run uses the CPU")
    if compute.threads:
        torch.set_num_threads(compute.threads)
    return device


def try_backend(compute: Compute, device: torch.device) -> None:
    """Runs the consistency once, which builds the native kernels where they are not built.

    Raises:
        UserError: a backend that is unknown or can't serve the device, an instruction set that the CPU lacks.
    """
    text = "compiling the kernels for this machine, which takes about a minute and happens once"
    notice = threading.Timer(2.0, logger.info, (text,))
    notice.daemon = True
    notice.start()
    try:
        features, weight = torch.zeros(2, 8, 2, 2, device=device), torch.zeros(2, 8, device=device)
        rk.attention_consistency(features, weight, weight[:, 0], backend=compute.backend)
    except (ValueError, RuntimeError) as error:
        if not (verdict := re.search(r"(backend|REBALFER_\w+): .*", str(error))):
            raise  # such as too little memory
        raise UserError(f"{'compute.' * (verdict[1] == 'backend')}{verdict[0]}") from error
    finally:
        notice.cancel()
