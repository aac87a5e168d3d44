"""What is measured: the sizes, and the tensors of one size."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    op: str = "head"  #: a name of operations.OPERATIONS

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
    def floor_bytes(self) -> int:
        """4s: both views' features read once, their gradient written once."""
        return 2 * (2 * self.N * self.C * self.side**2) * self.dtype.itemsize


_CPU_SIZES = (
    (32, 512, "nchw"),
    (32, 512, "channels_last"),
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
CASES += [Case(*size, torch.bfloat16, "cuda") for size in (*_GPU_SIZES, *_GROWING)]
CASES += [Case(*size, torch.float32, "cuda") for size in _GPU_SIZES]
#: The GPU's program is tried out on a CPU with these.
REHEARSED = [Case(2, 32, layout, torch.float32) for layout in ("channels_last", "nchw")]


class Problem(NamedTuple):
    """The head's arguments; the first three require a gradient."""

    features: Tensor  #: (2N, C, H, W), not negative, as after a ReLU
    weight: Tensor  #: (L, C)
    bias: Tensor  #: (L,)
    targets: Tensor  #: (N,) int64
    target_table: Tensor  #: (L, L) float32
    map_weights: Tensor  #: (L,) float32
    consistency_weight: float

    def options(self) -> dict[str, Any]:
        """The head's keyword arguments."""
        return dict(zip(self._fields[4:], self[4:], strict=True))

    def double(self) -> Problem:
        """The same numbers in float64, as new leaves."""
        features, weight, bias = (t.detach().double().requires_grad_() for t in self[:3])
        table, map_weights = self.target_table.double(), self.map_weights.double()
        return Problem(features, weight, bias, self.targets, table, map_weights, self.consistency_weight)


def problem(case: Case) -> Problem:
    """The doctor's random tensors in a case's size, drawn on its device: drawing a GPU's largest on a CPU takes 2 s."""
    generator = torch.Generator(case.device).manual_seed(0)
    x = random_inputs(
        Size(case.N, case.C, case.side, case.side, case.L), case.dtype, case.layout, case.device, generator
    )
    weight, bias = (t.detach().to(case.dtype).requires_grad_() for t in (x.weight, x.bias))
    return Problem(x.features, weight, bias, x.targets, x.target_table, x.map_weights, consistency_weight=2.0)


def rotated(problem: Problem, l2_bytes: int) -> list[Problem]:
    """The problem and copies of its features, enough that the L2 cache holds nothing of one when its turn comes."""
    count = max(2, math.ceil(TIMES_L2 * l2_bytes / problem.features.nbytes))
    copies = (problem.features.detach().clone().requires_grad_() for _ in range(count - 1))
    return [problem, *(problem._replace(features=features) for features in copies)]
