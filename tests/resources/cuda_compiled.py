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
    """Kernel of the head -> architecture -> threads and dynamic shared memory of its launch at C = 512, 7 x 7.

    As the emulator is asked for it, with L = 7 for instances of one block of 8 classes and L = 16 for two.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for dtype, layout, (blocks, classes) in itertools.product(TYPES, kernels.LAYOUTS, ((1, 7), (2, 16))):
        case = kernels.Case(1, 512, 7, 7, classes, dtype, layout)
        instance = f"<{TYPES[dtype]}, {str(case.channels_last).lower()}, {blocks}>"
        for architecture in SHARED:
            cluster = torch.zeros(1, dtype=torch.int64)
            kernels.library()("get_cluster_blocks", 512, 49, dtype.itemsize, architecture != "sm_80", cluster)
            saved, forward = kernels.forward(case, cluster=int(cluster))
            _, backward = kernels.backward(case, saved, kernels.upstreams(case, True))
            for name, counters in (("forward_kernel", forward), ("backward_kernel", backward)):
                launch = counters["threads"], counters["shared_bytes"]
                found.setdefault(name + instance, {})[architecture] = launch
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
        "# What the CUDA kernels use",
        "",
        "Read from the code compiled for " + ", ".join(SHARED) + " (a cell's three figures; one where they agree);",
        "an H200 has run them. A row is one instance: dtype, whether channels_last, blocks of 8 classes. Shared",
        "memory, and the blocks of 128 threads that a multiprocessor then holds, are those of C = 512, 7 x 7 maps and",
        "L = 7 or 16. Nothing is spilled. Instructions are counted as they stand in the code, not as they are run.",
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
