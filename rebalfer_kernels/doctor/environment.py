"""What the machine is: versions, devices, tools, settings, and how fast it copies memory."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import native
from ..version import __version__
from .timing import median_seconds

_COPIED_BYTES = 2**28  #: 256 MiB, several times the largest last-level cache of a GPU and of most CPUs


def environment() -> dict[str, Any]:
    """What the results depend on; an entry is None where it cannot be found out.

    >>> environment()["torch"] == torch.__version__
    True
    """
    find = {
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
        "compiler": lambda: _line_of_output(*native.find_compiler(), "--version"),
        "nvcc": lambda: _line_of_output(native.find_nvcc(), "--version", line=-2),
        "ninja": lambda: _line_of_output(native.find_ninja(), "--version"),
        "settings": _settings,
        "cache": _cache,
    }
    return {key: _or_none(found) for key, found in find.items()}


def copy_gb_per_s(device: str) -> float:
    """Copy bandwidth of ``device`` ("cpu" or "cuda") in GB/s: bytes read and written by ``Tensor.copy_``, over the
    median time of a copy between two buffers that are larger than the caches."""
    source, target = (torch.full((_COPIED_BYTES // 4,), float(i), device=device) for i in range(2))
    return 2 * _COPIED_BYTES / median_seconds(lambda: target.copy_(source), device, least=5, seconds=0.5) / 1e9


def without_home(path: object) -> str:
    """A path or a text with paths, "~" in place of the home directory, which has the user's name."""
    return str(path).replace(os.path.expanduser("~") + "/", "~/")


def _or_none(find: Any) -> Any:
    with contextlib.suppress(Exception):  # a broken installation is what the doctor is called for
        return find()
    return None


def _line_of_output(*command: str, line: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    return done.stdout.strip().splitlines()[line]


def _driver() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return _line_of_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
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
    prefixes = ("REBALFER_", "TRITON_", "TORCH_CUDA_", "OMP_", "KMP_", "MALLOC_", "ATEN_", "MKL_", "ONEDNN_")
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CXX", "GLIBC_TUNABLES", "LD_PRELOAD")
    chosen = {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes) or k in names}
    return {k: without_home(v) for k, v in chosen.items()}


def _cache() -> str:
    files = native.cache_files()
    size = sum(p.stat().st_size for p in files)
    return f"{without_home(native.cache_directory())}: {len(files)} files, {size / 2**20:.1f} MiB"
