"""What is measured: the sizes, and the tensors of one size."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rebalfer_kernels.doctor.cases import Size, random_inputs

#: Inputs are rotated until this many times the L2 cache was read.
TIMES_L2 = 3


class Case(NamedTuple):
    """One operation on one size of input: (2N, C, side, side) features and L classes."""

    N: int
    C: int
    layout: str  #: "nchw" or "channels_last"
    dtype: torch.dtype  #: of features, weight and bias
    device: str = "cpu"
    side: int = 7
    L: int = 7
    op: str = "head"  #: a name of baselines.OPERATIONS

    @property
    def name(self) -> str:
        """What ``--cases`` looks in; of side, L and op only what is not usual.

        >>> Case(32, 512, "nchw", torch.float32).name
        'N32-C512-nchw-float32'
        >>> Case(32, 512, "nchw", torch.float32, side=14, L=100, op="maps").name
        'N32-C512-nchw-float32-14x14-L100-maps'
        """
        words = [f"N{self.N}", f"C{self.C}", self.layout, str(self.dtype).removeprefix("torch.")]
        words += [f"{self.side}x{self.side}"] * (self.side != 7) + [f"L{self.L}"] * (self.L != 7)
        return "-".join(words + [self.op] * (self.op != "head"))

    @classmethod
    def named(cls, name: str, device: str = "cpu") -> Case:
        """The case of a name.

        >>> Case.named("N32-C512-nchw-float32-14x14-L100-maps")
        Case(N=32, C=512, layout='nchw', dtype=torch.float32, device='cpu', side=14, L=100, op='maps')
        """
        N, C, layout, dtype, *unusual = name.split("-")
        case = cls(int(N[1:]), int(C[1:]), layout, getattr(torch, dtype), device)
        for word in unusual:
            if word[0].isdigit():
                case = case._replace(side=int(word.partition("x")[0]))
            elif word[0] == "L":
                case = case._replace(L=int(word[1:]))
            else:
                case = case._replace(op=word)
        return case

    @property
    def group(self) -> str:
        """Which goals apply to the size: those of the "paper's batch", of a "large" one, or only the general ones ("").

        The "fixed cost" of a call is what is left of it at one image of 16 channels: no other goal applies to that.

        A bandwidth is judged of "large and wide" ones only: at 512 channels, what is saved for the backward and the
        second launch leave at most 88 % of the copy's, whatever the kernels do.

        >>> [Case(n, c, "nchw", torch.bfloat16).group for n, c in ((64, 512), (64, 2048), (512, 512), (512, 2048))]
        ["paper's batch", '', 'large', 'large and wide']
        >>> Case(1, 16, "nchw", torch.float32).group
        'fixed cost'
        """
        if (self.side, self.L, self.op) != (7, 7, "head"):
            return ""
        if self.C <= 16:
            return "fixed cost"
        if self.C == 512 and self.N in (32, 64):
            return "paper's batch"
        if self.N < 512:
            return ""
        return "large and wide" if self.C >= 2048 else "large"

    @property
    def gradient_bytes(self) -> int:
        """Of the features' gradient, which is as large as they are; or of the views that are made."""
        return 2 * self.N * self.C * self.side**2 * self.dtype.itemsize

    @property
    def floor_bytes(self) -> int:
        """What any formulation must move: its large inputs read once, what is as large written once.

        >>> floors = {op: Case(4, 64, "nchw", torch.float32, op=op).floor_bytes // 1024 for op in ("head", "maps")}
        >>> floors  # both views' features, and their gradient where there is one
        {'head': 196, 'maps': 108}
        """
        features, size = self.gradient_bytes, self.dtype.itemsize
        match self.op:
            case "maps":  # forward only; the maps are float32
                return features + 2 * self.N * self.L * self.side**2 * 4
            case "cross_entropy":
                return 2 * self.N * self.L * size
            case "views":  # uint8 images to both views
                return features // (2 * size) + features
        return 2 * features

    @property
    def smallest(self) -> Case:
        """The same call with next to nothing to compute: what is left is its fixed cost."""
        return self._replace(N=1, side=8) if self.op == "views" else self._replace(N=1, C=16)


