"""No Triton kernel of the head issues or waits more than the golden file knows, under each of the supported Tritons."""

import functools
import json
import os
from pathlib import Path

import cubin
import issue_budgets
import latency_chains as chains
import pytest
from support import child
from support.machine import ROOT

from bench import model

pytest.importorskip("triton")

HERE = Path(__file__).parent
#: The oldest supported Triton, put here by `make test` beside the installed one.
OLDEST = ROOT / ".venv/triton-3.6"
GOLDEN = json.loads((HERE / "triton_launches.json").read_text())


@functools.cache
def measured(path):
    """Version and figures of the installed Triton, or of the one at ``path``, whose outputs were found right."""
    first = os.pathsep.join(filter(None, (path and str(path), os.environ.get("PYTHONPATH"))))
    script = HERE / "triton_launches.py"
    run = child.run(script, "--print", timeout=900, TRITON_INTERPRET=None, PYTHONPATH=first)
    assert run.returncode == 0, run.stderr[-4000:]
    ((version, figures),) = json.loads(run.stdout).items()
    return version, figures


def complaints(found, golden):
    for name, figures in found["counts"].items():
        for what in ("instructions", "wavefronts"):
            if figures[what] > chains.SLACK * golden["counts"][name][what]:
                yield f"{name}: {figures[what]} {what} a pair, known {golden['counts'][name][what]}"
    for name, kernels in found["launches"].items():
        for figures, known in zip(kernels, golden["launches"][name], strict=True):
            yield from chains.regressions(f"{name}, {figures['kernel']}", figures, known)


@pytest.mark.skipif(cubin.missing() is not None, reason=str(cubin.missing()))
@pytest.mark.parametrize("path", [None, OLDEST], ids=["installed", "3.6"])
def test_no_kernel_issues_or_waits_more_than_the_golden_file_knows(path):
    if path is not None and not path.exists():
        pytest.skip(f"no Triton 3.6 at {path.relative_to(ROOT)}: `make test` installs it")
    version, found = measured(path)
    if version not in GOLDEN:
        pytest.skip(f"Triton {version} is not in the golden file, which has {', '.join(GOLDEN)}")
    wrong = list(complaints(found, GOLDEN[version]))
    assert not wrong, f"Triton {version}:\n" + "\n".join(wrong)


def test_the_golden_file_reads_and_writes_the_features_once():
    for of in GOLDEN.values():
        for name, figures in of["counts"].items():
            *_, channels, _, _, layout, dtype = name.split()
            problem = issue_budgets.Problem(int(channels[1:]), 7, 7, layout, dtype)
            assert figures["features"] == problem.features_bytes, name
            assert sum(figures["kinds"].values()) == figures["instructions"], name


def test_a_regression_is_named():
    count = {"instructions": 1000, "wavefronts": 50}
    good = {"counts": {"forward C512": count}, "launches": {}}
    assert list(complaints(good, good)) == []
    worse = {"counts": {"forward C512": {"instructions": 1031, "wavefronts": 50}}, "launches": {}}
    assert list(complaints(worse, good)) == ["forward C512: 1031 instructions a pair, known 1000"]


def test_a_kernel_with_many_registers_or_few_blocks_is_compared_with_the_best_of_other_tiles():
    for version, of in GOLDEN.items():
        crowded = {name for name, (head, *_) in of["launches"].items() if not model.roomy(head)}
        assert crowded == set(of["alternatives"]), version
        for name, other in of["alternatives"].items():
            assert model.roomy(other) and len(other["tiles"]) == {"forward": 3, "backward": 2}[name.split()[0]]
