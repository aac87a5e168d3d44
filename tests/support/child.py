"""Python in a process of its own, in the checkout, with this process's environment but for the variables given.

child.run("-c", code, REBALFER_BACKEND="cpu", TRITON_INTERPRET=None)    None removes a variable
"""

import os
import subprocess
import sys
from pathlib import Path

from .machine import ROOT


def run(*arguments: str | Path, timeout: float = 100, cwd: Path = ROOT, **variables: str | Path | None):
    """Its exit status and output, a subprocess.CompletedProcess; ends it after ``timeout`` seconds."""
    process = start(*arguments, cwd=cwd, **variables)
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def start(*arguments: str | Path, cwd: Path = ROOT, **variables: str | Path | None):
    """The process while it runs, a subprocess.Popen whose standard output and error are pipes of text."""
    environment = {k: str(v) for k, v in (os.environ | variables).items() if v is not None}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
