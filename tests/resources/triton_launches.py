"""What the head's Triton kernels issue and wait for, counted like the CUDA kernels: their code executed on a CPU.

    python tests/resources/triton_launches.py            writes the golden file's part of the installed Triton anew
    python tests/resources/triton_launches.py --print    prints it as JSON, without the alternatives

The operators are called on a CPU's tensors; what they would launch is compiled for sm_90 and executed on those
(tests/resources/sass), so that the outputs can be compared with float64.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import cubin  # noqa: E402
import issue_budgets  # noqa: E402
import latency_chains as chains  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton_budgets as budgets  # noqa: E402
from emulate import Launch  # noqa: E402
from sass.machine import Program, Run  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from bench import model  # noqa: E402
from rebalfer_kernels import ops, transforms  # noqa: E402
from rebalfer_kernels.triton import host, tiles  # noqa: E402

GOLDEN = Path(__file__).with_suffix(".json")
ARCHITECTURE = "sm_90"
LAYOUTS = ("nchw", "channels_last")
SIZES = ((32, 512), (64, 512), (512, 2048))  #: N and C
#: Channels, warps and stages of a forward's tile, warps and channels of a backward's, in place of a kernel's that takes
#: more registers or leaves room for fewer blocks than it should.
OTHERS = {
    "forward": tuple(itertools.product((32, 64, 128), (4, 8), (2, 3))),
    "backward": tuple(itertools.product((32, 64, 128), (2, 4, 8))),
}


class Spills(RuntimeError):
    """A kernel that keeps numbers outside of its registers, which the machine does not execute."""


class Kernel:
    """A launch of a kernel, compiled."""

    def __init__(self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]):
        target = GPUTarget("cuda", int(ARCHITECTURE[3:]), 32)
        compiled = triton.compile(budgets.source(kernel, arguments), target=target, options=options)
        binary = compiled.asm["cubin"]
        self.name, self.programs = kernel.__name__.removesuffix("_kernel"), programs
        passed = [arguments[p.name] for p in kernel.params if not p.is_constexpr and arguments[p.name] is not None]
        self.tensors = [x for x in passed if isinstance(x, Tensor)]
        self.cold = [x for name in ("features", "d_features") if (x := arguments.get(name)) is not None]
        ((_, self.instructions),) = cubin.listing(binary).items()
        (self.usage,) = cubin.usage(binary).values()
        shape = (programs, 32 * options["num_warps"], 1, compiled.metadata.shared)
        self.of_weight = arguments.get("w_programs", 0)  #: the first programs of the backward
        self.launch = Launch(self.name, parameters(passed), *shape)
        self._program = Program(self.instructions)

    def run(self, program: int) -> Run:
        if self.usage.stack or self.usage.local:
            raise Spills(self.name)
        return self._program.run(self.launch, self.tensors, cold=self.cold, blocks=(program, 1))

    def figures(self, parts: list[tuple[int, Run]]) -> dict[str, Any]:
        """As of a CUDA kernel. ``parts``: how many programs do what a run has done."""
        longest = max((run for _, run in parts), key=lambda run: run.cycles)
        moved = chains.size(*self.tensors)
        counted = [chains.part(n, run, 1) for n, run in parts]
        figures = chains.describe(self.name, self.usage, self.launch, counted, longest, moved)
        return figures | {"chain": chains.summed(figures["chain"])}


def parameters(values: list[Any]) -> bytes:
    """As a kernel expects them, each aligned to its size; then addresses of scratch memory, of which it has none."""
    found = b""
    for value in values:
        if isinstance(value, Tensor):
            piece = value.data_ptr().to_bytes(8, "little")
        elif isinstance(value, float):
            piece = struct.pack("<f", value)
        else:
            piece = value.to_bytes(4, "little", signed=True)
        found += bytes(-len(found) % len(piece)) + piece
    return found + bytes(-len(found) % 8 + 16)


class Head:
    """The launches of ``n`` pairs, with a mean and a detached weight, of which the first pair has features."""

    def __init__(self, channels: int, layout: str, dtype: str, n: int):
        g = torch.Generator().manual_seed(0)
        self.n, self.channels, self.dtype, self.channels_last = n, channels, getattr(torch, dtype), layout != "nchw"
        f = torch.empty(
            2 * n,
            channels,
            7,
            7,
            dtype=self.dtype,
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format,
        )
        f[::n] = torch.randn(2, channels, 7, 7, generator=g).to(self.dtype)
        self.features = f
        self.weight = (torch.randn(7, channels, generator=g) / channels**0.5).to(self.dtype)
        self.bias, self.targets = torch.randn(7, generator=g).to(self.dtype), torch.randint(0, 7, (n,), generator=g)
        self.table, self.v = torch.rand(7, 7, generator=g) + 0.1, torch.rand(7, generator=g) + 0.5
        self.options = (2.0, 2, transforms.TWIN_MAPS["hflip"], True, True)
        with self._caught() as self.of_forward:
            outputs = host.head_forward(
                f, self.weight, self.bias, self.targets, self.table, self.v, *self.options, False, True, True, False
            )
        self.logits, self.saved = outputs[3], outputs[5]
        pieces = ops.Saved.shapes(n, channels, 7, 7, 7, True, True, False).of(self.saved)
        self.map_grad, self.pooled = pieces.map_grad, pieces.pooled
        for t in (self.logits, self.map_grad, pieces.logit_grad, self.pooled):  # what the other pairs would have left
            t.normal_(generator=g)

    @contextmanager
    def _caught(self) -> Iterator[list[Kernel]]:
        found: list[Kernel] = []

        def catch(kernel, programs, device, warps=4, stages=1, fused=True, **arguments):
            options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fused}
            found.append(Kernel(kernel, programs, arguments, options))

        with mock.patch.multiple(host, _launch=catch, arch=lambda index: ARCHITECTURE):
            yield found

    def forward(self) -> dict[str, list[tuple[int, Run]]]:
        """Kernel -> how many programs do what a run of one has done; the head's is the first pair's."""
        return {kernel.name: [(kernel.programs, kernel.run(0))] for kernel in self.of_forward}

    def backward(self) -> dict[str, list[tuple[int, Run]]]:
        with self._caught() as self.of_backward:
            self.gradients = host.head_backward(
                torch.ones(()), None, None, None, self.weight, self.saved, self.n, 7, 7, True, True, False, 2.0,
                self.options[2], True, self.dtype, self.channels_last, True, True, True,
            )  # fmt: skip
        found = {}
        for kernel in self.of_backward:
            parts = (0, kernel.of_weight), (kernel.of_weight, kernel.programs - kernel.of_weight)
            found[kernel.name] = [(n, kernel.run(first)) for first, n in parts if n]
        return found

    def pair(self, way: str) -> list[Run]:
        """Runs of all programs of the head's kernel for the features of the first pair."""
        kernel = (self.of_forward if way == "forward" else self.of_backward)[0]
        of_pair = (kernel.programs - kernel.of_weight) // self.n
        return [kernel.run(kernel.of_weight + k) for k in range(of_pair)]

    def check_forward(self) -> None:
        """Raises AssertionError if the first pair's outputs differ from float64."""
        f, w = self.features[:: self.n].double().flatten(2), self.weight.double()
        maps = w @ f
        twin = maps[1].view(-1, 7, 7).flip(-1).flatten(1)
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
        v = self.v.double()[:, None]
        of_maps = 2 * v * v * (maps[0] - twin) / (7 * 49)
        torch.testing.assert_close(self.map_grad[0].double().flatten(1), of_maps, rtol=1e-4, atol=1e-6)
        close(self.pooled[:: self.n].double(), f.mean(2))
        close(self.logits[:: self.n].double(), maps.mean(2) + self.bias.double())

    def check_backward(self) -> None:
        w = self.weight.double()
        u = w.T @ (2.0 / self.n * self.map_grad[0].double().flatten(1))
        z, t = self.logits[:: self.n].double(), self.table[self.targets[0]].double()
        const = ((t.sum() * z.softmax(1) - t) / self.n @ w / 49)[:, :, None]
        twin = u.view(-1, 7, 7).flip(-1).flatten(1)
        truth = torch.stack([u + const[0], const[1] - twin])
        error = (self.gradients[0][:: self.n].double().flatten(2) - truth).norm() / truth.norm()
        assert error < (1e-5 if self.dtype == torch.float32 else 1e-2), f"d_features: error {error:.1e}"


