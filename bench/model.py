"""docs/gpu-model.md: how long the kernels should take on a GPU, by a model that counts of their machine code feed.

The counts are those of tests/resources/latency_chains.json, which a test compares with the compiled kernels; the model
is compared with what GPUs have measured, each with the kernels that it measured.
"""

from __future__ import annotations

import heapq
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from . import results
from .document import markdown_table as table
from .results import ROOT

PAGE = ROOT / "docs" / "gpu-model.md"
CHAINS = ROOT / "tests/resources/latency_chains.json"
TRITON = ROOT / "tests/resources/triton_launches.json"
#: The same counts, of kernels that a GPU has measured.
MEASURED = ROOT / "bench/results/gpu/measured_kernels.json"

Launches = dict[str, dict[str, Any]]  #: "forward N32 C512 nchw" -> figures


class Gpu(NamedTuple):
    name: str
    multiprocessors: int
    ghz: float
    peak_gb_per_s: float  #: the maker's figure


H100 = Gpu("H100 SXM", 132, 1.98, 3350.0)
H200 = Gpu("H200 SXM", 132, 1.98, 4800.0)
SCHEDULERS = 4  #: of a multiprocessor, each of which issues an instruction a cycle
COPY = 0.87  #: share of the peak that a copy reaches
LAUNCH_US = 0.5  #: from the start of a kernel to its first instruction, and from its last to its end
FETCH_CYCLES = 1.0  #: for each instruction that a block executes, the first time
SHORT_US = 3  #: a kernel that takes no longer is mostly launch
GAP_US = 0.4  #: between two kernels of a CUDA graph

#: What an H100 must reach by the model: time of the paper's batch, share of the copy bandwidth where large.
PAPER, PAPER_US = (32, 512), 12.0
LARGE, SHARE = (512, 2048), 0.85
LAYOUTS = ("nchw", "channels_last")
#: What each of Triton's kernels may take, and how many blocks of it must fit on a multiprocessor.
REGISTERS, RESIDENT = 168, 3
#: Batches up to this size must not wait for the weight's gradient.
LONGEST = (4096, 512)

CONSTANTS = (
    (
        "multiprocessors",
        f"{H100.multiprocessors}",
        "NVIDIA H100 Tensor Core GPU Architecture (white paper), SXM5; the H200's are as many",
    ),
    ("schedulers of a multiprocessor", f"{SCHEDULERS}", "the same white paper"),
    (
        "clock",
        f"{H100.ghz} GHz",
        "measured on an H200 during every case (`sm_mhz` of the result files); the H100's limit too",
    ),
    (
        "memory bandwidth",
        f"{H100.peak_gb_per_s / 1e3:g} and {H200.peak_gb_per_s / 1e3:g} TB/s",
        "NVIDIA's data sheets of the H100 SXM and the H200",
    ),
    ("share of it that a copy reaches", f"{COPY:.0%}", "measured on an H200: 4.17 TB/s (`copy_gb_per_s`)"),
    ("registers, shared memory, threads, blocks", "65536, 228 KiB, 2048, 32", "NVIDIA Hopper Tuning Guide"),
    ("shared memory, latency", "29 cycles", "Luo et al., arXiv:2402.13499, H800"),
    ("distributed shared memory, latency", "200 cycles", "Luo et al., arXiv:2501.12084, H800: 181 to 213"),
    ("L1 cache, L2 cache, memory, latency", "40, 281, 690 cycles", "GH200, github.com/markdewing/AI_kernels/latency"),
    (
        "barrier, cluster barrier, fence, special units, constants",
        "20, 200, 500, 24, 40 cycles",
        "assumed, no source",
    ),
    ("wavefronts of shared memory", "1 a cycle", "CUDA C++ Programming Guide: 32 banks of 32 bits a cycle"),
    ("launch", f"{LAUNCH_US} µs", "**fitted** to the measurements below, with the next"),
    ("first fetch of an instruction", f"{FETCH_CYCLES:g} cycle", "**fitted**"),
    (
        "gap between kernels of a CUDA graph",
        f"{GAP_US} µs",
        "**fitted**: the graph's time less that of its two kernels",
    ),
)


class Prediction(NamedTuple):
    """Of one kernel."""

    us: float
    latency_us: float  #: blocks one after the other on a multiprocessor, and what each waits for
    filling_us: float  #: what the first blocks ask for at once, or the last ones write at once
    issue_us: float  #: if the schedulers always had an instruction to issue
    memory_us: float  #: if memory were always busy
    ends_us: tuple[float, ...]  #: of each part's last block

    @property
    def bound(self) -> str:
        return (
            "memory"
            if self.memory_us > self.latency_us + self.filling_us
            else "issue"
            if self.issue_us > self.latency_us / 1.5
            else "latency"
        )


