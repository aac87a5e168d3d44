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
    commands.add_parser("build", help="compile the native kernels into the cache, if they are not there")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.command == "doctor":
        return doctor.main(options)
    try:
        print(native.build())
    except native.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
