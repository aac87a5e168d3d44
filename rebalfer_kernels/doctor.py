"""``python -m rebalfer_kernels doctor``: what this machine has, and whether each backend computes right on it.

Every operation a backend serves here is compared, outputs and gradients, with the package's own reference in float64
on the CPU. Each backend is checked in a process of its own, so that one that crashes or hangs costs the others
nothing, and what it had answered before is not lost.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import bounded, dispatch, functional, native, reference
from .class_balance import effective_number_weights, target_table
from .version import __version__

SUMMARY = "check this machine's backends against float64; the text is for a bug report"
LIMIT_S = 110.0  #: of the whole command
MARGIN_S = 5.0  #: between the time a backend's process should end by itself and that when it is ended

#: Largest relative L2 error of an output (float32, but for float64 features) and of a gradient, by features' dtype.
#: A gradient is rounded once to its dtype; bfloat16's half unit in the last place is 2e-3 relative, float16's 2.4e-4.
LIMITS = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 4e-3),
    torch.float16: (1e-5, 6e-4),
    torch.float64: (1e-12, 1e-12),
}
LAYOUTS = ("nchw", "channels_last")


class Size(NamedTuple):
    N: int
    C: int
    H: int
    W: int
    L: int


#: Checked: the paper's batch, and an odd one that no vector width divides. Interpreted kernels take a small one.
PAPER, SMALL, ODD = Size(32, 512, 7, 7, 7), Size(2, 64, 7, 7, 7), Size(3, 37, 5, 3, 11)
#: Timed on a GPU: the paper's batch so many times over, to hide the launches.
TIMES_ON_GPU = 64


class Inputs(NamedTuple):
    features: Tensor  # (2N, C, H, W)
    weight: Tensor  # (L, C)
    bias: Tensor  # (L,)
    logits: Tensor  # (N, L), of the cross-entropy alone
    targets: Tensor  # (N,)
    target_table: Tensor  # (L, L)
    map_weights: Tensor  # (L,)


#: name -> (what dispatch calls it, its outputs from (functions, inputs, keywords), what it differentiates by)
OPERATIONS: dict[str, tuple[str, Callable[..., dict[str, Tensor]], tuple[str, ...]]] = {}


def _operation(name: str, op: str, *leaves: str):
    def add(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        OPERATIONS[name] = (op, function, leaves)
        return function

    return add


def _head(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    out = functions.rebalanced_head_loss(
        x.features, x.weight, x.bias, x.targets, target_table=x.target_table, map_weights=x.map_weights,
        return_maps=True, **keywords,
    )  # fmt: skip
    return out._asdict()


@_operation("head", "head", "features", "weight", "bias")
def _head_mean(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    return _head(functions, x, **keywords)


@_operation("head, per sample, not detached", "head", "features", "weight", "bias")
def _head_per_sample(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    options: dict[str, Any] = {"reduction": "none", "detach_cam_weight": False, "transform": "vflip"}
    return _head(functions, x, **options, **keywords)


@_operation("consistency", "head", "features")
def _consistency(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    return {"consistency": functions.attention_consistency(x.features, x.weight, x.map_weights, **keywords)}


@_operation("maps", "cam", "features", "weight")
def _maps(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    return {"maps": functions.class_activation_maps(x.features, x.weight, **keywords)}


@_operation("cross-entropy", "cross_entropy", "logits")
def _cross_entropy(functions: Any, x: Inputs, **keywords: Any) -> dict[str, Tensor]:
    return {"loss": functions.rebalanced_cross_entropy(x.logits, x.targets, x.target_table, **keywords)}


def inputs(size: Size, dtype: torch.dtype, layout: str, device: str) -> Inputs:
    """Random tensors, the same on every machine; 16-bit features come with a float32 weight, as under autocast."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2 * size.N, size.C, size.H, size.W, generator=g).relu_()
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(size.L, size.C, generator=g) / size.C**0.5, torch.randn(size.L, generator=g)
    logits, targets = torch.randn(size.N, size.L, generator=g), torch.randint(0, size.L, (size.N,), generator=g)
    B = effective_number_weights([10 * 2**i for i in range(size.L)])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    floats = [features.to(dtype), weight.to(wide), bias.to(wide), logits.to(dtype)]
    table, map_weights = target_table(B).to(wide), B.sqrt().to(wide)
    leaves = (t.to(device).requires_grad_() for t in floats)
    return Inputs(*leaves, *(t.to(device) for t in (targets, table, map_weights)))


