"""What CONTRIBUTING.md says, done in a copy of the package: a new backend, a new transform; its tables are complete."""

import ast
import io
import re
import shutil
import subprocess
import tokenize
from pathlib import Path

import pytest
import timm
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


METHOD = """
\"\"\"Cross-entropy times (1 - p_y)^gamma.\"\"\"
from dataclasses import dataclass
from ..config import option
from . import MethodOptions
from .tables import TableMethod

@dataclass(frozen=True)
class Options(MethodOptions):
    \"\"\"focal loss\"\"\"

    gamma: float = option(2.0, "power of the focus", low=0)

    def build(self, backbone, task):
        method = Focal(backbone, task)
        method.gamma = self.gamma
        return method

class Focal(TableMethod):
    def losses(self, batch):
        log_p = self(batch.view()).log_softmax(1).gather(1, batch.labels[:, None])
        return {"loss": -((1 - log_p.exp()) ** self.gamma * log_p).mean()}
"""
DATA = """
\"\"\"Stripes, upright or not.\"\"\"
from dataclasses import dataclass
import torch
from ..config import option
from . import Data, DataOptions, Split

@dataclass(frozen=True)
class Options(DataOptions):
    \"\"\"stripes that stand or lie\"\"\"

    each: int = option(4, "images of each class")

    def read(self, image_size, seed):
        lying = (torch.arange(image_size)[:, None] % 8 < 4).expand(-1, image_size).byte() * 255
        images = torch.stack([lying.T, lying]).repeat(self.each, 1, 1)[..., None]
        split = Split(images, torch.arange(2).repeat(self.each))
        return Data(("standing", "lying"), {"train": split, "test": split})
"""
COMMAND = """
\"\"\"Number of parameters.\"\"\"
from dataclasses import dataclass
from ..config import option
from . import load

@dataclass(frozen=True)
class Options:
    \"\"\"parameters of a run's network\"\"\"

    checkpoint: str = option("", "a run's folder", positional=True)

    def run(self):
        print(sum(p.numel() for p in load(self.checkpoint, "cpu").method.parameters()))
"""
STUDY = """
title = "Focus"
preset = "demo"
seeds = [1]
compare = "cross-entropy"
[options]
image_size = 32
batch_size = 10
epochs = 1
data = { name = "stripes", each = 5 }
backbone = { name = "resnet10t", options = { channels = [8, 8, 8, 16], stem_width = 8 } }
compute = { device = "cpu", backend = "reference" }
[[rows]]
label = "cross-entropy"
method = "baseline"
[[rows]]
label = "focal"
method = "focal"
grid = { "method.gamma" = [0, 1.5] }
"""
USE_OF_THE_TRAINER = """
import json
from trainer.__main__ import main
small = '{"channels": [8, 8, 8, 16], "stem_width": 8}'
flags = ["--method=focal", "--method.gamma=3", "--data=stripes", "--data.each=5", "--name=a", "--output.root=runs"]
flags += ["--backbone=resnet10t", f"--backbone.options={small}", "--image-size=32", "--batch-size=10", "--epochs=1"]
flags += ["--no-output.pictures", "--compute.device=cpu", "--compute.backend=reference"]
assert main(["train", *flags]) == 0
config = json.loads(open("runs/a/config.json").read())
assert config["method"] == {"name": "focal", "gamma": 3.0} and config["data"] == {"name": "stripes", "each": 5}
row = json.loads(open("runs/a/metrics.jsonl").read())
assert row["loss"] > 0 and len(row["test"]["per_class"]) == 2
assert main(["train", "--method=focal", "--method.gamma=-1"]) == 2
assert main(["parameters", "runs/a"]) == 0
assert main(["study", "own.toml", "--root=runs"]) == 0
table = [line.split(",") for line in open("runs/own/table.csv").read().splitlines()]
assert [line[0] for line in table[1:]] == ["cross-entropy", '"focal', '"focal'], table
losses = [json.loads(line)["losses"]["loss"] for line in open("runs/own/results.jsonl")]
assert abs(losses[0] - losses[1]) < 1e-5 and losses[2] < 0.9 * losses[1], losses  # gamma 0 is cross-entropy
assert main(["train", "--help", "--method=focal", "--data=stripes"]) == 0
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


def test_a_method_a_data_set_and_a_command_are_one_file_each(copy):
    shutil.copytree(ROOT / "trainer", copy / "trainer")
    for name, text in (("methods/focal", METHOD), ("data/stripes", DATA), ("commands/parameters", COMMAND)):
        (copy / f"trainer/{name}.py").write_text(text)
    (copy / "own.toml").write_text(STUDY)
    result = child.run(
        "-c", USE_OF_THE_TRAINER, cwd=copy, PYTHONPATH=copy, REBALFER_BACKEND="reference", OMP_NUM_THREADS="1"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    network = timm.create_model("resnet10t", num_classes=2, channels=[8, 8, 8, 16], stem_width=8)
    assert str(sum(p.numel() for p in network.parameters())) in result.stdout.splitlines()
    for text in ("--method.gamma FLOAT", "power of the focus", "--data.each INT", "focal loss"):
        assert text in result.stdout
    assert "method.gamma: got -1.0, expected a finite number >= 0" in result.stderr


def lines_of_code(file: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    text = file.read_text()
    words = [
        t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in NO_CODE and t.string.strip()
    ]
    lines = {line for t in words for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            lines -= set(range(body[0].lineno, body[0].end_lineno + 1))
    return len(lines)


NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def test_nothing_that_is_built_or_left_behind_is_tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository here")
    tracked = [Path(name) for name in listed.stdout.split("\0") if name]
    folders = {path.parts[0] for path in tracked if len(path.parts) > 1}
    assert folders == {*PARTS, ".ci", ".github"}
    assert not [path for path in tracked if path.suffix in (".so", ".o", ".pyc", ".pt", ".npy", ".lock")]


def test_the_loop_is_read_at_a_glance():
    assert len((ROOT / "trainer/loop.py").read_text().splitlines()) <= 150


def test_the_trainer_is_read_in_one_sitting(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""Text\n\nof two lines."""\n\n# why\nx = """a\nb"""  # c\n\ndef f():\n    "doc"\n    return 1\n'
    )
    assert lines_of_code(tmp_path / "a.py") == 4  # x = ... of two lines, def, return
    files = [f for f in (ROOT / "trainer").rglob("*.py") if f.parent.name not in ("data", "methods", "study")]
    assert sum(map(lines_of_code, files)) < 2000


def test_every_environment_variable_is_in_the_table():
    table = GUIDE.partition("## Environment variables")[2].partition("\n## ")[0]
    asked = r"""(?:environ(?:\.get)?[\[(]|getenv\()["']((?:REBALFER|TRITON|HYPOTHESIS|CUDA|CXX|XDG)\w*)["']"""
    sources = [p for part in PARTS for p in (ROOT / part).rglob("*") if p.suffix in (".py", ".h", ".cpp")]
    used = {name for p in sources for name in re.findall(asked, p.read_text())}
    assert used and used == set(re.findall(r"`([A-Z_]+)`", table))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/design.md", "docs/triton.md"])
def test_the_files_that_a_page_names_exist(page):
    named = re.findall(rf"(?<![\w/])(?:(?:{'|'.join(PARTS)})/[\w/.-]*\w|[A-Z]\w+\.md)", (ROOT / page).read_text())
    assert named and [name for name in named if not (ROOT / name).exists()] == []
