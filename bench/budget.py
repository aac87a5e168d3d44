"""How many instructions the GPU kernels issue, and what the model makes of it, against the goals; without a GPU.

The figures are those of tests/resources/issue_budgets.json, which a test compares with the compiled kernels.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, NamedTuple

from . import model
from .results import ROOT

GOLDEN = ROOT / "tests/resources/issue_budgets.json"
HOT_BLOCKS = ROOT / "tests/resources/hot_blocks.py"

#: Bytes of features per warp instruction that the kernels should reach, and those that would be better still.
BYTES, BETTER = 8.0, 10.0


class Row(NamedTuple):
    """One kernel on one pair of views."""

    name: str  #: pass and problem
    instructions: int
    features: int  #: bytes of the pair
    kinds: dict[str, int]

    @property
    def bytes_per_instruction(self) -> float:
        return self.features / self.instructions

    @property
    def judged(self) -> bool:
        """Whether a goal is set for it: what is trained with in the paper's sizes."""
        words = set(self.name.split())
        return not {"not", "Triton"} & words and {"7x7", "L7", "bfloat16"} <= words and bool({"C512", "C2048"} & words)

    @property
    def met(self) -> bool:
        return self.bytes_per_instruction >= BYTES


def rows(measured: dict[str, dict[str, Any]]) -> list[Row]:
    return [Row(name, figures["instructions"], features(name), figures["kinds"]) for name, figures in measured.items()]


def triton_rows() -> list[Row]:
    """Of the head's Triton kernels, under each version that is in the golden file; no goal is set for them."""
    return [
        Row(f"Triton {version} {row.name}", *row[1:])
        for version, of in model.triton().items()
        for row in rows(of["counts"])
    ]


def features(name: str) -> int:
    """Bytes of a pair.

    >>> features("forward C512 7x7 L7 nchw bfloat16")
    100352
    """
    *_, channels, side, _, _, dtype = name.split()
    return 2 * int(channels[1:]) * int(side.partition("x")[0]) ** 2 * (4 if dtype == "float32" else 2)


def table(found: list[Row]) -> str:
    """A line for each kernel: its instructions a pair, bytes for each, and what most of them are for."""
    lines = []
    for row in found:
        verdict = "" if not row.judged else "met" if row.met else "NOT"
        shares = ", ".join(f"{what} {n / row.instructions:.0%}" for what, n in list(row.kinds.items())[:5])
        lines.append(
            f"{row.name:58} {row.instructions:9,} {row.bytes_per_instruction:6.2f} {verdict:4} {shares}".rstrip()
        )
    header = f"{'one pair':58} {'warp instructions':>9} bytes of features for each; {BYTES:g} are needed"
    return "\n".join([header, *lines])


def main(kernel: str | None, substring: str) -> int:
    """Prints the table, or where the instructions of one kernel go; returns 1 where a goal is not met."""
    if kernel:
        return subprocess.run([sys.executable, str(HOT_BLOCKS), kernel], check=False).returncode
    found = [*rows(json.loads(GOLDEN.read_text())), *triton_rows()]
    print(table([row for row in found if substring in row.name]))
    judged = [row for row in found if row.judged]
    missed = sum(not row.met for row in judged)
    print(f"{len(judged) - missed} of {len(judged)} kernels reach {BYTES:g} bytes of features per warp instruction")
    modelled = model.goals(model.present())
    print("\nwhat `python -m bench model` predicts")
    print(*(f"{'met' if met else 'NOT'}  {text}" for text, met in modelled), sep="\n")
    return int(missed > 0 or not all(met for _, met in modelled))
