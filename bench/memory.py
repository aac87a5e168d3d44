"""Which kind of memory a training loop on a CPU sees: counted, not timed, in the trainer's own steps.

malloc's rules are fixed in the benchmark, in one of two ways (:data:`RULES`), because left to itself, glibc switches
between them depending on earlier frees. Here three processes train, with either rules and with none; the pages that the
head touches for the first time in a step say to which of the two a loop without rules is closer.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # PyTorch is imported only after what must be set before
    from trainer.config import Config

    from .cases import Case

RULES = {
    "fresh": {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)},
    "reused": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
LEFT_ALONE = "none"  #: of malloc's rules: what a training loop has
WARM_UP, STEPS = 2, 3
#: A larger tensor's pages are given back at once, whatever was freed before: glibc on 64 bits (mallopt(3)).
NEVER_REUSED = 32 * 2**20  # bytes


def variables(rules: str) -> dict[str, str]:
    """The environment of a process with these of malloc's rules, or with none.

    >>> [key for key in variables("fresh") if key.startswith("MALLOC_")], variables("none") == {
    ...     key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    (['MALLOC_MMAP_THRESHOLD_'], True)
    """
    others = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    return {**others, **RULES.get(rules, {})}


def of(case: Case, seen: str) -> str:
    """The kind of memory that a training loop has for a case, if it sees ``seen`` where glibc has the choice.

    >>> from bench.cases import Case
    >>> [of(Case.named(f"N{n}-C2048-nchw-float32"), "reused") for n in (32, 64)]  # gradients of 24 and 49 MiB
    ['reused', 'fresh']
    """
    return "fresh" if case.gradient_bytes >= NEVER_REUSED else seen


def closer(faults: dict[str, int]) -> str:
    """The rules under which the head has about as many page faults as with none.

    >>> closer({"none": 40, "fresh": 1000, "reused": 10})
    'reused'
    """
    return min(RULES, key=lambda rules: abs(faults[rules] - faults[LEFT_ALONE]))


def head_faults(config: Config, warm_up: int = WARM_UP, steps: int = STEPS) -> int:
    """Page faults of the head's forward and backward in a step of this process: the median."""
    import resource

    import torch

    from .step import PARTS, Training

    training = Training(config, torch.device("cpu"), pool=64)
    counted = []
    for _ in range(warm_up + steps):
        seen: list[int] = []

        def mark(seen: list[int] = seen) -> None:
            seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

        training.parts(mark)
        head = PARTS.index("head")
        counted.append(seen[head] - seen[head - 1])
    return round(statistics.median(counted[warm_up:]))


def run(config: Config, options: list[str], directory: Path, *, kind: str) -> tuple[dict[str, Any], Path]:
    """Count in three processes, made from the ``options`` of the command line; the result and its file."""
    from trainer.config import as_dict

    from . import results

    command = [sys.executable, "-m", "bench", "memory", *options, "--count"]
    counted = {
        rules: subprocess.run(command, env=variables(rules), check=True, stdout=subprocess.PIPE, text=True)
        for rules in (LEFT_ALONE, *RULES)
    }
    faults = {rules: json.loads(done.stdout) for rules, done in counted.items()}
    result = {**results.environment(kind), "config": as_dict(config), "faults": faults, "seen": closer(faults)}
    return result, results.write(result, directory / results.file_name(f"memory-{config.backbone.name}", result))