class Truth(NamedTuple):
    outputs: dict[str, Tensor]  # float64, on the CPU
    upstreams: dict[str, Tensor]  # of the differentiable outputs
    gradients: list[Tensor]


@functools.lru_cache(maxsize=2)  # the sizes of a row: the next row's layout has the same truth
def truth(name: str, size: Size, dtype: torch.dtype) -> Truth:
    """Outputs and gradients in float64 from the reference, with random signed upstreams.

    The upstreams are of order 1000, as under GradScaler: a float16 gradient would be subnormal otherwise.
    """
    _, function, leaves = OPERATIONS[name]
    x = inputs(size, dtype, "nchw", "cpu")
    exact = Inputs(*(t.detach().double() if t.is_floating_point() else t for t in x))
    asked = [getattr(exact, leaf).requires_grad_() for leaf in leaves]
    outputs = function(reference, exact)
    random, kept = torch.Generator().manual_seed(1), reference.compute_dtype(dtype)
    upstreams = {
        k: (1000 * torch.randn(v.shape, generator=random)).to(kept) for k, v in outputs.items() if v.requires_grad
    }
    gradients = torch.autograd.grad(
        [outputs[k] for k in upstreams], asked, [u.double() for u in upstreams.values()]
    )  # fmt: skip
    return Truth({k: v.detach() for k, v in outputs.items()}, upstreams, list(gradients))


def errors(name: str, x: Inputs, exact: Truth, backend: str) -> tuple[dict[str, float], dict[str, float]]:
    """Relative L2 errors of each output and of each gradient against float64."""
    _, function, leaves = OPERATIONS[name]
    got = function(functional, x, backend=backend)
    gradients = torch.autograd.grad(
        [got[k] for k in exact.upstreams], [getattr(x, leaf) for leaf in leaves],
        [u.to(got[k].device, got[k].dtype) for k, u in exact.upstreams.items()],
    )  # fmt: skip
    pairs = zip(leaves, gradients, exact.gradients, strict=True)
    return (
        {k: _relative_error(v, exact.outputs[k]) for k, v in got.items()},
        {f"d_{leaf}": _relative_error(g, e) for leaf, g, e in pairs},
    )


