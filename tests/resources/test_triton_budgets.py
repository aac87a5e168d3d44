"""Every Triton kernel compiled without a GPU: nothing spilled, tensor cores used, no slow regression."""

import functools
import json
import os
from pathlib import Path

import cubin
import pytest
import torch
import triton_budgets as budgets
from support import child
from support.machine import ROOT

from rebalfer_kernels.triton import tiles

pytest.importorskip("triton")

#: The oldest supported Triton, put here by `make test` beside the installed one.
OLDEST = ROOT / ".venv/triton-3.6"

GOLDEN = json.loads(budgets.GOLDEN.read_text())


@functools.cache
def measured(path: Path | None) -> tuple[str, dict[str, dict[str, int]]]:
    """Version and figures of the installed Triton, or of the one at ``path``."""
    first = os.pathsep.join(filter(None, (path and str(path), os.environ.get("PYTHONPATH"))))
    run = child.run(budgets.__file__, "--print", timeout=600, TRITON_INTERPRET=None, PYTHONPATH=first)
    assert run.returncode == 0, run.stderr[-4000:]
    ((version, figures),) = json.loads(run.stdout).items()
    return version, figures


@pytest.mark.skipif(cubin.missing() is not None, reason=str(cubin.missing()))
@pytest.mark.parametrize("path", [None, OLDEST], ids=["installed", "3.6"])
@pytest.mark.parametrize("arch", budgets.TARGETS)
def test_budgets(arch, path):
    if path is not None and not path.exists():
        pytest.skip(f"no Triton 3.6 at {path.relative_to(ROOT)}: `make test` installs it")
    version, figures = measured(path)
    assert path is None or version.startswith("3.6."), version
    mine = {variant: f for variant, f in figures.items() if variant.split("/")[1] == arch}
    wrong = [f"{v}: {complaint}" for v, f in mine.items() for complaint in complaints(v, f)]
    if version in GOLDEN:
        known = {variant: f for variant, f in GOLDEN[version].items() if variant.split("/")[1] == arch}
        assert mine.keys() == known.keys(), "other kernels than in the golden file: python " + budgets.__file__
        wrong += [f"{v}: {complaint}" for v, f in mine.items() for complaint in regressions(f, known[v])]
    assert not wrong, "\n".join(wrong)


def complaints(variant: str, f: dict[str, int]):
    """What no kernel may do, whatever the golden file says."""
    case, arch, kernel = variant.split("/")
    if f["spilled"]:
        yield f"spilled {f['spilled']}, expected 0"
    if f["shared"] > budgets.TARGETS[arch]:
        yield f"shared {f['shared']}, expected at most {budgets.TARGETS[arch]}"
    on_features = kernel in READ | WRITTEN
    if on_features and "fp32" not in case and not f["mma"]:
        yield "no tensor-core instruction"
    if kernel in READ and not case.endswith("nchw") and not f["loads_16"]:
        yield "no 16-byte load"
    if kernel in WRITTEN and not case.endswith("nchw") and arch.startswith("sm_") and not f["stores_16"]:
        yield "no 16-byte store"


READ = {"head_forward_kernel", "maps_kernel", "cam_grad_kernel", "cam_weight_kernel"}
WRITTEN = {"head_backward_kernel", "cam_backward_kernel"}


def regressions(f: dict[str, int], golden: dict[str, int]):
    """With slack: compilers move a little."""
    for figure, slack in (("registers", 16), ("shared", 4096)):
        if f[figure] > golden[figure] + slack:
            yield f"{figure} {f[figure]}, expected at most {golden[figure]} + {slack} of the golden file"
    for figure in ("mma", "loads_16", "stores_16"):
        if 2 * f[figure] < golden[figure]:
            yield f"{figure} {f[figure]}, expected at least half of the golden file's {golden[figure]}"


def test_a_regression_is_named():
    good = dict(registers=72, spilled=0, mma=8, loads=43, loads_16=24, stores=11, stores_16=0, shared=36352, warps=4)
    variant = "C512-7x7-L7-bf16/sm_90/head_forward_kernel"
    assert list(complaints(variant, good)) == list(regressions(good, good)) == []
    for figure, value, message in (
        ("spilled", 8, "spilled 8"),
        ("shared", 2**18, "shared 262144"),
        ("mma", 0, "no tensor-core"),
        ("loads_16", 0, "no 16-byte load"),
    ):
        assert [c for c in complaints(variant, good | {figure: value}) if c.startswith(message)]
    assert list(regressions(good | {"registers": 89}, good)) == [
        "registers 89, expected at most 72 + 16 of the golden file"
    ]
    assert list(regressions(good | {"loads_16": 11}, good)) == [
        "loads_16 11, expected at least half of the golden file's 24"
    ]


def test_every_row_of_the_tile_table_is_taken_by_a_case(monkeypatch):
    taken, fits = set(), tiles._fits

    def note(row, *problem):
        if fits(row, *problem):
            taken.add(row)
            return True

    monkeypatch.setattr(tiles, "_fits", note)
    for case in budgets.CASES:
        for arch in budgets.TARGETS:
            nchw, dtype = case.layout == "nchw", getattr(torch, case.dtype)
            tiles.policy(tiles.Problem(case.channels, case.side**2, case.classes, not nchw, dtype, arch))
    assert taken == set(tiles.TABLE)


def test_the_page_shows_the_golden_file():
    page = budgets.PAGE.read_text()
    newest = max(GOLDEN, key=lambda v: [int(x) for x in v.split(".")[:2]])
    assert page == budgets.insert(page, budgets.render(GOLDEN[newest], newest))
