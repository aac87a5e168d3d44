"""Leaves to differentiate by, and upstream gradients of any stride."""

import torch


def leaf(x, backend):
    """A copy of its own, where the backend's tensors live; the truth is computed from ``x``, on the CPU."""
    return x.detach().to(backend.device, copy=True, memory_format=torch.preserve_format).requires_grad_()


def strided(x):
    """The same values, every second element of a larger tensor, in another order of the dimensions."""
    larger = x.new_full([2 * s for s in reversed(x.shape)], float("nan"))
    view = larger[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
    view.copy_(x)
    return view


def signed_upstreams(n: int, classes: int, device: str):
    g = torch.Generator().manual_seed(3)
    shapes = [(n,), (n,), (n,), (2 * n, classes)]
    return [torch.randn(s, generator=g).to(device) for s in shapes]