def count(channels: int, layout: str, dtype: str) -> dict[str, dict[str, Any]]:
    """ "pass problem" -> what the head's kernel issues for one pair, whose outputs are right."""
    head, found = Head(channels, layout, dtype, 2), {}
    for way in ("forward", "backward"):
        getattr(head, way)()
        runs = head.pair(way)
        getattr(head, f"check_{way}")()
        kernel = (head.of_forward if way == "forward" else head.of_backward)[0]
        issued: collections.Counter[str] = collections.Counter()
        for instruction, n in zip(kernel.instructions, sum(run.counts[:, 0] for run in runs).tolist(), strict=True):
            issued[issue_budgets.kind(instruction)] += n
        counted = dict(zip(issue_budgets.COUNTS, sum(run.counts.sum(0) for run in runs).tolist(), strict=True))
        found[f"{way} {issue_budgets.Problem(channels, 7, 7, layout, dtype).name}"] = {
            "instructions": issued.total(), "features": counted["cold"], "wavefronts": counted["wavefronts"],
            "kinds": {what: n for what, n in issued.most_common() if n},
        }  # fmt: skip
    return found


def launches(
    channels: int, layout: str, n: int, ways: tuple[str, ...] = ("forward", "backward")
) -> dict[str, list[dict[str, Any]]]:
    """ "pass size layout" -> figures of each kernel that it launches, with bfloat16."""
    head, found = Head(channels, layout, "bfloat16", n), {}
    for way in ways:
        of = getattr(head, way)()
        kernels = head.of_forward if way == "forward" else head.of_backward
        found[f"{way} N{n} C{channels} {layout}"] = [kernel.figures(of[kernel.name]) for kernel in kernels]
    return found


