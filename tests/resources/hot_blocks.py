"""Where the instructions of one CUDA kernel go: by function, source line and basic block, as often as they are issued.

python tests/resources/hot_blocks.py "backward C512 7x7 L7 nchw bfloat16"
"""

from __future__ import annotations

import collections
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import cubin  # noqa: E402
import issue_budgets as budgets  # noqa: E402

from rebalfer_kernels import native  # noqa: E402

CSRC = budgets.ROOT / "csrc"


def lined(kernel: str, dtype: str) -> list[cubin.Instruction]:
    """The kernel's instructions with their source lines: compiled again with -lineinfo, which changes none of them."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "kernels.cubin"
        command = [native.find_nvcc(), *"-std=c++20 -O3 -cubin -lineinfo".split(), f"-arch={budgets.ARCHITECTURE}"]
        command += [f"-I{CSRC}", str(CSRC / f"cuda/kernels_{dtype}.cu"), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        found = cubin.listing(out)[kernel]
    known = budgets.listings()[kernel]
    assert [i.text for i in found] == [i.text for i in known], "another code than the library's"
    return found


def functions(file: Path) -> list[str]:
    """Of each line of a source, the function that it is in."""
    found, name = [], file.name
    for line in file.read_text().splitlines():
        if match := re.search(
            r"(?:__device__|__global__|REBALFER_HD\w*)\b[^(;]*?(\w+)\(", re.sub(r"__\w+__\(.*?\)", "", line)
        ):
            name = match[1]
        found.append(name)
    return found


def blocks(code: list[cubin.Instruction]) -> list[range]:
    """Basic blocks: they begin where a branch leads, and end with one."""
    starts = {0, len(code)}
    for place, instruction in enumerate(code):
        if re.match(r"BRA|BSSY|CALL|RET|EXIT|BSYNC|BREAK|WARPSYNC|BAR|UCGABAR_WAIT", instruction.text):
            starts.add(place + 1)
        starts |= {int(target, 16) // 16 for target in re.findall(r"@(0x\w+)", instruction.text)}
    return [range(a, b) for a, b in itertools.pairwise(sorted(starts))]


def report(name: str, lines: int = 24) -> str:
    """``name`` as in the golden file. Shares are of the warp instructions of one pair."""
    *way, channels, side, classes, layout, dtype = name.split()
    problem = budgets.Problem(int(channels[1:]), int(side.partition("x")[0]), int(classes[1:]), layout, dtype)
    head = budgets.Head(problem, detach="not" not in way)
    kernel, run = head.forward()
    if way[0] == "backward":
        kernel, run = head.backward()
    issued, code, kinds = run.counts[:, 0].tolist(), lined(kernel, dtype), budgets.kinds(kernel)
    whole = sum(issued)
    sources = {file.name: file for file in [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh")]}
    texts = {file: path.read_text().splitlines() for file, path in sources.items()}
    of_line = {file: functions(path) for file, path in sources.items()}

    paths: collections.Counter[str] = collections.Counter()
    of_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    by_line: collections.Counter[str] = collections.Counter()
    for instruction, n, what in zip(code, issued, kinds, strict=True):
        places = [p for p in instruction.source if p.partition(":")[0] in sources]
        calls = [of_line[file][int(line) - 1] for file, _, line in (p.partition(":") for p in places)]
        path = " > ".join(call for call, _ in itertools.groupby(calls)) or "library functions"
        paths[path] += n
        of_kind[path][what] += n
        by_line[places[-1] if places else path] += n

    out = [f"{name}: {whole:,} warp instructions, {problem.features_bytes / whole:.2f} bytes of features for each", ""]
    out.append("by function, with those that it calls inlined, and what for")
    for path, n in paths.most_common(lines):
        what = ", ".join(f"{k} {x / n:.0%}" for k, x in of_kind[path].most_common(4))
        out.append(f"{n / whole:6.1%} {n:8,}  {path}: {what}")
    out += ["", "by source line"]
    for place, n in by_line.most_common(lines):
        file, _, line = place.partition(":")
        out.append(f"{n / whole:6.1%} {n:8,}  {place:28} {texts[file][int(line) - 1].strip() if line else ''}"[:160])
    out += ["", "by basic block: instructions, times that a warp runs it, source lines of most"]
    hot = sorted(blocks(code), key=lambda b: -sum(issued[k] for k in b))[: lines // 2]
    for b in hot:
        n = sum(issued[k] for k in b)
        lines_of: collections.Counter[str] = collections.Counter()
        for k in b:
            lines_of[next((p for p in reversed(code[k].source) if p.partition(":")[0] in sources), "?")] += issued[k]
        most = ", ".join(place for place, _ in lines_of.most_common(3))
        span = f"{16 * b.start:04x}-{16 * b.stop:04x}"
        out.append(f"{n / whole:6.1%} {n:8,}  {span}: {len(b)} x {max(issued[k] for k in b)}, {most}")
    return "\n".join(out)


if __name__ == "__main__":
    print(report(sys.argv[1]))
