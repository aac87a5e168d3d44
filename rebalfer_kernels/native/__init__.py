"""Building csrc with ninja and loading it, ahead (``python -m rebalfer_kernels build``) or on first use.

Three libraries by one recipe: ``cpu`` and ``cuda`` against PyTorch's stable ABI, for torch 2.11 and later;
``autograd``, a Python module that needs more than that, for one version of torch and of Python. A library's name has a
hash of its sources and flags, so that nothing stale is ever loaded, but not the compiler nor, with the stable ABI, the
version of torch, so that what was built elsewhere is. It is looked for in the package, which ``make wheel`` ships with
the libraries inside, then in a cache. Processes that build at the same moment take turns at a lock, and the finished
file appears by an atomic rename. With ``REBALFER_BUILD=0`` nothing is built, only what is stored is loaded.
"""

from .cache import cache_directory, cache_files, clear_cache
from .command import SUMMARY, add_arguments, main
from .library import autograd, build, load
from .recipe import AHEAD, ISAS, SOURCES, cpu_recipe
from .tools import BuildError, ToolMissing, find_compiler, find_ninja, find_nvcc

__all__ = [
    "AHEAD",
    "ISAS",
    "SOURCES",
    "SUMMARY",
    "BuildError",
    "ToolMissing",
    "add_arguments",
    "autograd",
    "build",
    "cache_directory",
    "cache_files",
    "clear_cache",
    "cpu_recipe",
    "find_compiler",
    "find_ninja",
    "find_nvcc",
    "load",
    "main",
]