def alternatives(of: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """ "pass size layout" of each head's kernel that is not :func:`bench.model.roomy` -> the tiles and figures of the
    one that is and, by the model, takes the least time on an H100."""
    found: dict[str, dict[str, Any]] = {}
    for name, (head, *_) in of.items():
        if model.roomy(head):
            continue
        way, n, channels, layout = name.split()
        for cut in OTHERS[way]:
            rows = (row._replace(**{way: cut}) if row.arch == ARCHITECTURE else row for row in tiles.TABLE)
            with mock.patch.object(tiles, "TABLE", tuple(rows)):
                try:
                    (figures, *_) = launches(int(channels[1:]), layout, int(n[1:]), (way,))[name]
                except Spills:
                    continue
            if model.roomy(figures):
                figures["tiles"] = cut
                found[name] = min(found.get(name, figures), figures, key=lambda f: model.predict(f, model.H100).us)
    return found


def measure_all() -> dict[str, dict[str, Any]]:
    problems = itertools.product(sorted({c for _, c in SIZES}), LAYOUTS, ("bfloat16", "float32"))
    sizes = itertools.product(SIZES, LAYOUTS)
    return {
        "counts": {k: v for problem in problems for k, v in count(*problem).items()},
        "launches": {k: v for (n, c), layout in sizes for k, v in launches(c, layout, n).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true")
    options = parser.parse_args()
    measured = measure_all()
    if options.print:
        print(json.dumps({triton.__version__: measured}))
        return
    measured["alternatives"] = alternatives(measured["launches"])
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden[triton.__version__] = measured
    parts = []
    for version, of in sorted(golden.items()):
        rows = (
            f'  "{what}": {{\n'
            + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in figures.items())
            + "\n  }"
            for what, figures in of.items()
        )
        parts.append(f' "{version}": {{\n' + ",\n".join(rows) + "\n }")
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
