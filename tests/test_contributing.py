"""What CONTRIBUTING.md says, done in a copy of the package: a new backend, a new transform; its tables are complete."""

import re
import shutil
from pathlib import Path

import pytest
from support import child
from support.machine import ROOT

import rebalfer_kernels as rk

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
PARTS = ("rebalfer_kernels", "csrc", "bench", "trainer", "tests", "docs")

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
explained = rk.explain(features, weight)
assert (explained.backend, explained.passed_over) == ("echo", {}), explained
assert explained.bytes_moved > explained.bytes_floor, explained
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
for backend in {"reference", "cpu"} & {name for name, state in rk.backends().items() if state == "available"}:
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


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "rebalfer_kernels", tmp_path / "rebalfer_kernels")
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")  # the same sources: what the cache holds serves the copy
    return tmp_path


def touched(copy: Path) -> list[str]:
    """The files of the package that a copy does not share with the checkout."""
    files = [p.relative_to(copy) for p in (copy / "rebalfer_kernels").rglob("*.py")]
    return [str(p) for p in files if not (ROOT / p).exists() or (ROOT / p).read_bytes() != (copy / p).read_bytes()]


def run(copy: Path, code: str) -> None:
    result = child.run(
        "-c", CHECK + code, timeout=300, cwd=copy, PYTHONPATH=copy, REBALFER_BACKEND=None, TRITON_INTERPRET=None
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
    run(copy, USE_OF_ANTITRANSPOSE)
    assert touched(copy) == ["rebalfer_kernels/reference.py"]


def test_every_environment_variable_is_in_the_table():
    table = GUIDE.partition("## Environment variables")[2].partition("\n## ")[0]
    asked = r"""(?:environ(?:\.get)?[\[(]|getenv\()["']((?:REBALFER|TRITON|HYPOTHESIS|CUDA|CXX|XDG)\w*)["']"""
    sources = [p for part in PARTS for p in (ROOT / part).rglob("*") if p.suffix in (".py", ".h", ".cpp")]
    used = {name for p in sources for name in re.findall(asked, p.read_text())}
    assert used and used == set(re.findall(r"`([A-Z_]+)`", table))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/design.md", "docs/triton.md"])
def test_the_files_that_a_page_names_exist(page):
    named = re.findall(rf"(?<![\w/])(?:(?:{'|'.join(PARTS)})/[\w/.]*\w|[A-Z]\w+\.md)", (ROOT / page).read_text())
    assert named and [name for name in named if not (ROOT / name).exists()] == []
