"""Every instance of every CUDA kernel, compiled for GPUs that this machine need not have, and what each uses.

python tests/resources/cuda_compiled.py      writes the golden file and docs/cuda.md anew from what is compiled
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / p) for p in ("", "emulator", "resources"))]

import cubin  # noqa: E402
import emulated_head as kernels  # noqa: E402
import torch  # noqa: E402

from rebalfer_kernels import native  # noqa: E402

GOLDEN = Path(__file__).with_name("cuda_budgets.json")
PAGE = ROOT / "docs/cuda.md"

#: Architecture -> bytes of shared memory of a multiprocessor. Each block takes 1 KiB besides its own, which the tools
#: count as static from sm_90 on.
SHARED = {"sm_80": 164 << 10, "sm_90a": 228 << 10, "sm_100a": 228 << 10}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor
INSTRUCTIONS = {
    "mma": r"HMMA\.",
    "wide loads": r"(LDG|LDGSTS)\.E\.(\w+\.)*128\b",
    "bulk copies": r"UBLKCP\.",
    "wide stores": r"STG\.E\.(\w+\.)*128\b",
    "local accesses": r"(LDL|STL)\b",
}
TYPES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half"}

INTRODUCTION = """\
# How the CUDA kernels work, and what they use

An H200 has run these kernels, an H100 earlier versions ([what a GPU has run](../bench/results/gpu/README.md)).
Instructions are counted too: `python -m bench budget` shows how many bytes of features each warp instruction of a
kernel moves. At 7 x 7 positions and 7 classes, for bfloat16, it should be 8.

**Forward**, one launch (`csrc/cuda/kernels_forward.cuh`, `features.cuh`). A cluster of 1, 2 or 4 blocks serves a pair
of views, each block some of the channels; a warp has one view and 64 bytes of channels at a time, 32 channels of 16
bits. Lane 4 g + q holds, of the positions g, g + 8, ..., the channels 8 q to 8 q + 7: 16 bytes.

- *Maps.* These 16 bytes are two B operands of `mma.m16n8k16` (16 channels x 8 positions each), if the weight's
  channels are renumbered alike. A is the weight, 8 classes: a float32 weight as high parts in rows 0-7 and low
  parts in rows 8-15; of a 16-bit one, channels 0-3 of each lane for the first B operand and 4-7 for the second, and
  nobody wants rows 8-15.
- *Means over positions.* A second mma with a permuted identity as A adds up the tiles of 8 positions in float32; what
  is left is a sum of 8 numbers a channel. No 16-bit feature is converted. A feature that is not finite makes the
  means of the 16 channels of its mma NaN, and so their gradients of the weight.
- *channels_last.* A lane copies by `cp.async` what it will read itself: no barrier. The L2 cache fetches the 128 bytes
  around, which the two warps of a view want between them.
- *NCHW.* 49 positions of 2 bytes are 98 bytes, so a channel is not aligned, but slabs of channels are contiguous:
  the bulk copy engine brings them. A lane gathers 2 bytes at a time and packs two channels into a word. H W = 49 is
  known when this is compiled, so each address is an offset.
- *The weight* of a step is loaded from the L2 cache while the step before it is computed.
- *Rings.* Features come 4 steps ahead where the launch has at most 2 blocks for each multiprocessor, so that all
  that a block reads is under way at once; else 2 steps ahead, which leaves shared memory for more blocks. The stages
  of NCHW are filled by a warp each, at once, before the block's first barrier.
- *Turns.* Where there are more pairs than find room at once, from sm_90 on, a block or a cluster of 2 serves several,
  of 16-bit features, by an instance of the kernel of its own: as soon as a pair's features have been used, those of
  the next are fetched, and the two blocks take turns in what comes after the maps. Clusters of 4 serve one pair each:
  an H200 ran them so faster. float32 has no registers left for it.
