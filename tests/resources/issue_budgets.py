"""How many warp instructions each GPU kernel issues for a pair of views, and how many bytes of features for each.

    python tests/resources/issue_budgets.py                 writes the golden file anew
    python tests/resources/issue_budgets.py --print         only prints it

The compiled code is executed, instruction by instruction, on a CPU (tests/resources/sass): what is counted was issued,
and the outputs were compared with float64. Nothing is assumed about loops, unrolling or divergence.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / p) for p in ("", "emulator", "resources"))]

import cubin  # noqa: E402
import cuda_compiled  # noqa: E402
import emulated_head as kernels  # noqa: E402
import torch  # noqa: E402
from sass.machine import COUNTS, Program, Run  # noqa: E402
from torch import Tensor  # noqa: E402

GOLDEN = Path(__file__).with_suffix(".json")
ARCHITECTURE = "sm_90a"

CHANNELS, SIDES, CLASSES = (512, 768, 2048), (7, 8), (7, 8, 16)

#: First match of an instruction's text -> what it is for.
KINDS = {
    r"HMMA|HGMMA": "mma",
    r"F2FP|F2F|I2F|F2I|HADD2\.F32|PRMT|IMAD\.U32 \S+ \S+ 0x10000, RZ|LOP3\.LUT \S+ \S+ 0xffff0000, RZ": "conversion",
    r"LDSM?\b": "shared load",
    r"STSM?\b": "shared store",
    r"LDG|LD\b|UBLKCP|ATOM|RED\b": "global load",
    r"STG|ST\b": "global store",
    r"U?LDC": "constant load",
    r"SHFL|VOTE|ELECT|R2UR|REDUX": "shuffle",
    r"BRA|BSSY|BSYNC|BREAK|EXIT|CALL|RET|WARPSYNC|NOP": "branch",
    r"BAR|SYNCS|LDGDEPBAR|DEPBAR|MEMBAR|ERRBAR|CGAERRBAR|CCTL|FENCE|UCGABAR|WARPGROUP": "barrier",
    r"U?MOV\b|IMAD\.MOV|CS2R|HFMA2|S2U?R|P2R|R2P": "move",
    r"F|D(ADD|MUL|FMA|SETP)|MUFU": "float arithmetic",
    r"": "integer arithmetic",
}


class Problem(NamedTuple):
    """What a head is called on, one pair of it; the weight has the features' dtype."""

    channels: int
    side: int
    classes: int
    layout: str
    dtype: str

    @property
    def name(self) -> str:
        return f"C{self.channels} {self.side}x{self.side} L{self.classes} {self.layout} {self.dtype}"

    @property
    def features_bytes(self) -> int:
        """Of a pair."""
        return 2 * self.channels * self.side**2 * getattr(torch, self.dtype).itemsize


PROBLEMS = [
    Problem(*p)
    for p in itertools.product(CHANNELS, SIDES, CLASSES, kernels.LAYOUTS, ("bfloat16", "float16", "float32"))
]


def kind(instruction: cubin.Instruction) -> str:
    return next(what for pattern, what in KINDS.items() if re.match(pattern, instruction.text))


@functools.cache
def kinds(kernel: str) -> list[str]:
    return [kind(i) for i in listings()[kernel]]


