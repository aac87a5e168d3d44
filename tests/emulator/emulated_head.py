"""The head's CUDA kernels on the emulator: a case's tensors, its forward, its backward."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import emulate
import torch
from torch import Tensor

import rebalfer_kernels as rk
from rebalfer_kernels.transforms import TWIN_MAPS, TwinMap

CUDA = emulate.CSRC / "cuda"
LAYOUTS = ("nchw", "channels_last")
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@functools.cache
def library(sm80: bool = False) -> emulate.Library:
    sources = [CUDA / f"kernels_{name}.cu" for name in (*NAMES.values(), "cross_entropy")]
    return emulate.Library(Path(__file__).with_name("entry_points.cu"), *sources, sm80=sm80)


scratch: list[Tensor] = []  #: of the last forward, which its launch has the addresses of


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def shifted(t: Tensor, by: int) -> Tensor:
    """The same values, strides kept, `by` elements behind an aligned address."""
    room = torch.empty(t.numel() + by, dtype=t.dtype)
    return room[by:].as_strided(t.shape, t.stride(), by).copy_(t)


class Case:
    def __init__(self, n, c, h, w, classes, dtype, layout="nchw", *, weight_dtype=None, soft=False, seed=0, shift=0):
        g = torch.Generator().manual_seed(seed)
        self.n, self.c, self.h, self.w, self.classes, self.dtype = n, c, h, w, classes, dtype
        features = torch.randn(2 * n, c, h, w, generator=g).to(dtype)
        self.channels_last = layout == "channels_last"
        if self.channels_last:
            features = features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        self.features = shifted(features, shift)
        weight_dtype = weight_dtype or dtype
        self.weight = shifted((torch.randn(classes, c, generator=g) / c**0.5).to(weight_dtype), shift)
        self.bias = torch.randn(classes, generator=g).to(weight_dtype)
        self.labels = torch.randint(0, classes, (n + 1,), generator=g)[1:]
        self.soft = torch.rand(n, classes, generator=g) if soft else None
        weights = rk.effective_number_weights([10 * 3 ** (i % 9) + 1 for i in range(classes)])
        self.table, self.v = rk.target_table(weights) * 1.25, weights.sqrt()

    def geometry(self, transform="hflip", views=2, n=None):
        twin = torch.tensor(TwinMap.of(TWIN_MAPS[transform]).on(self.h, self.w))
        n = self.n if n is None else n
        return STORAGE[self.dtype], n, self.c, self.h, self.w, self.classes, views, int(self.channels_last), twin

    def cluster(self, sm80: bool) -> int:
        """What cluster_blocks says, but at least 2 blocks where there are channels for them."""
        return 1 if sm80 else 1 if self.c <= 64 else 2 if self.c < 256 else 4

    def feature_output(self, m: int) -> Tensor:
        out = nans(m, self.h, self.w, self.c, dtype=self.dtype).permute(0, 3, 1, 2)
        return out if self.channels_last else nans(m, self.c, self.h, self.w, dtype=self.dtype)


def forward(
    case, *, mean=True, p=2, transform="hflip", views="both", detach=True, lam=2.0, classified=True, maps=True,
    save=True, sm80=False, order="forward", cluster=None, stages=4, multiprocessors=132,
):  # fmt: skip
    n, c, classes = case.n, case.c, case.classes
    losses = () if mean else (n,)
    out = {
        "loss": nans(*losses), "classification": nans(*losses), "consistency": nans(*losses),
        "logits": nans(2 * n, classes), "maps": nans(2 * n, classes, case.h, case.w),
        "map_grad": nans(n, classes, case.h, case.w),
        "logit_grad": nans(2 * n, classes), "pooled": nans(2 * n, c), "cam_grad": nans(n, classes, c),
    }  # fmt: skip
    ticket, per_sample = torch.zeros(1, dtype=torch.int32), nans(2, n)
    scratch[:] = [ticket, per_sample]
    of_class = lambda x: x if classified else None  # noqa: E731
    labels = case.labels if case.soft is None else None
    counters = library(sm80)(
        "run_forward", *case.geometry(transform), case.features, case.weight, int(case.weight.dtype == torch.float32),
        of_class(case.bias), of_class(labels), of_class(case.soft), of_class(case.table), case.v, lam, p,
        int(views == "both"), cluster or case.cluster(sm80), stages, multiprocessors, of_class(out["loss"]),
        of_class(out["classification"]), out["consistency"], per_sample if mean else None,
        ticket if mean else None, of_class(out["logits"]),
        out["maps"] if maps else None, out["map_grad"] if save else None,
        of_class(out["logit_grad"] if save else None), out["pooled"] if save else None,
        None if detach else out["cam_grad"], order=order,
    )  # fmt: skip
    assert ticket.item() == 0
    return out, counters


def backward(
    case, saved, ups, *, mean=True, transform="hflip", detach=True, lam=2.0, classified=True,
    need=(True, True, True), sm80=False, order="forward",
):  # fmt: skip
    n, c, classes = case.n, case.c, case.classes
    out = (
        case.feature_output(2 * n),
        nans(classes, c, dtype=case.weight.dtype),
        nans(classes, dtype=case.weight.dtype),
    )
    of_class = lambda x: x if classified else None  # noqa: E731
    strided = [x for u in ups[:3] for x in (u, 0 if u is None or u.dim() == 0 else u.stride(0))]
    counters = library(sm80)(
        "run_backward", *case.geometry(transform), *strided, ups[3], case.weight,
        int(case.weight.dtype == torch.float32), saved["map_grad"], of_class(saved["logit_grad"]),
        of_class(saved["pooled"]), None if detach else saved["cam_grad"], lam, 1 / n if mean else 1.0,
        *(o if wanted else None for o, wanted in zip(out, need, strict=True)), order=order,
    )  # fmt: skip
    return dict(zip(("d_features", "d_weight", "d_bias"), out, strict=True)), counters


def upstreams(case, mean, seed=1):
    g = torch.Generator().manual_seed(seed)
    ups = [torch.randn(() if mean else (n,), generator=g) for n in (case.n,) * 3]
    if not mean:
        ups[1] = torch.stack([ups[1], ups[0]], 1)[:, 0]  # a stride of 2
    return [*ups, torch.randn(2 * case.n, case.classes, generator=g)]
