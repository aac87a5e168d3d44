"""What CONTRIBUTING.md says, done in a copy of the package: a new backend, a new transform; and its tables are whole."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.machine import ROOT

import rebalfer_kernels as rk

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = ("README.md", "CONTRIBUTING.md", "docs/design.md")

# The cpu backend's operators under another name, preferred to all others.
ECHO = """
import functools
from . import Backend
from .cpu import BACKEND as CPU

CALLS = []

def counted(name, operator):
    def implementation(*arguments):
        CALLS.append(name)
        return operator(*arguments)
    return implementation

class Echo(Backend):
    name = "echo"
    preference = 1

    def devices(self):
        return ("cpu",)

    @functools.cache
    def available(self):
        from .. import ops
        verdict = CPU.available()
        for name, operator in ops.OPERATORS["cpu"].items() if verdict.ok else ():
            ops.register(self.name, name, counted(name, operator), "CPU")
        return verdict

    def feature_reads(self, *, maps, cam_weight_gradient):
        return 1

BACKEND = Echo()
"""
USE_OF_ECHO = """
from rebalfer_kernels.backend.echo import CALLS
assert rk.backends()["echo"] == "available", rk.backends()
told = rk.explain(features, weight)
assert (told.backend, told.passed_over) == ("echo", {}) and told.bytes_moved > told.bytes_floor, told
assert "cpu" == rk.explain(features, weight, backend="cpu").backend
check("hflip", lambda a: a.flip(-1), backend=None)
assert CALLS == ["head_forward", "head_backward"], CALLS
try:
    rk.class_activation_maps(features, weight, backend="none")
except ValueError as error:
    assert "'echo'" in str(error), error
"""

# The one symmetry of the square that is left: transposition across the other diagonal, which undoes itself.
ROW = '    "antitranspose": (lambda x: x.rot90(2, (-2, -1)).mT, lambda a: a.rot90(2, (-2, -1)).mT),\n'
USE_OF_ANTITRANSPOSE = """
for backend in ("reference", BACKEND):
    check("antitranspose", lambda a: a.flip((-1, -2)).transpose(-1, -2), backend=backend)
try:
    rk.attention_consistency(features[..., :2], weight, v, transform="antitranspose")
except ValueError as error:
    assert "expected a square map" in str(error), error
"""

# Value and gradients of the consistency against plain PyTorch, in which `undo` is T.
CHECK = """
import torch, rebalfer_kernels as rk
random = torch.Generator().manual_seed(0)
features, weight = torch.randn(6, 5, 3, 3, generator=random), torch.randn(4, 5, generator=random)
v = torch.rand(4, generator=random)

def check(transform, undo, backend):
    f, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    got = rk.attention_consistency(f, w, v, transform=transform, detach_cam_weight=False, backend=backend)
    grads = torch.autograd.grad(got, (f, w))
    maps = (w[None, :, :, None, None] * f[:, None]).sum(2)
    expected = ((v[:, None, None] * (maps[:3] - undo(maps[3:]))) ** 2).mean()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, (f, w)))
"""


def touched(copy: Path) -> list[str]:
    """The files of the package that a copy has not, or has otherwise."""
    files = [p.relative_to(copy) for p in (copy / "rebalfer_kernels").rglob("*.py")]
    before = {p: (ROOT / p).read_bytes() if (ROOT / p).exists() else None for p in files}
    return [str(p) for p in files if (copy / p).read_bytes() != before[p]]


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "rebalfer_kernels", tmp_path / "rebalfer_kernels")
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")  # the same sources: what the cache holds serves the copy
    return tmp_path


def run(copy: Path, code: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("REBALFER_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, "-c", CHECK + code]
    result = subprocess.run(
        command, cwd=copy, env=environment | {"PYTHONPATH": str(copy)}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_backend_is_one_file(copy):
    if rk.backends()["cpu"] != "available":
        pytest.skip(f"the new backend calls the operators of cpu: {rk.backends()['cpu']}")
    (copy / "rebalfer_kernels/backend/echo.py").write_text(ECHO)
    run(copy, USE_OF_ECHO)
    assert touched(copy) == ["rebalfer_kernels/backend/echo.py"]


def test_a_transform_is_one_row(copy):
    file = copy / "rebalfer_kernels/reference.py"
    before, row, after = file.read_text().partition('    "transpose": ')
    file.write_text(before + ROW + row + after)
    backend = "cpu" if rk.backends()["cpu"] == "available" else "reference"
    run(copy, f"BACKEND = {backend!r}\n" + USE_OF_ANTITRANSPOSE)
    assert touched(copy) == ["rebalfer_kernels/reference.py"]
    assert (
        len(file.read_text().splitlines()) == len((ROOT / "rebalfer_kernels/reference.py").read_text().splitlines()) + 1
    )


def test_every_environment_variable_is_in_the_table():
    table = GUIDE.partition("## Environment variables")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([A-Z_]+)`", table))
    asked = re.compile(
        r"""(?:environ(?:\.get)?[\[(]|getenv\()["']((?:REBALFER|TRITON|HYPOTHESIS|CUDA|CXX|XDG)\w*)["']"""
    )
    sources = [
        p for part in ("rebalfer_kernels", "csrc", "bench", "trainer", "tests") for p in (ROOT / part).rglob("*")
    ]
    used = {name for p in sources if p.suffix in (".py", ".cpp", ".h") for name in asked.findall(p.read_text())}
    assert used and listed == used


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    top = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("."))
    named = set(re.findall(rf"(?:\b(?:{top})/[\w/.]*|\b[A-Z]\w+\.md)(?<!\.)", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
