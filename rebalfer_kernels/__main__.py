"""``python -m rebalfer_kernels doctor``: check this machine. ``build``: compile the native kernels ahead of time."""

from __future__ import annotations

import argparse
import logging
import sys

from . import doctor, native


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 for a wrong result or a failed build."""
    parser = argparse.ArgumentParser(prog="python -m rebalfer_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add_arguments(commands.add_parser("doctor", help=doctor.SUMMARY, description=doctor.SUMMARY))
    native.add_arguments(commands.add_parser("build", help=native.SUMMARY, description=native.SUMMARY))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return doctor.main(options) if options.command == "doctor" else native.main(options)


if __name__ == "__main__":
    sys.exit(main())
