"""What each launch of the head consists of, and the longest chain of waits in it, in order.

    python tests/resources/latency_chains.py                writes the golden file anew
    python tests/resources/latency_chains.py --out FILE     writes it elsewhere

The compiled code is executed on a CPU (tests/resources/sass), whose time is that of one block, or cluster of blocks, by
itself on its multiprocessors: an instruction issues when the scoreboards that the compiler has it wait for are free. So
the chain is what the GPU would wait for, through registers, memory and barriers. What other blocks on the same
multiprocessor add is the model's (bench/model.py).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent)]

import cubin  # noqa: E402
import cuda_compiled  # noqa: E402
import emulate  # noqa: E402
import issue_budgets as budgets  # noqa: E402
import torch  # noqa: E402
from issue_budgets import kernels  # noqa: E402
from sass.machine import Link, Run  # noqa: E402
from torch import Tensor  # noqa: E402

GOLDEN = Path(__file__).with_suffix(".json")

#: N and C of what is timed: bench/model.py compares them with what GPUs have measured.
SIZES = ((32, 512), (64, 512), (512, 512), (4096, 512), (512, 2048))
MULTIPROCESSORS = 132  # of an H100 and an H200
#: Waits that a chain names; the cycles of the others are those of the next that it names.
TRIPS = (
    "global memory", "L2 cache", "atomic", "shared memory", "distributed shared memory", "bulk copy",
    "asynchronous copy", "barrier", "cluster barrier", "fence",
)  # fmt: skip


class Launch(NamedTuple):
    """The pass of a batch: the recorded launch and what it may touch."""

    of: emulate.Launch
    cold: Tensor
    tensors: Sequence[Tensor]

    def run(self, first: int) -> Run:
        """The cluster that begins with that block."""
        return budgets.program(self.of.kernel).run(
            self.of, [self.cold, *self.tensors], cold=[self.cold], blocks=(first, self.of.cluster)
        )


class Batch(budgets.Head):
    """A problem's launches for ``n`` pairs, of which only the first has features."""

    def __init__(self, problem: budgets.Problem, n: int):
        super().__init__(problem, 1)
        self.n, c, g = n, self.case, torch.Generator().manual_seed(1)
        stages = torch.zeros(1, dtype=torch.int64)
        kernels.library(False)("get_ring_stages", n * self.cluster, MULTIPROCESSORS, stages)
        features = c.features
        c.n, c.labels = n, torch.randint(0, c.classes, (n,), generator=g)
        c.features = torch.empty(2 * n, *(s for s in features.permute(0, 2, 3, 1).shape[1:]), dtype=c.dtype)
        c.features = c.features.permute(0, 3, 1, 2) if c.channels_last else c.features.view(2 * n, *features.shape[1:])
        c.features[0], c.features[n] = features
        with kernels.library(False).only_recording():
            self.saved, _ = kernels.forward(c, cluster=self.cluster, stages=int(stages), maps=False)
        self.forward_launch = self._launch(c.features, *self.saved.values())
        for t in (*self.saved.values(), *kernels.scratch):  # what the other pairs would have left there
            if t.is_floating_point():
                t.normal_(generator=g)
        self.of_forward = list(kernels.scratch)

    def _launch(self, cold: Tensor, *tensors: Tensor) -> Launch:
        c = self.case
        known = [*tensors, c.weight, c.bias, c.labels, c.table, c.v, *kernels.scratch]
        return Launch(kernels.library(False).launch(), cold, known)

    def backward_launch(self) -> Launch:
        d_loss = torch.ones(())
        with kernels.library(False).only_recording():
            self.gradients, _ = kernels.backward(self.case, self.saved, [d_loss, None, None, None])
        return self._launch(self.gradients["d_features"], *self.gradients.values(), *self.saved.values(), d_loss)


@functools.cache
def usage() -> dict[str, cubin.Usage]:
    """Mangled name -> what it uses, of all kernels for budgets.ARCHITECTURE."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        extract = [
            str(cubin.tool("cuobjdump")), "-xelf", f".{budgets.ARCHITECTURE}.cubin", str(cuda_compiled.library())
        ]  # fmt: skip
        subprocess.run(extract, cwd=directory, check=True, capture_output=True)
        for file in Path(directory).glob("*.cubin"):
            with contextlib.suppress(ValueError):  # no kernel in it
                found |= cubin.usage(file)
    return found


def chain(path: Sequence[Link], cycles: int) -> list[list[Any]]:
    """The waits of TRIPS in order, equal ones that follow each other as one: what, how often, cycles.

    The cycles are those since the one before ended, so that they add up to all; the last are named "end".
    """
    found, last = [], 0
    for wait, links in itertools.groupby((link for link in path if link.wait in TRIPS), lambda link: link.wait):
        of = list(links)
        found.append([wait, len(of), of[-1].ready - last])
        last = of[-1].ready
    return [*found, ["end", 1, cycles - last]]


def summed(links: list[list[Any]]) -> list[list[Any]]:
    """A chain without its order, of a loop's many rounds: a line for each kind of wait."""
    times: collections.Counter[str] = collections.Counter()
    spent: collections.Counter[str] = collections.Counter()
    for wait, n, of in links:
        times[wait] += n
        spent[wait] += of
    return [[wait, times[wait], of] for wait, of in spent.most_common()]


def part(blocks: int, run: Run, cluster: int) -> dict[str, int]:
    """Blocks that do the same; instructions and wavefronts of shared memory of one, cycles of a cluster of them."""
    issued, wavefronts = (
        int(run.counts[:, budgets.COUNTS.index(x)].sum()) // cluster for x in ("issued", "wavefronts")
    )
    return {"blocks": blocks, "instructions": issued, "wavefronts": wavefronts, "cycles": run.cycles}


