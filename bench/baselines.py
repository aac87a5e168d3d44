"""The operations in the ways people write them, each from only the formulas.

A formulation takes a :class:`bench.cases.Problem` and returns the result of its operation: the loss of Eq. 6 (p = 2,
horizontal flip, both views; the CAM weight detached or not), the consistency, the maps, the cross-entropy, views. The
exception is ``identity``, which reads and writes what any of them must and computes nothing: the practical floor.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rebalfer_kernels as rk
from rebalfer_kernels.backend import BACKENDS

from .cases import Case, Problem

Formulation = Callable[[Problem], Tensor]

#: Of the views that are timed; without noise, whose random numbers take most of the time.
AUGMENT = rk.Augment(flip=0.5, crop_scale=(0.8, 1.0), brightness=0.2, contrast=0.2, erase_probability=0.5)
#: Largest product of the released formulation, 2N x L x C x H x W: a larger one is left out.
LARGEST_BYTES = {"cpu": 2**31, "cuda": 2**34}


def ours(x: Problem, backend: str | None = None) -> Tensor:
    """The library's head, on the backend it chooses or the one that is named."""
    return rk.rebalanced_head_loss(
        x.features, x.weight, x.bias, x.targets, target_table=x.target_table, map_weights=x.map_weights,
        consistency_weight=x.consistency_weight, detach_cam_weight=x.op != "undetached", backend=backend,
    ).loss  # fmt: skip


def our_consistency(x: Problem, backend: str | None = None) -> Tensor:
    return rk.attention_consistency(x.features, x.weight, x.map_weights, backend=backend)


def our_maps(x: Problem, backend: str | None = None) -> Tensor:
    return rk.class_activation_maps(x.features, x.weight, backend=backend)


def our_cross_entropy(x: Problem, backend: str | None = None) -> Tensor:
    return rk.rebalanced_cross_entropy(x.features, x.targets, x.target_table, backend=backend)


def our_views(x: Problem, backend: str | None = None) -> Tensor:
    return rk.paired_views(
        x.features, x.targets, out_size=x.side, mean=0.5, std=0.5, seed=0, epoch=1, augment=AUGMENT, dtype=x.dtype,
        backend=backend,
    )  # fmt: skip


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return features.sum()

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> Tensor:
        return torch.full_like(ctx.saved_tensors[0], 1.0)


def identity(x: Problem) -> Tensor:
    """The identity op: reads 2s and writes 2s."""
    return _Identity.apply(x.features)


def identity_of_views(x: Problem) -> Tensor:
    """Writes the pair, eight times the bytes of the images that it does not even read."""
    size = (2 * len(x.targets), 3, x.side, x.side)
    return torch.full(size, 1.0, dtype=x.dtype, device=x.features.device)


def maps_by_einsum(x: Problem) -> Tensor:
    """What people write."""
    return torch.einsum("lc,mchw->mlhw", x.cam_weight(), x.features)


def maps_by_layout(x: Problem) -> Tensor:
    """One product in the order that the features are stored in."""
    if x.features.is_contiguous():
        flat = x.features.flatten(2)
        return torch.bmm(x.cam_weight().expand(len(flat), -1, -1), flat).unflatten(2, x.features.shape[2:])
    return F.linear(x.features.permute(0, 2, 3, 1), x.cam_weight()).permute(0, 3, 1, 2)


def maps_released(x: Problem) -> Tensor:
    """The whole 2N x L x C x H x W product, then its sum."""
    return (x.features.unsqueeze(1) * x.cam_weight()[None, :, :, None, None]).sum(2)


def maps_by_torch_cam(x: Problem) -> Tensor:
    """By the package torch-cam: an extractor on the last layer of a network, class by class."""
    from torchcam.methods import CAM

    network = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(*x.weight.shape[::-1]))
    network[3].weight = nn.Parameter(x.weight)
    with CAM(network, "0", "3") as extractor, torch.no_grad():
        network[0](x.features)
        return torch.stack([extractor(i, normalized=False)[0] for i in range(len(x.weight))], 1)


def plain_eager(x: Problem) -> Tensor:
    """GAP and FC for the logits, an einsum for the maps: what people write."""
    logits = F.linear(x.features.mean((2, 3)), x.weight, x.bias)
    cams, twin_cams = maps_by_einsum(x).chunk(2)
    return _loss(x, logits, cams, twin_cams.flip(-1))


def best_eager(x: Problem) -> Tensor:
    """The features are multiplied once: z = mean(A) + b, and (W - W.detach()) P is zero with the gradient of W P."""
    maps = maps_by_layout(x)
    logits = maps.mean((2, 3)) + x.bias
    if x.op != "undetached":
        with torch.no_grad():
            pooled = x.features.mean((2, 3))
        logits = logits + F.linear(pooled, x.weight - x.cam_weight())
    cams, twin_cams = maps.chunk(2)
    return _loss(x, logits, cams, twin_cams.flip(-1))


def released(x: Problem) -> Tensor:
    """As in the programs released with the papers: the 2N x L x C x H x W product, GAP, FC, a sampled flip."""
    logits = F.linear(F.adaptive_avg_pool2d(x.features, 1).flatten(1), x.weight, x.bias)
    cams, twin_cams = maps_released(x).chunk(2)
    return _loss(x, logits, cams, _sampled_flip(twin_cams))


