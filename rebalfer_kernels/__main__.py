"""``python -m rebalfer_kernels build``: compile the native kernels ahead of time."""

from __future__ import annotations

import argparse
import logging
import sys

from . import native


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rebalfer_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    native.add_arguments(commands.add_parser("build", help=native.SUMMARY, description=native.SUMMARY))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return native.main(options)


if __name__ == "__main__":
    sys.exit(main())