def schedule(launch: dict[str, Any], multiprocessors: int) -> list[float]:
    """Cycle at which the last block of each part ends.

    Blocks start in order, as room for them becomes free. One that shares its multiprocessor with others takes longer,
    because they issue instructions and access shared memory in between: with R resident blocks, each with I
    instructions for a scheduler and W wavefronts of shared memory, which by itself takes S cycles, it takes
    S + (R - 1) (I + W); one of another kind is slowed as much for each cycle, as long as there are others.

    >>> part = {"blocks": 5, "instructions": 400, "wavefronts": 0, "cycles": 1000}
    >>> schedule({"cluster": 1, "resident": 2, "parts": [part]}, 2)  # twice two of 1,100, then one of 1,000
    [2100.0]
    """
    cluster, parts = launch["cluster"], launch["parts"]
    most = max(parts, key=lambda part: part["blocks"])
    issue = most["instructions"] / SCHEDULERS + most["wavefronts"]
    room = multiprocessors * launch["resident"] // cluster
    total = sum(part["blocks"] for part in parts)
    left = total // cluster
    running: list[float] = []  # when each ends
    ends, now = [], 0.0
    for part in parts:
        end = 0.0
        for _ in range(part["blocks"] // cluster):
            if len(running) == room:
                now = running[0]
                while running and running[0] <= now:
                    heapq.heappop(running)
            blocks = cluster * min(room, len(running) + left)
            others = min(launch["resident"], math.ceil(blocks / multiprocessors)) - 1
            # By all of the launch's blocks on one multiprocessor, at most.
            longer = issue * min(others * part["cycles"] / most["cycles"], total / multiprocessors)
            heapq.heappush(running, now + part["cycles"] + longer)
            end, left = max(end, now + part["cycles"] + longer), left - 1
        ends.append(end)
    return ends


def predict(launch: dict[str, Any], gpu: Gpu, fills: bool = True) -> Prediction:
    """Of one launch on an otherwise idle GPU, its features not in the L2 cache.

    ``fills``: its blocks ask for all that their shared memory holds at once, as CUDA's do.
    """
    us = 1e-3 / gpu.ghz  # of a cycle
    ends = schedule(launch, gpu.multiprocessors)
    once = FETCH_CYCLES * launch["fetched"] + launch["last"]
    latency = (max(ends) + once) * us
    issued = sum(part["blocks"] * part["instructions"] for part in launch["parts"])
    issue = issued / (SCHEDULERS * gpu.multiprocessors) * us
    bytes_per_us = COPY * gpu.peak_gb_per_s * 1e3
    memory = launch["bytes"] / bytes_per_us
    blocks = sum(part["blocks"] for part in launch["parts"])
    together = min(blocks, gpu.multiprocessors * launch["resident"])
    filling = fills * together * min(launch["bytes"] / blocks, launch["shared"]) / bytes_per_us
    whole = LAUNCH_US + max(latency + filling, memory)
    return Prediction(whole, latency, filling, issue, memory, tuple(end * us for end in ends))


class Head(NamedTuple):
    """Forward and backward in a CUDA graph."""

    forward: Prediction
    backward: Prediction
    us: float
    share: float  #: of the copy bandwidth, by the bytes that must move: the features read, their gradient written


def head(launches: Launches, size: tuple[int, int], layout: str, gpu: Gpu) -> Head:
    n, channels = size
    forward, backward = (predict(launches[f"{way} N{n} C{channels} {layout}"], gpu) for way in ("forward", "backward"))
    us = forward.us + backward.us + 2 * GAP_US
    moved = 2 * 2 * n * channels * 49 * 2
    return Head(forward, backward, us, moved / (COPY * gpu.peak_gb_per_s * 1e3) / us)


def goals(launches: Launches) -> list[tuple[str, bool]]:
    """What the model says of each goal, and whether it is met."""
    found = []
    for layout in LAYOUTS:
        us = head(launches, PAPER, layout, H100).us
        found.append((f"the paper's batch on an H100, {layout}: {us:.1f} µs, at most {PAPER_US:g}", us <= PAPER_US))
    for layout in LAYOUTS:
        share = head(launches, LARGE, layout, H100).share
        text = f"N = 512, C = 2048 on an H100, {layout}: {share:.0%} of the copy bandwidth, at least {SHARE:.0%}"
        found.append((text, share >= SHARE))
    for layout in LAYOUTS:
        for n, channels in (PAPER, (512, 512), LARGE, LONGEST):
            backward = predict(launches[f"backward N{n} C{channels} {layout}"], H100)
            weight, features = backward.ends_us
            features = max(features, backward.memory_us)
            text = (
                f"N = {n}, C = {channels}, {layout}: the weight's gradient ends after {weight:.1f} µs, the features' "
            )
            found.append((text + f"after {features:.1f}", weight <= features))
    for version, of in triton().items():
        for name, kernels in of["launches"].items():
            for figures in kernels:
                if not roomy(figures):
                    says, met = _against_roomy(figures, of["alternatives"].get(name))
                    found.append((f"Triton {version}, {figures['kernel']} of {name}: {says}", met))
    return found


def roomy(figures: dict[str, Any]) -> bool:
    """Whether a kernel of Triton's takes few registers and leaves room for others on its multiprocessor."""
    return figures["registers"] <= REGISTERS and figures["resident"] >= RESIDENT


def _against_roomy(figures: dict[str, Any], other: dict[str, Any] | None) -> tuple[str, bool]:
    """What a kernel that is not :func:`roomy` takes, and whether the model has it faster than the best one that is."""
    mine = predict(figures, H100, fills=False).us
    says = f"{figures['registers']} registers, {figures['resident']} blocks on a multiprocessor, {mine:.1f} µs; "
    says += f"with {REGISTERS} at most and {RESIDENT} at least, "
    if other is None:
        return f"{says}no tiles are known", False
    best = predict(other, H100, fills=False).us
    return f"{says}the best tiles ({', '.join(map(str, other['tiles']))}) take {best:.1f}", mine <= best


def present() -> Launches:
    return json.loads(CHAINS.read_text())


class Measured(NamedTuple):
    launch: str
    device: str
    commit: str
    us: float


def counted() -> dict[str, Any]:
    """``commits``: name of a commit in the result files -> its short name -> ``launches`` as they were then."""
    return json.loads(MEASURED.read_text())


def then(commit: str | None) -> Launches:
    """The launches of a commit that a GPU has measured, {} of others."""
    known = counted()
    return known["launches"].get(known["commits"].get(commit), {})


def measured(directory: Path = results.RESULTS) -> list[Measured]:
    """Durations of kernels in the result files of the commits that are :func:`counted`."""
    known, found = counted()["commits"], {}
    for path in sorted(directory.rglob("op-cuda-*.json")):
        result = json.loads(path.read_text())
        of = then(result["commit"])
        for row in result["rows"] if of else []:
            n, channels, layout, _ = row["case"].split("-")
            for kernel in row.get("kernels") or []:
                name = kernel["name"].removesuffix("_kernel")
                way = next((w for w in ("forward", "backward") if f"::{w}_kernel" in name), f"triton {name}")
                launch, commit = f"{way} {n} {channels} {layout}", known[result["commit"]]
                if launch in of and row["case"].endswith("bfloat16"):
                    found[launch, commit] = Measured(launch, result["device"], commit, kernel["us"])
    return list(found.values())


def changed_since(commit: str | None) -> list[str]:
    """Which of CUDA's kernels, "forward" or "backward", are others now than at a commit that a GPU has measured."""
    was = then(commit)
    changed = {name.split()[0] for name, figures in present().items() if figures != was.get(name, figures)}
    return sorted(changed, reverse=True)  # the forward first


def triton_changed_since(commit: str | None) -> list[str]:
    """The same of Triton's kernels, by their names."""
    was = then(commit)
    return sorted({f["kernel"] for name, f in triton_now().items() if f != was.get(name, f)})


def triton_now() -> Launches:
    """Of Triton 3.6, which was measured, by the names that MEASURED gives them."""
    (version,) = (v for v in triton() if v.startswith("3.6."))
    return {
        f"triton {figures['kernel']} {name.partition(' ')[2]}": figures
        for name, kernels in triton()[version]["launches"].items()
        for figures in kernels
    }


def triton() -> dict[str, Any]:
    """What is counted of Triton's kernels, by its version."""
    return json.loads(TRITON.read_text())


def page() -> str:
    """The whole of docs/gpu-model.md."""
    launches = present()
    predictions = []
    for gpu in (H100, H200):
        for size in (PAPER, LARGE):
            for layout in LAYOUTS:
                h = head(launches, size, layout, gpu)
                cells = [f"{p.us:.1f} ({p.bound})" for p in (h.forward, h.backward)]
                predictions.append(
                    [gpu.name, f"N = {size[0]}, C = {size[1]}, {layout}", *cells, f"{h.us:.1f}", f"{h.share:.0%}"]
                )
    return TEXT.format(
        constants=table(["constant", "value", "source"], [list(c) for c in CONSTANTS]),
        predictions=table(
            ["GPU", "bfloat16, 7 × 7, L = 7", "forward, µs", "backward, µs", "both, µs", "of copy"], predictions
        ),
        goals="\n".join(f"- {'met' if met else '**not met**'}: {text}" for text, met in goals(launches)),
        parts=_parts(launches),
        chains="\n\n".join(_chain(way, layout, launches) for way in ("forward", "backward") for layout in LAYOUTS),
        measured=_measured(launches | triton_now()),
        triton=_triton_table(),
    )


def _parts(launches: Launches) -> str:
    rows = []
    for size in (PAPER, LARGE):
        for way in ("forward", "backward"):
            for layout in LAYOUTS:
                launch = launches[f"{way} N{size[0]} C{size[1]} {layout}"]
                p = predict(launch, H100)
                blocks = " + ".join(f"{part['blocks']:,} × {part['cycles']:,}" for part in launch["parts"])
                rows.append([
                    f"{way}, N = {size[0]}, C = {size[1]}, {layout}", str(launch["registers"]),
                    f"{launch['shared']:,}", str(launch["resident"]), str(launch["cluster"]), blocks,
                    f"{p.latency_us:.1f}", f"{p.filling_us:.1f}", f"{p.issue_us:.1f}", f"{p.memory_us:.1f}",
                ])  # fmt: skip
    header = [
        "kernel", "registers", "shared memory, bytes", "blocks a multiprocessor", "blocks a cluster",
        "blocks × cycles", "waiting, µs", "filling, µs", "issuing, µs", "moving bytes, µs",
    ]  # fmt: skip
    return table(header, rows)


def _chain(way: str, layout: str, launches: Launches) -> str:
    launch = launches[f"{way} N{PAPER[0]} C{PAPER[1]} {layout}"]
    rows, at = [], 0
    for wait, times, cycles in launch["chain"]:
        at += cycles
        rows.append([wait, str(times) if wait != "end" else "", f"{cycles:,}", f"{at:,}"])
    return f"### {way}, {layout}\n\n" + table(["waits for", "times", "cycles", "after"], rows)


def of_measured(row: Measured, launch: dict[str, Any]) -> float:
    """The model's µs of a launch on the GPU that has measured it, or an earlier version of it."""
    gpu = H100 if "H100" in row.device else H200
    return predict(launch, gpu, fills=not row.launch.startswith("triton")).us


def _measured(launches: Launches) -> str:
    counts, rows, changed = counted()["launches"], [], []
    ratios: dict[str, list[float]] = {"CUDA's": [], "Triton's": []}
    same: set[str] = set()  # launches whose present kernels were measured
    for row in sorted(measured(), key=lambda row: (row.launch.startswith("triton"), row.launch)):
        was = counts[row.commit][row.launch]
        us = of_measured(row, was)
        if row.us > SHORT_US:
            ratios["Triton's" if row.launch.startswith("triton") else "CUDA's"].append(us / row.us)
        if launches.get(row.launch) == was:
            now = "the same kernel"
            same.add(row.launch)
        else:
            now = f"{of_measured(row, launches[row.launch]):.1f}" if row.launch in launches else "not counted"
            changed.append(row.launch)
        rows.append([row.launch, row.device, row.commit, f"{row.us:.1f}", f"{us:.1f}", f"{us / row.us:.2f}", now])
    known = {row[0] for row in rows}
    said = (
        f"The kernels have changed since in {len(changed)} of these {len(rows)} lines: there the last column is the "
        f"model of the present ones, which GPUs have measured in {len(known & same)} of {len(known)} launches."
        if changed
        else "The kernels are still these."
    )
    header = ["kernel", "GPU", "commit", "measured, µs", "model of it, µs", "model / measured", "model now, µs"]
    fits = "; ".join(
        f"of {whose} {min(of):.2f} to {max(of):.2f}, {statistics.geometric_mean(of):.2f} in the geometric mean"
        for whose, of in ratios.items()
        if of
    )
    fits = f"Of what took more than {SHORT_US} µs, the model says this many times the time: {fits}. "
    return fits + said + "\n\n" + table(header, rows)


def triton_head(version: str, size: tuple[int, int], layout: str, gpu: Gpu) -> tuple[float, float, float]:
    """Microseconds of the forward's kernels, of the backward's, and of all in a CUDA graph."""
    n, channels = size
    launches = triton()[version]["launches"]
    ways = [launches[f"{way} N{n} C{channels} {layout}"] for way in ("forward", "backward")]
    forward, backward = (sum(predict(figures, gpu, fills=False).us for figures in kernels) for kernels in ways)
    return forward, backward, forward + backward + GAP_US * sum(map(len, ways))


def _triton_table() -> str:
    rows = []
    for gpu in (H100, H200):
        for size in (PAPER, LARGE):
            for layout in LAYOUTS:
                cuda = head(present(), size, layout, gpu).us
                cells = []
                for version in sorted(triton()):
                    forward, backward, both = triton_head(version, size, layout, gpu)
                    cells.append(f"{both:.1f} ({forward:.1f} + {backward:.1f})")
                rows.append([gpu.name, f"N = {size[0]}, C = {size[1]}, {layout}", *cells, f"{cuda:.1f}"])
    return table(["GPU", "bfloat16, 7 × 7, L = 7", *(f"Triton {v}, µs" for v in sorted(triton())), "CUDA, µs"], rows)


TEXT = """# How fast the GPU kernels should be

**A model, not a measurement**, of the GPU kernels with bfloat16 features, 7 × 7 maps and 7 classes. What it is fed
with is counted without a GPU: the compiled code for sm_90a is executed on a CPU, instruction by instruction
(tests/resources/latency_chains.py). `python -m bench model` writes this page; a test fails when the counts change.

## The model

A kernel's time is *launch + max(waiting + filling, moving bytes)*.

- **Waiting** is a schedule of its blocks. One block, or cluster, by itself on its multiprocessors takes as long as its
  chain: what each instruction waits for, by the scoreboards that the compiler has set, through registers, memory and
  barriers, one instruction a cycle for each warp at most. With R blocks on a multiprocessor, each with I instructions
  for each of the 4 schedulers and W wavefronts of shared memory, a block takes (R − 1) · (I + W) cycles longer: others
  are served in between. That the two add up, instead of hiding each other, was found from the measurements. Blocks
  start in order wherever there is room by registers, shared memory, threads and blocks, so that the last, incomplete
  wave counts as what it takes. Once a kernel come the first fetch of its instructions, and what the last block does
  alone.
- **Filling**, of CUDA's kernels: what the blocks that begin together ask for at once, or the last ones write at once,
  at the speed of a copy; of each block as much as its shared memory holds, at most. Triton's ask for one tile after
  another.
- **Moving bytes**: the features read or their gradient written, and the saved tensors, at the speed of a copy.
- Both kernels in a CUDA graph follow each other with a gap. The share of the copy bandwidth counts the bytes that must
  move, the features and their gradient, over the time of both.

Not in the model: that memory answers later when it is busy, clusters that find no room in one group of
multiprocessors, instruction caches but for the first fetch, and the throughput of units that take less than an
instruction a cycle, such as that of integers.

{constants}

## What it predicts

In brackets, what most of the time goes to: waiting for latency, or issuing instructions (where they fill two thirds of
the time), or moving bytes.

{predictions}

{goals}

The goals are an H100's. An H200's memory is 1.4 times as fast while its multiprocessors are no faster, so that N = 512,
C = 2048 reaches less of the copy bandwidth there: in NCHW by the model, and in both layouts as it was measured
(docs/benchmark.md).

What it is computed from, and the four times on an H100:

{parts}

Triton's kernels by the same model (tests/resources/triton_launches.py), all that a head launches:

{triton}

## Where it has been measured

The fitted constants were chosen with both kinds of kernels of a800626 in view, and the filling with CUDA's of 2731626:
where moving bytes takes longest it hides behind that, elsewhere it comes before all and after all. Kernels of up to
3 µs are mostly launch. For CUDA's forward in channels_last the model is still too fast: what it leaves out, above, is
most of what that waits for. Clock readings within the kernels (bench/results/gpu/ends) show where: in the paper's
batch the first features come 2 µs and more after a block has begun, and the fence and the ticket before the batch's
means take 0.7 µs, more than twice what the model has for them.

{measured}

## The chain of the paper's batch

N = 32, C = 512: the longest chain of waits in a launch, in order; waits of the same kind that follow each other are
one line. Cycles are from the end of the wait before, so they contain the instructions in between, and waits for
constants, special units and the L1 cache. Where a launch has several kinds of blocks, it is the chain of the one that
takes longest.

{chains}
"""
