"""Everything that a machine with a GPU must show, in one command and a bounded time, the most important first.

Each step is a process of its own with a limit, so that one that hangs, crashes or is slow costs the others little, and
a run that is cut off leaves what was done until then: ``summary.json`` is written anew after every step. At most eight
files: summary.json, every-op.txt, doctor.txt, doctor.json, gpu-tests.txt, op-*.json, step-*.json, sanitizer.txt.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rebalfer_kernels.doctor import bounded
from rebalfer_kernels.doctor.environment import environment

from ..baselines import fused_backends
from ..goals import judged
from ..goals import summary as goal_summary
from ..results import ROOT, version, write

PYTHON = sys.executable
#: Kept of a step's output in summary.json, characters.
TAIL = 1500


class Step(NamedTuple):
    """One part of the check; ``command`` is made from the seconds it may take."""

    name: str
    share: float  #: of the time that is left for this and the later steps
    command: Callable[[float], list[str]]
    log: str | None = None  #: the file that gets its output
    skip: str | None = None  #: why it is not run here
    environment: dict[str, str] = {}
    #: what an exit status other than 0 means, where it is no failure
    statuses: dict[int, str] = {}


def steps(out: Path, device: str) -> list[Step]:
    """The steps on a "cuda" device, or on a "cpu" those that can be rehearsed there, at small sizes."""
    bench = [PYTHON, "-m", "bench"]
    rehearse = [] if device == "cuda" else ["--rehearse"]
    no_gpu = None if device == "cuda" else "needs a GPU"
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    no_sanitizer = no_gpu or (None if Path(sanitizer).exists() else "compute-sanitizer is not installed")
    no_pytest = no_gpu or (None if importlib.util.find_spec("pytest") else "pytest is not installed")

    kernels = fused_backends("cuda")
    built = {"REBALFER_BUILD": "0"}  # what could not be built in its own step is not tried again in every other

    def tests(backend: str, share: float) -> Step:
        """A process for each backend: after a bad access nothing in its process can be trusted."""
        command = [PYTHON, "-m", "pytest", "-m", "gpu", "-k", backend, "-o", "addopts=", "-v", "-rs", "--tb=short"]
        command += ["-p", "no:cacheprovider", "tests/gpu", "tests"]  # the GPU's own first
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        own = {"HYPOTHESIS_PROFILE": "short", **built}
        return Step(f"{backend} tests", share, lambda _: command, "gpu-tests.txt", no_pytest, own, {5: "no test"})

    def sanitize(tool: str, share: float) -> Step:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        if tool == "memcheck":  # PyTorch asks the driver for things it may refuse
            command += ["--report-api-errors", "no"]
        command += [PYTHON, "-m", "bench.verify.every_op", "--small", *kernels]
        # Every tensor an allocation of its own, or an access beyond one falls into another.
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **built}
        return Step(tool, share, lambda _: command, "sanitizer.txt", no_sanitizer, own, {9: "errors found"})

    return [
        Step("build cpu", 0.25, lambda _: [PYTHON, "-m", "rebalfer_kernels", "build", "cpu"]),
        # Only for the present GPU, as on first use: a quarter of what `build cuda` compiles.
        Step(
            "build cuda", 0.35,
            lambda _: [PYTHON, "-c", "from rebalfer_kernels import native; print(native.build('cuda'))"], skip=no_gpu,
        ),
        Step(
            "every op", 0.2, lambda _: [PYTHON, "-m", "bench.verify.every_op", *kernels], "every-op.txt", no_gpu,
            built, {1: "a result is wrong, see every-op.txt"},
        ),
        Step(
            "doctor", 0.25,
            lambda limit: [PYTHON, "-m", "rebalfer_kernels", "doctor", "--json", str(out / "doctor.json"), "--seconds",
                           f"{max(0.9 * limit - 10, 1):.0f}"],
            "doctor.txt", None, built, {1: "something is wrong or unchecked, see doctor.txt"},
        ),
        *(tests(name, 0.2 / (1 - 0.2 * earlier)) for earlier, name in enumerate(kernels)),  # the same time each
        Step(
            "op", 0.45,
            lambda limit: [*bench, "op", "--device", "cuda", "--seconds", "1.5", "--limit", f"{0.9 * limit:.0f}",
                           "--out", str(out), *rehearse],
            environment=built, statuses={1: "a contender was refused or a case failed; the others are measured"},
        ),
        Step(
            "step", 0.35,
            lambda limit: [*bench, "step", "--seconds", f"{min(0.4 * limit, 20):.0f}", "--out", str(out), *rehearse],
            environment=built, statuses={1: "a head was refused or a part failed; the others are measured"},
        ),
        sanitize("memcheck", 0.5),
        sanitize("racecheck", 1.0),
    ]  # fmt: skip


def run(out: Path, device: str, seconds: float, todo: list[Step]) -> dict:
    """Run the steps within ``seconds``; what summary.json holds."""
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    for name in {step.log for step in todo if step.log}:
        (out / name).unlink(missing_ok=True)
    found = environment()
    gpus = found["gpus"] or []
    summary = {
        "kind": "gpu-check" if device == "cuda" else "rehearsal",
        "device": gpus[0].split(",")[0] if device == "cuda" and gpus else found["cpu"],
        **{key: found[key] for key in ("gpus", "driver", "torch", "triton", "cuda", "python", "nvcc")},
        **version(),
        "limit_s": seconds,
        "steps": [],
        "goals": all_goals(out),
    }
    for step in todo:
        left = end - time.monotonic()
        record = {"step": step.name, "state": "skipped", "reason": step.skip, "seconds": 0.0}
        if step.skip is None and left < 5:
            record["reason"] = "no time left"
        elif step.skip is None:
            record |= perform(step, left * step.share, out)
        summary["steps"].append(record)
        summary["goals"] = all_goals(out)
        summary["files"] = sorted(p.name for p in out.iterdir() if p.is_file())
        write(summary, out / "summary.json")
        print(f"{record['step']:<11} {record['state']} {record['reason'] or ''}", flush=True)
    return summary


def perform(step: Step, limit: float, out: Path) -> dict:
    """Run one step; its state, reason, seconds, and the end of its output unless that is in a file."""
    command = step.command(limit)
    # From a bare checkout, and what is printed before a step is stopped must be in its log.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.environment}
    try:
        log = out / step.log if step.log else None
        outcome = bounded.run(command, limit, environment=settings, directory=ROOT, log=log)
    except OSError as error:  # the program does not exist after all
        outcome = bounded.Outcome(127, str(error), 0.0)
    meaning = step.statuses.get(outcome.status) if outcome.status else None
    state = "passed" if outcome.failure is None else "stopped" if outcome.status is None else "failed"
    times = {"seconds": round(outcome.seconds, 1), "limit_s": round(limit, 1)}
    shown = {"command": [part.replace(PYTHON, "python") for part in command], "output": outcome.output[-TAIL:]}
    return {"state": state, "reason": meaning or outcome.failure, **times, **shown}


def all_goals(out: Path) -> list[dict]:
    """Every goal for a GPU, from the result files in ``out``; without them, not met."""
    goals = []
    for program in ("op", "step"):
        try:
            newest = max(out.glob(f"{program}-cuda-*.json"), key=lambda p: p.stat().st_mtime)
            goals += json.loads(newest.read_text())["goals"]
        except (ValueError, OSError, KeyError):  # none is written yet, or not a whole one
            goals += judged(program, {"kind": "cuda", "rows": []})
    return goals


def table(summary: dict) -> str:
    """What is printed last."""
    lines = [f"{summary['device']}, driver {summary['driver']}, torch {summary['torch']}, commit {summary['commit']}"]
    for step in summary["steps"]:
        lines.append(f"{step['step']:<11} {step['state']:<8} {step['seconds']:6.1f} s  {step['reason'] or ''}".rstrip())
    return "\n".join([*lines, *map(goal_summary, summary["goals"])])


def main(out: Path, device: str, seconds: float, only: list[str] | None = None) -> int:
    """Run the check, or ``only`` the steps of these names; 2 without a GPU, 1 if a step failed or was stopped."""
    if device == "cuda" and not environment()["gpus"]:
        print("error: PyTorch sees no GPU here (--device cpu rehearses the steps that need none)", file=sys.stderr)
        return 2
    out = out.resolve()
    todo = steps(out, device)
    if unknown := set(only or ()) - {step.name for step in todo}:
        names = ", ".join(repr(step.name) for step in todo)
        print(f"error: --only: got {', '.join(map(repr, sorted(unknown)))}, expected some of {names}", file=sys.stderr)
        return 2
    summary = run(out, device, seconds, [step for step in todo if not only or step.name in only])
    print(table(summary))
    return int(any(step["state"] in ("failed", "stopped") for step in summary["steps"]))
