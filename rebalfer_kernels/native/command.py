"""``python -m rebalfer_kernels build``."""

from __future__ import annotations

import argparse
import sys

from .library import build
from .recipe import AHEAD
from .tools import BuildError

SUMMARY = "compile native kernels and their autograd into the cache, unless they are stored there or shipped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", nargs="?", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    architectures = f"of cuda: architectures such as 90a, or 90+ptx for later GPUs (default: {' '.join(AHEAD)})"
    parser.add_argument("--arch", nargs="+", default=AHEAD, metavar="ARCH", help=architectures)


def main(options: argparse.Namespace) -> int:
    """Build what was asked for and print where each library is stored; returns the exit status."""
    try:
        print(build(options.part, tuple(options.arch)))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        print(build("autograd"))
    except BuildError as error:
        print(f"without the C++ autograd, small calls take longer: {error}", file=sys.stderr)
    return 0