#: The last maps of ResNet-18, MobileNet, Swin-T (whose layout is channels_last) and ResNet-50.
_CPU_SIZES = (
    (32, 512, "nchw"),
    (32, 512, "channels_last"),
    (32, 1024, "channels_last"),
    (64, 768, "channels_last"),
    (64, 2048, "nchw"),
    (64, 2048, "channels_last"),
)
#: What matters most first: a run with too little time leaves out the end.
_GPU_SIZES = (
    (32, 512, "channels_last"),
    (512, 2048, "channels_last"),
    (32, 512, "nchw"),
    (512, 2048, "nchw"),
    (64, 512, "channels_last"),
    (64, 512, "nchw"),
    (512, 512, "channels_last"),
    (512, 512, "nchw"),
    (64, 2048, "channels_last"),
    (64, 2048, "nchw"),
    (64, 768, "channels_last"),
    (512, 768, "channels_last"),
)
#: How the time grows with the batch, the weight's gradient above all.
_GROWING = tuple((N, 512, layout) for N in (4096, 1024, 256) for layout in ("channels_last", "nchw"))
CASES = [Case(*size, dtype) for dtype in (torch.float32, torch.bfloat16) for size in _CPU_SIZES]
CASES.append(Case(1, 16, "nchw", torch.float32))
CASES += [Case(*size, torch.bfloat16, "cuda") for size in (*_GPU_SIZES, (1, 16, "nchw"), *_GROWING)]
CASES += [Case(*size, torch.float32, "cuda") for size in _GPU_SIZES]