def _relative_error(got: Tensor, exact: Tensor) -> float:
    if got.shape != exact.shape:
        return math.inf
    error = ((got.detach().cpu().double() - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf


def check(backend: str, device: str, name: str, dtype: torch.dtype, layout: str, sizes: tuple[Size, ...]) -> dict:
    """One row of the report: the worst errors over ``sizes``, and whether they keep the limit."""
    op = OPERATIONS[name][0]
    row: dict[str, Any] = {
        "backend": backend, "device": device, "op": name, "dtype": str(dtype).removeprefix("torch."),
        "layout": layout, "limits": LIMITS[dtype], "outputs": None, "gradients": None, "state": "right", "note": "",
    }  # fmt: skip
    try:
        worst: list[dict[str, float]] = [{}, {}]
        for size in sizes:
            x = inputs(size, dtype, layout, device)
            rows = op == "cross_entropy"
            request = dispatch.request_of_rows(x.logits) if rows else dispatch.request(op, x.features, x.weight)
            try:
                dispatch.choose(request, backend)
            except RuntimeError as refusal:
                return {**row, "state": "not served", "note": str(refusal).partition("serve this call: ")[2]}
            for seen, new in zip(worst, errors(name, x, truth(name, size, dtype), backend), strict=True):
                seen.update({k: max(e, seen.get(k, 0.0)) for k, e in new.items()})
        wrong = {k: e for seen, limit in zip(worst, LIMITS[dtype], strict=True) for k, e in seen.items() if e > limit}
        row["outputs"], row["gradients"] = (_finite(max(seen.values())) for seen in worst)
        if wrong:
            row["state"] = "wrong"
            row["note"] = ", ".join(f"{k} {e:.1e}" for k, e in sorted(wrong.items(), key=lambda item: -item[1]))
    except Exception as error:  # whatever a backend does, the others are still to be checked
        row.update(state="failed", note=_short(error))
    return row


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _short(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def time_call(backend: str, device: str, name: str, dtype: torch.dtype, layout: str) -> tuple[float, int]:
    """Seconds of one forward and backward (the median), and the bytes it must at least move."""
    op, function, leaves = OPERATIONS[name]
    x = inputs(PAPER, dtype, layout, device)
    if device == "cuda":
        many = {k: getattr(x, k).detach() for k in ("features", "logits", "targets")}
        many = {k: v.repeat(TIMES_ON_GPU, *[1] * (v.dim() - 1)) for k, v in many.items()}
        if layout == "channels_last":
            many["features"] = many["features"].contiguous(memory_format=torch.channels_last)
        x = x._replace(**{k: v.requires_grad_(v.is_floating_point()) for k, v in many.items()})
    asked = [getattr(x, leaf) for leaf in leaves]

    def once() -> None:
        out = function(functional, x, backend=backend)
        loss = out.get("loss", out.get("consistency", out.get("maps")))
        assert loss is not None
        torch.autograd.grad(loss, asked, torch.ones_like(loss))

    moved = x.logits if op == "cross_entropy" else x.features
    return _median_seconds(once, device), 2 * moved.nbytes


def _median_seconds(once: Callable[[], object], device: str, least: int = 3, seconds: float = 0.1) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    calls = 10 if device == "cuda" else 1  # between two waits, so that the launches overlap
    for _ in range(2):
        once()
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < 100):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            once()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / calls


def copy_gb_per_s(device: str) -> float:
    """``Tensor.copy_`` between two large buffers: bytes read and written over the median time."""
    source, target = (torch.full((2**26 if device == "cuda" else 2**24,), float(i), device=device) for i in range(2))
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device) / 1e9


def combinations(dtypes: Iterable[torch.dtype]) -> list[tuple[str, torch.dtype, str]]:
    """(operation, dtype, layout), dtype by dtype."""
    return [
        (name, dtype, layout)
        for dtype in dtypes
        for name, (op, *_) in OPERATIONS.items()
        for layout in (LAYOUTS if op != "cross_entropy" else ("rows",))
    ]


def examine(backend: str, seconds: float, progress: Callable[[dict], object] = lambda report: None) -> dict:
    """Check one backend in this process: whether it is there, on which device, and a row for each combination.

    ``progress`` is told the report so far before each part of it, which ``report["at"]`` names.
    """
    end = time.monotonic() + seconds
    report: dict[str, Any] = {
        "backend": backend, "reason": "not known", "load_s": 0.0, "built": [], "rows": [], "copy_gb_per_s": {},
        "unchecked": 0, "at": "loading",
    }  # fmt: skip
    progress(report)
    cached = {p.name for p in cache_files()}
    start = time.monotonic()
    report["reason"] = dispatch.BACKENDS[backend].available().reason
    report["load_s"] = time.monotonic() - start
    report["built"] = sorted({p.name for p in cache_files() if p.suffix == ".so"} - cached)
    if report["reason"] != "available":
        return report
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    devices = {"cpu": ["cpu"], "cuda": ["cuda"], "triton": ["cpu" if interpreted else "cuda"]}.get(backend)
    devices = devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    todo = [(device, *combination) for device in devices for combination in combinations(LIMITS)]
    report["unchecked"] = len(todo)
    for device, name, dtype, layout in todo:
        if time.monotonic() > end:
            break
        report["at"] = f"{name}, {dtype}, {layout} on {device}".replace("torch.", "")
        progress(report)
        if device not in report["copy_gb_per_s"]:
            report["copy_gb_per_s"][device] = None
            with contextlib.suppress(Exception):  # no memory, say: the shares are left out
                report["copy_gb_per_s"][device] = copy_gb_per_s(device)
        row = check(backend, device, name, dtype, layout, (SMALL if interpreted else PAPER, ODD))
        if row["state"] == "right" and not interpreted:
            _add_time(row, dtype, report["copy_gb_per_s"][device])
        report["rows"].append(row)
        report["unchecked"] -= 1
    report["at"] = None
    return report


def _add_time(row: dict, dtype: torch.dtype, copy: float | None) -> None:
    try:
        taken, moved = time_call(row["backend"], row["device"], row["op"], dtype, row["layout"])
    except torch.OutOfMemoryError:
        row["note"] = "not timed: out of memory"
    except Exception as error:  # a large size that fails where the small one was right
        row.update(state="failed", note=f"timing: {_short(error)}")
    else:
        row["ms"], row["gb_per_s"] = 1e3 * taken, moved / taken / 1e9
        row["share_of_copy"] = row["gb_per_s"] / copy if copy else None


def examine_into(backend: str, until: str, file: str) -> None:
    """:func:`examine` until that ``time.time()``, for another process that reads ``file`` whenever it wants to."""

    def save(report: dict) -> None:
        part = Path(f"{file}.part")
        part.write_text(json.dumps(report, allow_nan=False))
        part.replace(file)

    save(examine(backend, float(until) - time.time(), save))


# What the machine is ------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What the results depend on; each entry None where it cannot be found out."""
    found = {
        "rebalfer_kernels": lambda: __version__,
        "os": platform.platform,
        "python": platform.python_version,
        "torch": lambda: torch.__version__,
        "triton": lambda: importlib.import_module("triton").__version__,
        "cuda": lambda: torch.version.cuda,
        "hip": lambda: torch.version.hip,
        "driver": _driver,
        "gpus": _gpus,
        "cpu": _cpu_model,
        "capability": torch.backends.cpu.get_cpu_capability,
        "threads": torch.get_num_threads,
        "compiler": lambda: _first_line(os.environ.get("CXX") or "g++", "--version"),
        "nvcc": lambda: _first_line(_nvcc(), "--version", line=-2),
        "ninja": lambda: _first_line(_ninja(), "--version"),
        "settings": _settings,
    }
    values: dict[str, Any] = {}
    for key, find in found.items():
        values[key] = None
        with contextlib.suppress(Exception):  # a broken installation is what the doctor is called for
            values[key] = find()
    return values


def _first_line(program: str, *arguments: str, line: int = 0) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip().splitlines()[line]


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or str(Path(home, "bin", "nvcc"))


def _ninja() -> str:
    found = shutil.which("ninja")
    return found or str(Path(importlib.import_module("ninja").BIN_DIR, "ninja"))


def _driver() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    version = re.search(r"Kernel Module\D*?([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    return version[1] if version else None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _cpu_model() -> str:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return model[1] if model else platform.machine()


def _settings() -> dict[str, str]:
    wanted = ("REBALFER_", "TRITON_", "TORCH_CUDA_", "OMP_", "MALLOC_")
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CXX")
    return {k: _home(v) for k, v in sorted(os.environ.items()) if k.startswith(wanted) or k in names}


def _home(path: object) -> str:
    """A path without the user's name."""
    return str(path).replace(str(Path.home()), "~")


# The cache ----------------------------------------------------------------------------------------------------------


def cache_files() -> list[Path]:
    """What the native build left in its cache: libraries, its lock, what a killed build left; nothing of others."""
    directory = native.cache_directory()
    if not directory.is_dir():
        return []
    name = re.compile(r"rebalfer_[a-z]+_[0-9a-f]{20}\.so|[a-z]+\.lock")
    files = [p for p in directory.iterdir() if p.is_file() and name.fullmatch(p.name)]
    for work in directory.glob("build-*"):
        if (work / "build.ninja").is_file():
            files += [p for p in work.rglob("*") if p.is_file()]
    return sorted(files)


def clear_cache() -> tuple[int, int]:
    """Remove :func:`cache_files` and the folders that are then empty; how many files and bytes."""
    files = cache_files()
    size = sum(p.stat().st_size for p in files)
    for file in files:
        file.unlink()
    for folder in {*(p.parent for p in files), native.cache_directory()}:
        with contextlib.suppress(OSError):  # something else lies there
            folder.rmdir()
    return len(files), size


# The command --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--backend", choices=list(dispatch.BACKENDS), help="check this one, in this process")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="limit of the whole; what is left is unchecked")
    parser.add_argument("--clear-cache", action="store_true", help="remove the native build's files, check nothing")


def main(options: argparse.Namespace) -> int:
    """Run the command; 1 if anything was wrong, failed, crashed or was left unchecked."""
    if options.clear_cache:
        count, size = clear_cache()
        print(f"removed {count} files, {size / 2**20:.1f} MiB, from {_home(native.cache_directory())}")
        return 0
    files = cache_files()
    result: dict[str, Any] = {
        "environment": environment(),
        "cache": {
            "directory": _home(native.cache_directory()),
            "files": len(files),
            "bytes": sum(p.stat().st_size for p in files),
        },
        "backends": [],
        "right": False,
    }
    print(_heading(result), flush=True)
    names, end = [options.backend] if options.backend else list(dispatch.BACKENDS), time.monotonic() + options.seconds
    for left, name in zip(range(len(names), 0, -1), names, strict=True):
        report = examine(name, options.seconds) if options.backend else examine_apart(name, end, left)
        print(_section(report), flush=True)
        # What was found is there to be read even if this process is ended before it is through.
        result["backends"].append(report)
        result["right"] = left == 1 and all(map(healthy, result["backends"]))
        if options.json:
            options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(_verdict(result))
    return 0 if result["right"] else 1


def examine_apart(backend: str, end: float, remaining: int) -> dict:
    """:func:`examine` in a process of its own; the first backend still to come may use two thirds of the time left."""
    left = end - time.monotonic()
    seconds = left if remaining == 1 else left * 2 / 3
    code = f"import sys; from {__package__} import doctor; doctor.examine_into(*sys.argv[1:])"
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        command = [sys.executable, "-c", code, backend, str(time.time() + seconds - MARGIN_S), str(file)]
        outcome = bounded.run(command, seconds, environment={"PYTHONPATH": path})
        report = {"backend": backend, "reason": "not known", "at": "starting"}
        with contextlib.suppress(OSError):
            report = json.loads(file.read_text())
    return {**report, "failure": outcome.failure, "output": outcome.output[-2000:]}


def healthy(report: dict) -> bool:
    """Nothing wrong, failed, crashed or unchecked; a backend that is absent with its reason is healthy."""
    wrong = any(row["state"] in ("wrong", "failed") for row in report.get("rows", ()))
    return not (report.get("failure") or report.get("unchecked") or wrong)


def _heading(result: dict) -> str:
    lines = []
    for key, value in result["environment"].items():
        if key == "settings":
            value = " ".join(f"{k}={v}" for k, v in (value or {}).items())
        elif key == "gpus":
            value = "; ".join(value or ()) or "none"
        if value is not None and value != "":
            lines.append(f"{key:<17} {value}")
    cache = result["cache"]
    lines.append(f"{'cache':<17} {cache['directory']}: {cache['files']} files, {cache['bytes'] / 2**20:.1f} MiB")
    return "\n".join(lines)


def _section(report: dict) -> str:
    lines = ["", f"{report['backend']}: {report['reason']}{_load(report)}", *_table(report)]
    if report.get("failure"):
        lines.append(f"  {report['failure'].upper()} at {report['at'] or 'the end'}")
    if report.get("failure") or report["reason"] != "available":  # what a compiler said, say
        lines += [f"  | {line}" for line in report.get("output", "").splitlines()[-15:]]
    return "\n".join(lines)


def _verdict(result: dict) -> str:
    rows = [row for report in result["backends"] for row in report.get("rows", ())]
    counted = {s: sum(row["state"] == s for row in rows) for s in ("right", "wrong", "failed")}
    counted["unchecked"] = sum(report.get("unchecked", 0) for report in result["backends"])
    counted["died or stopped"] = sum(bool(report.get("failure")) for report in result["backends"])
    summary = ", ".join(f"{n} {state}" for state, n in counted.items() if n or state == "right")
    return f"\n{'all is well' if result['right'] else 'NOT WELL'}: {summary}"


def _load(report: dict) -> str:
    if report["reason"] != "available" or report["load_s"] < 0.5:
        return ""
    how = "built and loaded" if report["built"] else "loaded"
    return f", {how} in {report['load_s']:.1f} s"


def _table(report: dict) -> list[str]:
    lines = []
    for device in dict.fromkeys(row["device"] for row in report.get("rows", ())):
        copy = report["copy_gb_per_s"].get(device)
        lines.append(
            f"  on {device}" + (f", copy {copy:.0f} GB/s" if copy else "") + f"\n  {'op':<31}{'dtype':<9}{'layout':<14}"
            "outputs (limit)    gradients (limit)        ms   GB/s  copy"
        )
        unserved: dict[str, int] = {}
        for row in report["rows"]:
            if row["device"] != device:
                continue
            if row["state"] == "not served":
                unserved[row["note"]] = unserved.get(row["note"], 0) + 1
                continue
            cells = f"  {row['op']:<31}{row['dtype']:<9}{row['layout']:<14}"
            for key, limit in zip(("outputs", "gradients"), row["limits"], strict=True):
                cells += f"{'-' if row[key] is None else format(row[key], '.1e'):>7} ({limit:.0e})    "
            if "ms" in row:
                share = "" if row["share_of_copy"] is None else f"{row['share_of_copy']:5.0%}"
                cells += f"{row['ms']:9.3f} {row['gb_per_s']:6.3g} {share}"
            flag = "" if row["state"] == "right" else f"{row['state'].upper()}: "
            lines.append(f"{cells} {flag}{row['note']}".rstrip())
        lines += [f"  {count} combinations not served: {reason}" for reason, count in unserved.items()]
    if report.get("unchecked"):
        lines.append(f"  {report['unchecked']} combinations left unchecked")
    return lines
