"""Every injected fault of tests/mutants applies to the sources as they are; ``make mutants`` injects them."""

import subprocess
import sys

from support.machine import ROOT


def test_every_row_applies():
    command = [sys.executable, "tests/mutants", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