LAYOUTS = ("nchw", "channels_last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The operations, apart from the head with a CAM weight that is detached.
OPS = ("undetached", "consistency", "maps", "cross_entropy", "views")


def curves(device: str) -> list[Case]:
    """Along N, C and L, from what is bound by the fixed cost of a call to what is bound by memory."""
    usual = Case(32, 512, "channels_last", torch.bfloat16 if device == "cuda" else torch.float32, device)
    along_n = [usual._replace(N=N) for N in (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)]
    along_c = [usual._replace(C=C) for C in (16, 64, 128, 256, 768, 1024, 2048, 4096)]
    along_l = [usual._replace(L=L) for L in (2, 4, 8, 11, 16, 32, 100, 1000)]
    return [*along_n, *along_c, *along_l]


def everything(device: str) -> list[Case]:
    """Each network, kind of maps, number of classes, dtype, layout and operation that people have."""
    usual = Case(32, 512, "nchw", torch.float32, device)
    sizes = ((512, LAYOUTS), (1024, LAYOUTS), (768, LAYOUTS[1:]), (2048, LAYOUTS))
    batches = (32, 64, 512) if device == "cuda" else (32, 64)
    networks = [Case(N, C, x, dtype, device) for C, xs in sizes for x in xs for dtype in DTYPES for N in batches]
    layouts = [usual._replace(layout=x, dtype=dtype) for x in LAYOUTS for dtype in DTYPES[:2]]
    maps = [case._replace(side=side) for case in layouts for side in (4, 14)]
    classes = [case._replace(L=L) for case in layouts for L in (8, 11, 100, 1000)]
    operations = [case._replace(op=op) for op in OPS[:3] for case in layouts]
    rows = [usual._replace(N=N, L=L, op="cross_entropy") for N in (32, 4096) for L in (7, 1000)]
    views = [
        Case(32, 3, "channels_last", dtype, device, side, op="views") for side in (112, 224) for dtype in DTYPES[:2]
    ]
    return list(dict.fromkeys([*networks, *maps, *classes, *operations, *rows, *views, *curves(device)]))


#: What ``--set`` names.
SETS = {
    "short": lambda device: [case for case in CASES if case.device == device],
    "curves": curves,
    "all": everything,
}

#: The GPU's program is tried out on a CPU with these.
REHEARSED = [Case(2, 32, layout, torch.float32) for layout in ("channels_last", "nchw")]


class Problem(NamedTuple):
    """What an operation is given; what it is differentiated by requires a gradient."""

    features: Tensor  #: (2N, C, H, W), not negative, as after a ReLU; logits (N, L); uint8 images (N, side, side, 3)
    weight: Tensor  #: (L, C)
    bias: Tensor  #: (L,)
    targets: Tensor  #: (N,) int64; of images, their indices
    target_table: Tensor  #: (L, L) float32
    map_weights: Tensor  #: (L,) float32
    consistency_weight: float
    op: str = "head"
    side: int = 7
    dtype: torch.dtype = torch.float32  #: of views
    seed: Tensor | None = None  #: the gradient of the result; None is 1

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the result is differentiated by; nothing of an operation that is forward only."""
        return tuple(t for t in self[:3] if t.requires_grad)

    def cam_weight(self) -> Tensor:
        """As it multiplies the features to maps."""
        return self.weight if self.op == "undetached" else self.weight.detach()

    def double(self) -> Problem:
        """The same numbers in float64, as new leaves."""
        features, weight, bias = (t.detach().double().requires_grad_(t.requires_grad) for t in self[:3])
        table, map_weights = self.target_table.double(), self.map_weights.double()
        return self._replace(features=features, weight=weight, bias=bias, target_table=table, map_weights=map_weights)


#: Which of features, weight and bias an operation is differentiated by.
LEAVES = {"consistency": (True, False, False), "cross_entropy": (True, False, False)}
LEAVES |= dict.fromkeys(("maps", "views"), (False, False, False))
#: Of float16 gradients, as a GradScaler would have it: without, most of them are too small for the dtype.
SCALE = 2.0**12


def problem(case: Case) -> Problem:
    """The doctor's random tensors in a case's size, drawn on its device: drawing a GPU's largest on a CPU takes 2 s."""
    generator = torch.Generator(case.device).manual_seed(0)
    drawn = case if case.op not in ("cross_entropy", "views") else case._replace(C=1, side=1)
    size = Size(drawn.N, drawn.C, drawn.side, drawn.side, drawn.L)
    x = random_inputs(size, case.dtype, case.layout, case.device, generator)
    features, targets = x.features, x.targets
    if case.op == "cross_entropy":
        features = x.logits
    if case.op == "views":
        shape = (case.N, case.side, case.side, 3)
        features = torch.randint(0, 256, shape, dtype=torch.uint8, device=case.device, generator=generator)
        targets = torch.arange(case.N, device=case.device)
    wanted = LEAVES.get(case.op, (True, True, True))
    given = (features, x.weight.to(case.dtype), x.bias.to(case.dtype))
    features, weight, bias = (t.detach().requires_grad_(leaf) for t, leaf in zip(given, wanted, strict=True))
    seed = torch.tensor(SCALE, device=case.device) if case.dtype == torch.float16 else None
    return Problem(
        features, weight, bias, targets, x.target_table, x.map_weights, consistency_weight=2.0, op=case.op,
        side=case.side, dtype=case.dtype, seed=seed,
    )  # fmt: skip


def rotated(problem: Problem, l2_bytes: int) -> list[Problem]:
    """The problem and copies of its features, enough that the L2 cache holds nothing of one when its turn comes.

    Logits are too small for that: those of a few hundred copies stay in the cache.
    """
    of = problem.features
    count = min(512, max(2, math.ceil(TIMES_L2 * l2_bytes / of.nbytes)))
    copies = (of.detach().clone().requires_grad_(of.requires_grad) for _ in range(count - 1))
    return [problem, *(problem._replace(features=features) for features in copies)]