- *The end.* The maps are summed over warps. Each block pushes its sum into the shared memory of the block whose turn
  it is (`st.async`, which an mbarrier counts), so nobody waits for stores to global memory that are still under way,
  as a barrier of the cluster that orders memory does. That block adds them in fixed order. From there on the
  warps work side by side: the last one sums rows of the maps to logits and has the cross-entropy, a lane a class, the
  others have the consistency, each with its gradient. What that needs (bias, target row, map weights, the twin's index)
  was loaded while the features were; the next turn's target row is loaded once this turn's losses are known.
- *float32.* The same roads with FMAs.

**Backward**, one launch (`kernels_backward.cuh`): blocks of the weight's gradient first, 8 channels each, then blocks
that write the features' gradients, 128 channels of a pair (of 16-bit features).

- *Only what is linear.* The forward has saved the gradients of each sample's losses with respect to its maps and
  logits: there is no softmax here and no target, and no load waits for another.
- *Maps first.* E = dS + dz / (H W) and, where the twin's index says, E~ = -dS + dz~ / (H W). Then dF = W^T E and
  dF~ = W^T E~: a warp writes one view, 64 channels of 16 bits.
- *16 bits.* `mma.m16n8k8`: 16 channels x 8 classes x 8 positions, for the high and the low parts of E, and for the
  low parts of a weight that is not of bfloat16. Nothing waits for the weight until E is there.
- *channels_last.* The rows of four mma are 8 consecutive channels of each lane, 16 bytes to be stored at a position.
- *NCHW.* Where H W is odd, every second channel begins at an odd element. Its columns are computed one position
  earlier, so that a lane stores two positions in one aligned word of shared memory. A warp's channels are contiguous
  there as in memory: they leave in 16-byte stores, and no warp waits for another.
- *The weight's gradient.* 256 rows of dz at a time, or 128 where L > 8, which are loaded together with their means
  over positions. The bias is the weight of one more channel, whose mean is 1. Every such block walks over all
  samples, and what it waits for, it waits for once a round. Before the forward saved these gradients, with 128 rows
  an H100 took 190 to 196 µs for a backward of N = 4096, C = 512, whose writes alone take 134; with 256 an H200 took
  145. The present kernels take 117 to 127.
- *float32.* The same with FMAs.
- *Its start* overlaps with the end of the forward, where that is the kernel before it on the stream (programmatic
  dependent launch); it waits for the forward before it touches memory.

What is left issues mostly integers: addresses, bounds, and what a block does once (E, of 128 channels for each). Where
H W is not known when the kernel is compiled, NCHW moves a third fewer bytes for each instruction, and its stores to
shared memory meet in the same banks.

Before sm_90 there are no clusters and no bulk copies: a block has a whole pair, and NCHW comes by `cp.async`. A GPU
that refuses large clusters, as a slice of one may, gets the largest that it grants. It is asked before the first call
on it, and every kernel is loaded then, so that this call may be captured into a graph (`devices.cu`).

## What each kernel uses"""

Figures = dict[str, dict[str, dict[str, int]]]  #: kernel -> architecture -> what -> how much


def missing() -> str | None:
    """Why nothing can be compiled and read here, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        compiler = native.find_nvcc()
    except native.BuildError as error:
        return str(error)
    if reason := cubin.missing():
        return reason
    tool = str(cubin.tool("cuobjdump"))
    (reads, *_), (writes, *_) = cubin.release(tool), cubin.release(compiler)
    return (
        f"the installed cuobjdump, of CUDA {reads}, cannot read what nvcc {writes} writes" if reads < writes else None
    )


@functools.cache
def library() -> Path:
    """The library as it is made ahead of time."""
    return native.build("cuda", native.AHEAD)


def demangled(symbols: list[str]) -> list[str]:
    """Names without return type, namespaces and parameters, such as forward_kernel<BFloat16, true, 1>."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = re.sub(r"\(anonymous namespace\)::|\w+::|^void |\((?:bool|int)\)", "", text, flags=re.MULTILINE)
    return [name.partition("(")[0] for name in names.splitlines()]


@functools.cache
def launches() -> dict[str, dict[str, tuple[int, int]]]:
    """Kernel of the head -> architecture -> threads and dynamic shared memory of a launch at C = 512, 7 x 7.

    As the emulator is asked for it for many pairs; L = 7 for instances of one block of 8 classes, L = 16 for two. Those
    that serve several pairs in turn are launched for more than find room.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for dtype, layout, (blocks, classes) in itertools.product(TYPES, kernels.LAYOUTS, ((1, 7), (2, 16))):
        case = kernels.Case(1, 512, 7, 7, classes, dtype, layout)
        instance = f"<{TYPES[dtype]}, {str(case.channels_last).lower()}, {blocks}"
        for architecture in SHARED:
            cluster = torch.zeros(1, dtype=torch.int64)
            granted = 0 if architecture == "sm_80" else 2
            kernels.library()("get_cluster_blocks", 512, 49, dtype.itemsize, granted, cluster)
            _, cam_grad = kernels.forward(case, cluster=int(cluster), stages=2, detach=False)
            saved, forward = kernels.forward(case, cluster=int(cluster), stages=2)
            _, backward = kernels.backward(case, saved, kernels.upstreams(case, True))
            positions = 49 if blocks == 1 else 0
            taken = [
                (f"forward_kernel{instance}, {positions}, false, false>", forward),
                (f"forward_kernel{instance}, {positions}, false, true>", cam_grad),
                (f"backward_kernel{instance}, {positions}>", backward),
            ]
            if dtype.itemsize == 2:
                many = kernels.Case(5, 512, 7, 7, classes, dtype, layout)
                _, turns = kernels.forward(many, cluster=int(cluster), stages=2, multiprocessors=1)
                taken.append((f"forward_kernel{instance}, {positions}, true, false>", turns))
            for name, counters in taken:
                found.setdefault(name, {})[architecture] = counters["threads"], counters["shared_bytes"]
    return found


@functools.cache
def figures() -> Figures:
    """What each kernel uses, sorted."""
    found: Figures = {}
    with tempfile.TemporaryDirectory() as directory:
        extract = [str(cubin.tool("cuobjdump")), "-xelf", "all", str(library())]
        subprocess.run(extract, cwd=directory, check=True, capture_output=True)
        for file in Path(directory).glob("*.cubin"):
            match = re.search(r"\.(sm_\w+)\.cubin$", file.name)
            assert match, file.name
            try:
                usage, code = cubin.usage(file), cubin.sass(file)
            except ValueError:  # no kernel in it
                continue
            for (symbol, u), name in zip(usage.items(), demangled(list(usage)), strict=True):
                taken = {"registers": u.registers, "stack": u.stack, "local": u.local, "static shared": u.shared}
                for what, pattern in INSTRUCTIONS.items():
                    taken[what] = sum(bool(re.match(pattern, instruction)) for instruction in code[symbol])
                found.setdefault(name, {})[match[1]] = taken
    for name, launch in launches().items():
        for architecture, (threads, dynamic) in launch.items():
            taken = found[name][architecture]
            taken["dynamic shared"] = dynamic
            taken["blocks"] = resident(
                architecture, threads, taken["registers"], max(taken["static shared"], 1024) + dynamic
            )
    return {name: {a: found[name][a] for a in SHARED if a in found[name]} for name in sorted(found)}


def resident(architecture: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of so many threads that a multiprocessor holds, each with ``shared`` bytes.

    >>> resident("sm_90a", 128, 162, 61 << 10)
    3
    """
    return min(
        REGISTERS // (threads * -(-registers // 8) * 8), SHARED[architecture] // shared, THREADS // threads, BLOCKS
    )


def page(budgets: Figures) -> str:
    """The documentation's page about these figures."""
    lines = [
        *INTRODUCTION.splitlines(),
        "",
        "Read from the code compiled for " + ", ".join(SHARED) + " (a cell's three figures; one where they agree).",
        "A row is one instance: dtype, whether channels_last, blocks of 8 classes, of the head's kernels H W where it",
        "is known when this is compiled, else 0, and of the forward's whether pairs are served in turn. Shared memory,",
        "and the blocks of 128 threads that a multiprocessor then holds, are those of C = 512, 7 x 7 maps and L = 7 or",
        "16. Nothing is spilled. Instructions are counted as they stand in the code, not as they are run.",
        "",
        "Written by `python tests/resources/cuda_compiled.py`.",
        "",
        "| kernel | registers | shared memory | blocks | mma | 16-byte loads | bulk copies | 16-byte stores |",
        "|" + "---|" * 8,
    ]
    columns = ("registers", "dynamic shared", "blocks", "mma", "wide loads", "bulk copies", "wide stores")
    for name, by_architecture in budgets.items():
        cells = [name]
        for column in columns:
            values = [str(taken.get(column, "")) for taken in by_architecture.values()]
            cells.append(values[0] if len(set(values)) == 1 else " / ".join(values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def golden() -> Figures:
    return json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(figures(), indent=1) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(figures()))
    print(f"wrote {GOLDEN.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
