"""Compilers for tests that build the native part."""

from pathlib import Path


def unoptimised(directory: Path) -> Path:
    """g++ without optimisation, for the variable CXX: a fifth of the build's time."""
    compiler = directory / "g++-unoptimised"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    return compiler
