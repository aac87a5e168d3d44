"""What changed between two results of one program: what got slower beyond the noise, appeared, disappeared.

A time is slower if the middle halves of its old and new samples do not overlap, by 2 % at least, and beyond the factor
by which the identity op of the same case and phase got slower: that is the machine's doing and not a kernel's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rebalfer_kernels.backend import BACKENDS

from .results import reason_of

#: Smaller differences are not named: a choice, as two runs of one commit are not known to agree any better.
LEAST = 1.02
PHASES = ("forward", "backward", "both", "ms")
#: What must be equal for times to mean the same.
MACHINE = (
    "device", "capability", "threads", "memory", "torch", "triton", "cuda", "driver", "libc", "settings",
    "transparent_hugepage",
)  # fmt: skip

Result = dict[str, Any]
Key = tuple[str, str]  #: case and contender


class Change(NamedTuple):
    """The times of one contender in one phase; [lower quartile, median, upper quartile] in ms."""

    case: str
    contender: str
    phase: str
    before: list[float]
    after: list[float]
    drift: float  #: the identity op's time over what it was; 1 where there is none

    @property
    def slower(self) -> bool:
        """Beyond the noise, and beyond what the machine lost.

        >>> old = [1.9, 2.0, 2.1]
        >>> [Change("a", "ours", "both", old, *new).slower for new in (
        ...     ([2.2, 2.3, 2.4], 1.0), ([2.0, 2.3, 2.4], 1.0), ([2.2, 2.3, 2.4], 1.1), ([1.9, 2.0, 2.1], 0.5))]
        [True, False, False, False]
        """
        lost = max(1.0, self.drift)
        return self.after[0] > self.before[2] * lost and self.after[1] >= LEAST * self.before[1] * lost

    @property
    def faster(self) -> bool:
        """Beyond the noise, and beyond what the machine gained."""
        gained = min(1.0, self.drift)
        return self.after[2] < self.before[0] * gained and self.after[1] <= self.before[1] * gained / LEAST

    @property
    def ratio(self) -> float:
        return self.after[1] / self.before[1]

    def __str__(self) -> str:
        (a, before, b), (c, after, d) = self.before, self.after
        drift = "" if self.drift == 1 else f", the identity op {self.drift:.2f}×"
        return (
            f"{self.case}, {self.contender}, {self.phase}: {before:.4g} ms ({a:.4g} to {b:.4g}) -> "
            f"{after:.4g} ms ({c:.4g} to {d:.4g}), {self.ratio:.2f}×{drift}"
        )


class Comparison(NamedTuple):
    """All that differs between two results."""

    conditions: list[str]  #: machine, settings and commit
    appeared: list[Key]
    disappeared: list[Key]
    refused: dict[Key, str]  #: of those that disappeared from a case that is still to be measured, why
    changes: list[Change]  #: of what is in both

    @property
    def slower(self) -> list[Change]:
        return sorted((c for c in self.changes if c.slower), key=lambda c: -c.ratio)

    @property
    def faster(self) -> list[Change]:
        return sorted((c for c in self.changes if c.faster), key=lambda c: c.ratio)

    @property
    def failed(self) -> bool:
        """Ours is slower, or gone from a case that was to be measured; others may get slower without our doing."""
        worse = {change.contender for change in self.slower} | {contender for _, contender in self.refused}
        return not worse.isdisjoint(("ours", *BACKENDS))

    def __str__(self) -> str:
        lines = [f"changed: {condition}" for condition in self.conditions]
        lines += [f"appeared: {case}, {contender}" for case, contender in self.appeared]
        for key in self.disappeared:
            why = f" ({self.refused[key]})" if key in self.refused else ""
            lines.append(f"disappeared: {', '.join(key)}{why}")
        lines += [f"slower: {change}" for change in self.slower] + [f"faster: {change}" for change in self.faster]
        rest = len(self.changes) - len(self.slower) - len(self.faster)
        return "\n".join([*lines, f"{rest} of {len(self.changes)} times differ by no more than the noise"])


def compare(before: Result, after: Result) -> Comparison:
    """Two results of ``python -m bench op``, or two of ``step``."""
    old, new = rows(before), rows(after)
    why = _missing(after, old)
    return Comparison(
        conditions=[
            f"{key}: {before.get(key)} -> {after.get(key)}"
            for key in (*MACHINE, "commit", "dirty")
            if before.get(key) != after.get(key)
        ],
        appeared=[key for key in new if key not in old],
        disappeared=[key for key in old if key not in new],
        refused={key: why[key] for key in old if key not in new and key in why},
        changes=[change for key in old if key in new for change in _changes(key, old, new)],
    )


def _missing(result: Result, wanted: Iterable[Key]) -> dict[Key, str]:
    """Why those of ``wanted`` have no row in the result: their case was left out, failed, or was measured without."""
    cases = {row.get("case", _step(result)): "was not measured" for row in result["rows"]}
    cases |= {case: "no time was left" for case in result.get("left_out", [])}
    cases |= {error["case"]: error["error"] for error in result.get("errors", []) if "case" in error}
    refused = {(r.get("case", _step(result)), r["contender"]): reason_of(r) for r in result.get("rejected", [])}
    return {key: refused.get(key) or cases[key[0]] for key in wanted if key in refused or key[0] in cases}


def rows(result: Result) -> dict[Key, dict[str, list[float]]]:
    """The quartiles of each phase, by case and contender; "launched" are those of a GPU's calls outside a graph."""
    found = {}
    for row in result["rows"]:
        times = {phase: row[phase] for phase in PHASES if row.get(phase)}
        times |= {f"launched {phase}": row["eager"][phase] for phase in PHASES if row.get("eager", {}).get(phase)}
        found[row.get("case", _step(result)), row["contender"]] = times
    return found


def _step(result: Result) -> str:
    """What a result of ``step`` has in place of a case."""
    config = result.get("config")
    return f"{config['backbone']['name']}-{config['image_size']}-N{config['batch_size']}" if config else ""


def _changes(key: Key, old: dict[Key, Any], new: dict[Key, Any]) -> list[Change]:
    identity = key[0], "identity"
    found = []
    for phase in (p for p in old[key] if p in new[key]):
        drift = 1.0
        if key != identity and phase in old.get(identity, {}) and phase in new.get(identity, {}):
            drift = new[identity][phase][1] / old[identity][phase][1]
        found.append(Change(*key, phase, old[key][phase], new[key][phase], drift))
    return found


def pairs(a: Path, b: Path) -> list[tuple[Path, Path]]:
    """Two files, or the files of two folders that have the same name.

    Raises:
        ValueError: there is no such file, or the folders have none in common.
    """
    if missing := [str(path) for path in (a, b) if not path.exists()]:
        raise ValueError(f"compare: got {', '.join(missing)}, expected files of results or folders of them")
    if not (a.is_dir() and b.is_dir()):
        return [(a, b)]
    common = sorted({path.relative_to(a) for path in a.rglob("*.json")} & {p.relative_to(b) for p in b.rglob("*.json")})
    found = [(a / path, b / path) for path in common if path.name.startswith(("op-", "step-"))]
    if not found:
        raise ValueError(f"compare: {a} and {b} have no results of the same name")
    return found


def main(a: Path, b: Path) -> int:
    """Print what changed from A to B; 1 if ours is slower, or refused."""
    failed = False
    for before, after in pairs(a, b):
        comparison = compare(*(json.loads(path.read_text()) for path in (before, after)))
        print(f"{before} -> {after}", comparison, sep="\n")
        failed = failed or comparison.failed
    return int(failed)
