"""Several processes that train one model, as torchrun starts them; with one process all of this does nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .config import UserError

T = TypeVar("T")
#: Between two looks at the losses and at other processes' signals, for each of which the host waits for the device: at
#: most so many steps, and about so many seconds.
CHECK_STEPS, CHECK_SECONDS = 50, 5.0


def rank() -> int:
    """Of this process; the one of rank 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def speaks() -> bool:
    """Whether this process is the one that prints, also before it joins the others."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, over NCCL on GPUs and Gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def first(work: Callable[[], T]) -> T:
    """What ``work`` returns: rank 0 does it first, so that the others find what it leaves on the disk.

    Raises:
        UserError: as rank 0 did, in every process.
    """
    result: Any = None
    error: UserError | None = None
    if not rank():
        try:
            result = work()
        except UserError as refused:
            error = refused
    if error := same(error):
        raise error
    return work() if rank() else result


def share(n: int) -> slice:
    """Which of ``n`` images are this process's; no process has two more than another.

    >>> share(5)
    slice(0, 5, None)
    """
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def total(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, which each of them gets."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def agreed(signum: int | None, check: bool) -> int | None:
    """The signal that a process has got, if any; several processes compare only at a ``check``."""
    if size() == 1:
        return signum
    if not check:
        return None
    highest = torch.tensor(signum or 0)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return int(highest) or None


def until_check(seconds: float) -> int:
    """Steps to the next check, the same in all processes, if one takes ``seconds``.

    >>> until_check(0.01), until_check(2.0), until_check(60.0)
    (50, 2, 1)
    """
    return same(max(1, min(CHECK_STEPS, int(CHECK_SECONDS / max(seconds, 1e-3)))))


def same(value: Any) -> Any:
    """The value that rank 0 has."""
    box = [value]
    if size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]