def describe(
    name: str, of: cubin.Usage, launch: emulate.Launch, parts: Sequence[dict[str, int]], longest: Run, moved: int
) -> dict[str, Any]:
    """Figures of a launch. ``longest``: the cluster that ends last, which is counted once, ``moved``: bytes."""
    shared = max(of.shared, 1024) + launch.shared_bytes
    return {
        "kernel": name, "threads": launch.threads, "cluster": launch.cluster, "registers": of.registers,
        "shared": shared,
        "resident": cuda_compiled.resident(budgets.ARCHITECTURE, launch.threads, of.registers, shared),
        "parts": list(parts), "last": longest.cycles - max(p["cycles"] for p in parts),
        "fetched": int((longest.counts[:, 0] > 0).sum()), "bytes": moved,
        "chain": chain(longest.path, longest.cycles),
    }  # fmt: skip


def described(launch: Launch, *counted: Any) -> dict[str, Any]:
    (name,) = cuda_compiled.demangled([launch.of.kernel])
    return describe(name, usage()[launch.of.kernel], launch.of, *counted)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def forward(batch: Batch) -> dict[str, Any]:
    """Clusters that serve a pair more than the others, if some do, then the others (Turns in csrc/cuda/kernels.cuh).

    The cluster that finds that all others have ended has more to do, so it is run too.
    """
    launch, size_of = batch.forward_launch, batch.forward_launch.of.cluster
    clusters = launch.of.blocks // size_of
    each, rest = divmod(batch.n, clusters)
    kinds = [(rest, 0), (clusters - rest, launch.of.blocks - size_of)] if rest else [(clusters, 0)]
    parts = [part(count * size_of, launch.run(first), size_of) for count, first in kinds]
    pairs = [each + 1] * rest + [each] * (clusters - rest)
    ticket, _ = batch.of_forward
    ticket.fill_(sum(min(n, size_of) for n in pairs[1:]))
    last = launch.run(0)
    assert int(ticket) == 0, "the cluster was not the last"
    saved = [batch.saved[x] for x in ("logits", "map_grad", "logit_grad", "pooled")]
    return described(launch, parts, last, size(launch.cold, *saved))


def backward(batch: Batch, few: tuple[int, int]) -> dict[str, Any]:
    """Blocks of the weight's gradient, then those of the features'. ``few``: blocks of the launches for 1 and 2."""
    launch = batch.backward_launch()
    of_pair = few[1] - few[0]
    runs = [(few[0] - of_pair, launch.run(0)), (batch.n * of_pair, launch.run(launch.of.blocks - launch.of.cluster))]
    assert [bool(run.counts[:, budgets.COUNTS.index("cold")].sum()) for _, run in runs] == [False, True], (
        "another order"
    )
    parts = [part(blocks, run, launch.of.cluster) for blocks, run in runs]
    longest = max((run for _, run in runs), key=lambda run: run.cycles)
    saved = [batch.saved[x] for x in ("map_grad", "logit_grad", "pooled")]
    return described(launch, parts, longest, size(*batch.gradients.values(), *saved))


def measure(channels: int, layout: str, sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """ "pass size layout" -> figures, of bfloat16, 7 x 7 maps and 7 classes."""
    problem = budgets.Problem(channels, 7, 7, layout, "bfloat16")
    few = tuple(Batch(problem, n).backward_launch().of.blocks for n in (1, 2))
    found = {}
    for n in sizes:
        batch = Batch(problem, n)
        found[f"forward N{n} C{channels} {layout}"] = forward(batch)
        found[f"backward N{n} C{channels} {layout}"] = backward(batch, few)
    return found


def measure_all() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for channels, layout in itertools.product(sorted({c for _, c in SIZES}), kernels.LAYOUTS):
        found |= measure(channels, layout, [n for n, c in SIZES if c == channels])
    return found


def trips(figures: dict[str, Any]) -> dict[str, int]:
    """How often the chain waits for each."""
    return {what: n for what in TRIPS if (n := sum(times for wait, times, _ in figures["chain"] if wait == what))}


def cycles(figures: dict[str, Any]) -> int:
    return sum(of for _, _, of in figures["chain"])


#: What another version of the compiler may make of the same source; and what it must not change.
SLACK, SAME = 1.03, ("kernel", "threads", "cluster", "bytes")


def regressions(name: str, figures: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """Where a launch is worse than the golden file's, in words."""
    for what in SAME:
        if figures[what] != known[what]:
            yield f"{name}: {what} {figures[what]}, known {known[what]}"
    if figures["resident"] < known["resident"]:
        yield f"{name}: {figures['resident']} blocks on a multiprocessor, known {known['resident']}"
    if cycles(figures) > SLACK * cycles(known):
        yield f"{name}: a chain of {cycles(figures)} cycles, known {cycles(known)}"
    for what, n in trips(figures).items():
        if n > SLACK * trips(known).get(what, 0):
            yield f"{name}: waits {n} times for {what}, known {trips(known).get(what, 0)}"
    for mine, theirs in zip(figures["parts"], known["parts"], strict=True):
        for what in mine:
            if mine[what] > SLACK * theirs[what]:
                yield f"{name}: {mine[what]} {what}, known {theirs[what]}"


def text(measured: dict[str, dict[str, Any]]) -> str:
    return "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in measured.items()) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    parser.parse_args().out.write_text(text(measure_all()))


if __name__ == "__main__":
    main()