def _sampled_flip(maps: Tensor) -> Tensor:
    height, width = maps.shape[2:]
    grid = _flip_grid(height, width, maps.dtype, maps.device).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=True)


@functools.cache
def _flip_grid(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    y, x = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width))
    y, x = torch.meshgrid(y, -x, indexing="ij")
    return torch.stack((x, y), -1).to(device, dtype)


def _loss(x: Problem, logits: Tensor, cams: Tensor, untransformed_twin_cams: Tensor) -> Tensor:
    soft = x.target_table[x.targets]
    image, twin = logits.to(soft.dtype).chunk(2)
    classification = F.cross_entropy(image, soft) + F.cross_entropy(twin, soft)
    return classification + x.consistency_weight * _consistency(x, cams, untransformed_twin_cams)


def _consistency(x: Problem, cams: Tensor, untransformed_twin_cams: Tensor) -> Tensor:
    return (x.map_weights[:, None, None] * (cams - untransformed_twin_cams)).square().mean()


def plain_consistency(x: Problem) -> Tensor:
    cams, twin_cams = maps_by_einsum(x).chunk(2)
    return _consistency(x, cams, twin_cams.flip(-1))


def best_consistency(x: Problem) -> Tensor:
    cams, twin_cams = maps_by_layout(x).chunk(2)
    return _consistency(x, cams, twin_cams.flip(-1))


def released_consistency(x: Problem) -> Tensor:
    cams, twin_cams = maps_released(x).chunk(2)
    return _consistency(x, cams, _sampled_flip(twin_cams))


def plain_cross_entropy(x: Problem) -> Tensor:
    soft = x.target_table[x.targets]
    return F.cross_entropy(x.features.to(soft.dtype), soft)


def plain_views(x: Problem) -> Tensor:
    """The library's reference, plain PyTorch: no other program draws the same random numbers."""
    return our_views(x, backend="reference")


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, x: Problem) -> Tensor:
        leaves = [t.detach().requires_grad_() for t in (features, weight, bias)]
        with torch.enable_grad():
            loss = ours(x._replace(features=leaves[0], weight=leaves[1], bias=leaves[2]))
        ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        return *(d_loss.to(gradient.dtype) * gradient for gradient in ctx.saved_tensors), None


def gradient_in_forward(x: Problem) -> Tensor:
    """Ours, with the gradient computed in the forward, stored, and scaled in the backward: what storing it costs."""
    return _GradientInForward.apply(*x[:3], x)


#: The loss by itself, as the goals judge it.
FORMULATIONS: dict[str, Formulation] = {
    "ours": ours,
    "identity": identity,
    "plain eager": plain_eager,
    "best eager": best_eager,
    "released": released,
}
#: Every operation's, by its word in a case's name.
OPERATIONS: dict[str, dict[str, Formulation]] = {
    "head": FORMULATIONS,
    "undetached": FORMULATIONS,
    "consistency": {
        "ours": our_consistency,
        "identity": identity,
        "plain eager": plain_consistency,
        "best eager": best_consistency,
        "released": released_consistency,
    },
    "maps": {
        "ours": our_maps,
        "identity": identity,
        "plain eager": maps_by_einsum,
        "best eager": maps_by_layout,
        "released": maps_released,
    },
    "cross_entropy": {"ours": our_cross_entropy, "identity": identity, "plain eager": plain_cross_entropy},
    "views": {"ours": our_views, "identity": identity_of_views, "plain eager": plain_views},
}
if importlib.util.find_spec("torchcam"):
    OPERATIONS["maps"]["torch-cam"] = maps_by_torch_cam
#: Which are timed under torch.compile too.
COMPILED = ("plain eager", "best eager")


def contenders(case: Case, more: bool = False) -> dict[str, Formulation]:
    """The operation's formulations, eager and under torch.compile, which compiles at the first call.

    ``more`` adds those that take long to compile or that nobody uses: max-autotune, and the gradient in the forward.
    """
    torch.compiler.reset()  # or the sizes of earlier cases make it compile for sizes in general
    known = dict(OPERATIONS[case.op])
    if 2 * case.N * case.L * case.C * case.side**2 * case.dtype.itemsize > LARGEST_BYTES[case.device]:
        known.pop("released", None)
    compiled = {} if case.op == "views" else {name: known[name] for name in COMPILED if name in known}
    known |= {f"{name}, compiled": torch.compile(f, fullgraph=True) for name, f in compiled.items()}
    if more:
        # Without CUDA graphs of its own, which cannot be captured in the ones that are timed.
        mode = "max-autotune-no-cudagraphs"
        known |= {f"{n}, max-autotune": torch.compile(f, fullgraph=True, mode=mode) for n, f in compiled.items()}
        if case.op in ("head", "undetached"):
            known["gradient in forward"] = gradient_in_forward
    return known


def fused_backends(device: str) -> list[str]:
    """Names of the backends with kernels for this type of device, available or not."""
    return [backend.name for backend in BACKENDS.values() if backend.fused and device in backend.devices()]


def on_each_backend(names: Iterable[str], op: str = "head") -> dict[str, Formulation]:
    """The library's operation on each of these that is available, by its name."""
    mine: Callable[..., Tensor] = OPERATIONS[op]["ours"]
    return {name: functools.partial(mine, backend=name) for name in names if BACKENDS[name].available().ok}
