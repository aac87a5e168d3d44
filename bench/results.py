"""The result files: where and on what was measured, writing them whole, finding the newest."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import rebalfer_kernels as rk
from rebalfer_kernels import native
from rebalfer_kernels.doctor.environment import environment as machine
from rebalfer_kernels.doctor.environment import without_home

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")


def environment(kind: str) -> dict[str, Any]:
    """Where and on what this runs, which a reader needs to repeat it; ``device`` is the GPU if ``kind`` is "cuda"."""
    found = machine()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        **found,
        "kind": kind,
        "device": torch.cuda.get_device_name() if kind == "cuda" else found["cpu"] or platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "transparent_hugepage": pages.read_text().strip() if pages.exists() else None,
        "load_average": os.getloadavg(),
        "backends": rk.backends(),
        "cpp_autograd": native.load("autograd")[1],
        **version(),
    }


def version() -> dict[str, Any]:
    """The commit, whether files differ from it (None: not known), the date.

    REBALFER_COMMIT says what the folder is a copy of; a repository that it may lie in has another history.
    """
    said = os.environ.get("REBALFER_COMMIT")
    changed = None if said else _git("status", "--porcelain", "--", "rebalfer_kernels", "csrc", "trainer", "bench/*.py")
    return {
        "commit": said or _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    try:
        # A checkout around a folder that is none has another commit.
        settings = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
        done = subprocess.run(["git", *arguments], cwd=ROOT, env=settings, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def reason(error: Exception) -> str:
    """What a result file says of an error.

    >>> reason(ValueError("no"))
    'ValueError: no'
    """
    return f"{type(error).__name__}: {error}"[:500]


def reason_of(refusal: dict[str, Any]) -> str:
    """Why a contender has no row.

    >>> reason_of({"contender": "released", "reason": None, "error": 0.25})
    'relative error 0.25'
    """
    if refusal["reason"] is None and refusal["error"] is None:
        return "the loss or a gradient is missing or not finite"
    return refusal["reason"] or f"relative error {refusal['error']:.2g}"


def file_name(program: str, result: dict[str, Any]) -> str:
    """A file for each kind, device, on a CPU instruction set and memory, set of cases; of chosen contenders, the first.

    >>> file_name("op", {"kind": "cuda", "device": "NVIDIA H200 (SXM)", "chosen": ["triton", "identity"]})
    'op-cuda-nvidia-h200-sxm-triton.json'
    >>> file_name("op", {"kind": "cpu", "device": "AMD EPYC", "capability": "AVX512", "memory": "fresh"})
    'op-cpu-amd-epyc-avx512-fresh.json'
    """
    chosen = result.get("chosen") or [""]
    of = result.get("set", "short")
    words = [program, result["kind"], result["device"]]
    if result["kind"] == "cpu":
        words += [capability(result), result.get("memory") or ""]
    words += ["" if of == "short" else of, chosen[0]]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") + ".json"


def capability(result: dict[str, Any]) -> str:
    """A CPU's instruction set, or the older one that the benchmark held it to.

    >>> capability({"capability": "AVX2", "settings": {"REBALFER_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}})
    'held to AVX2'
    """
    held = {"REBALFER_CPU_ISA", "ATEN_CPU_CAPABILITY"} <= result.get("settings", {}).keys()
    return f"held to {result['capability']}" if held else result.get("capability") or ""


def portable(text: str) -> str:
    """Without the places that the checkout and the user's folder have on this machine.

    >>> portable(f"{ROOT}/bench/op.py, {Path.home()}/.cache")
    'bench/op.py, ~/.cache'
    """
    return without_home(text.replace(f"{ROOT}/", ""))


def write(result: dict[str, Any], path: Path) -> Path:
    """Write a result whole or not at all, :func:`portable`; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(portable(json.dumps(result, indent=1, allow_nan=False)) + "\n")
    os.replace(part, path)
    return path


def newest_cpu(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """For each CPU, instruction set and kind of memory the latest result that nothing disturbed."""
    found = [r for r in _read(directory, "op", "cpu") if r["quiet"] and _is_short(r)]
    latest = {(r["device"], capability(r), r["memory"]): r for r in found}
    return [latest[key] for key in sorted(latest)]


def newest_more(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """For each device, kind of memory and longer set of cases the latest result that nothing disturbed."""
    found = [*_read(directory, "op", "cpu"), *_read(directory, "op", "cuda")]
    longer = [r for r in found if r["quiet"] and not _is_short(r)]
    latest = {(r["device"], capability(r), r["memory"] or "", r["set"]): r for r in longer}
    return [latest[key] for key in sorted(latest)]


def _is_short(result: dict[str, Any]) -> bool:
    """Of the cases that the goals judge."""
    return result.get("set", "short") == "short"


def newest_gpu(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """For each GPU the latest result of the loss, of several runs if its contenders were measured apart."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for result in filter(_is_short, _read(directory, "op", "cuda")):
        runs.setdefault(result["device"], []).append(result)
    return [merged(of_one) for of_one in runs.values()]


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The latest of a GPU's runs; or those that measured the contenders apart, the latest of each, as if it were one.

    "Ours" is the backend that the library chooses, and the identity op that of its run. ``commits`` has that of each
    run, by its first contender.
    """
    newest = runs[-1]
    if not newest.get("chosen"):
        return newest
    latest = list({r["chosen"][0]: r for r in runs if r.get("chosen")}.values())
    served = {case: backend for r in latest for case, backend in r["served_by"].items()}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for r in latest:
        for row in r["rows"]:
            key = row["case"], row["contender"]
            if key not in rows or served.get(row["case"]) in r["chosen"]:
                rows[key] = row
    ours = [{**rows[key], "contender": "ours"} for key in served.items() if key in rows]
    lists = {key: [x for r in latest for x in r[key]] for key in ("rejected", "errors", "left_out")}
    measured = {case for case, _ in rows}
    lists["left_out"] = list(dict.fromkeys(case for case in lists["left_out"] if case not in measured))
    clocks = {case: mhz for r in latest for case, mhz in r.get("sm_mhz", {}).items()}
    more = {
        "disturbed": [r["chosen"][0] for r in latest if not r.get("quiet", True)],
        "sm_mhz": clocks,
        "chosen": None,
        "served_by": served,
        "commits": {r["chosen"][0]: r["commit"] for r in latest},
    }
    return {**newest, **lists, **more, "rows": [*ours, *rows.values()]}


def newest_by_backbone(program: str, directory: Path = RESULTS) -> list[dict[str, Any]]:
    """Of step, methods or memory: for each device, instruction set of the CPU and backbone the latest result.

    None that other programs disturbed.
    """
    every = [*_read(directory, program, "cpu"), *_read(directory, program, "cuda")]
    found = [r for r in every if r["kind"] == "cuda" or r.get("quiet", True)]
    return list({(r["device"], r["capability"], r["config"]["backbone"]["name"]): r for r in found}.values())


def studies(directory: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """The stored runs of each study, by its name."""
    paths = sorted((directory / "study").glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def _read(directory: Path, program: str, kind: str) -> list[dict[str, Any]]:
    """The results of a kind, also in folders below (``gpu-check --out`` makes one), in the order of their dates."""
    results = [json.loads(path.read_text()) for path in directory.rglob(f"{program}-*.json")]
    return sorted((r for r in results if r["kind"] == kind), key=lambda r: r["date"])