@functools.cache
def listings() -> dict[str, list[cubin.Instruction]]:
    """Mangled name -> instructions, of all kernels for ARCHITECTURE."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        extract = [str(cubin.tool("cuobjdump")), "-xelf", f".{ARCHITECTURE}.cubin", str(cuda_compiled.library())]
        subprocess.run(extract, cwd=directory, check=True, capture_output=True)
        for file in Path(directory).glob("*.cubin"):
            found |= cubin.listing(file)
    return found


@functools.cache
def program(kernel: str) -> Program:
    return Program(listings()[kernel])


class Head:
    """A problem's tensors, and its kernels on the machine: on the first pair of ``n``, or on whole launches."""

    def __init__(self, problem: Problem, n: int = 2, *, detach: bool = True):
        self.problem, self.n, self.detach = problem, n, detach
        p = problem
        self.case = kernels.Case(n, p.channels, p.side, p.side, p.classes, getattr(torch, p.dtype), p.layout)
        cluster = torch.zeros(1, dtype=torch.int64)
        hw, size = p.side**2, self.case.dtype.itemsize
        kernels.library(False)("get_cluster_blocks", p.channels, hw, size, 2, cluster)
        self.cluster, self.stages = int(cluster), 2  # as in a launch of many pairs
        self.saved: dict[str, Tensor] = {}

    def forward(self, *, whole: bool = False) -> tuple[str, Run]:
        """Of the first pair, which is not the one that ends the launch; or the whole launch."""
        with kernels.library(False).only_recording():
            self.saved, _ = kernels.forward(
                self.case, cluster=self.cluster, stages=self.stages, maps=False, detach=self.detach
            )
        return self._run(self.case.features, *self.saved.values(), blocks=None if whole else (0, self.cluster))

    def backward(self, *, whole: bool = False) -> tuple[str, Run]:
        """The features' gradient of the first pair; or the whole launch, the weight's gradient too."""
        with kernels.library(False).only_recording():
            d_loss = torch.ones(())
            self.gradients, _ = kernels.backward(self.case, self.saved, [d_loss, None, None, None], detach=self.detach)
        launch = kernels.library(False).launch()
        weight_blocks = int.from_bytes(launch.parameters[-4:], "little")
        of_pair = (launch.blocks - weight_blocks) // self.n
        return self._run(
            self.gradients["d_features"], *self.gradients.values(), *self.saved.values(), d_loss,
            blocks=None if whole else (weight_blocks, of_pair),
        )  # fmt: skip

    def _run(self, cold: Tensor, *tensors: Tensor, blocks: tuple[int, int] | None) -> tuple[str, Run]:
        launch = kernels.library(False).launch()
        c = self.case
        known = [cold, *tensors, c.weight, c.bias, c.labels, c.table, c.v, *kernels.scratch]
        run = program(launch.kernel).run(launch, known, cold=[cold], blocks=blocks)
        return launch.kernel, run

    def check_forward(self) -> None:
        """Raises AssertionError if the first pair's outputs differ from float64."""
        c = self.case
        f, w = c.features[:: self.n].double().flatten(2), c.weight.double()
        maps = w @ f
        twin = maps[1].reshape(-1, c.h, c.w).flip(-1).flatten(1)
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
        v = c.v.double()[:, None]
        of_maps = 2 * v * v * (maps[0] - twin) / maps[0].numel()
        torch.testing.assert_close(self.saved["map_grad"][0].double().flatten(1), of_maps, rtol=1e-4, atol=1e-6)
        close(self.saved["pooled"][:: self.n].double(), f.mean(2))
        close(self.saved["logits"][:: self.n].double(), maps.mean(2) + c.bias.double())

    def check_backward(self) -> None:
        c, n, p = self.case, self.n, self.problem
        w, hw = c.weight.double(), p.side**2
        u = w.T @ (2.0 / n * self.saved["map_grad"][0].double().flatten(1))
        z, t = self.saved["logits"][::n].double(), c.table[c.labels[0]].double()
        const = ((t.sum() * z.softmax(1) - t) / n @ w / hw)[:, :, None]
        twin = u.reshape(-1, c.h, c.w).flip(-1).flatten(1)
        truth = torch.stack([u + const[0], const[1] - twin])
        got = self.gradients["d_features"][::n].double().flatten(2)
        error = (got - truth).norm() / truth.norm()
        assert error < (1e-5 if c.dtype == torch.float32 else 1e-2), f"d_features of {p.name}: error {error:.1e}"


def figures(kernel: str, run: Run) -> dict[str, Any]:
    """What a run issued, and the bytes of features that it read or wrote."""
    total = dict(zip(COUNTS, run.counts.sum(0).tolist(), strict=True))
    of_kind: collections.Counter[str] = collections.Counter()
    for what, issued in zip(kinds(kernel), run.counts[:, 0].tolist(), strict=True):
        of_kind[what] += issued
    return {
        "instructions": total["issued"], "features": total["cold"], "wavefronts": total["wavefronts"],
        "kinds": {what: issued for what, issued in of_kind.most_common() if issued},
    }  # fmt: skip


def measure(problem: Problem) -> dict[str, dict[str, Any]]:
    """Pass -> figures of one pair; a weight that is not detached changes the forward only, and is tried at 7x7, L = 7.

    Backward, these are the blocks of the features' gradient; those of the weight's do not grow with a pair's features.
    """
    head, found = Head(problem), {}
    found["forward"] = figures(*head.forward())
    head.check_forward()
    found["backward"] = figures(*head.backward())
    head.check_backward()
    if (problem.side, problem.classes) == (7, 7):
        head = Head(problem, detach=False)
        found["forward, not detached,"] = figures(*head.forward())
        head.check_forward()
    return found


def measure_all(problems: Sequence[Problem] = PROBLEMS) -> dict[str, dict[str, Any]]:
    """ "pass problem" -> figures, two processes at a time."""
    kernels.library(False), listings(), program(next(iter(listings())))  # once, before the processes part
    # Not by fork: a copy of a process that has threads may wait for one of them for ever.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return {
            f"{way} {problem.name}": figures
            for problem, of in zip(problems, pool.map(measure, problems, chunksize=4), strict=True)
            for way, figures in of.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true")
    options = parser.parse_args()
    budgets = measure_all()
    text = "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in budgets.items()) + "\n}\n"
    if options.print:
        print(text)
    else:
        GOLDEN.write_text(text)


if __name__ == "__main__":
    main()
