"""No CUDA kernel issues more instructions than the golden file knows; the counts are those of an execution."""

import functools
import json
import re

import cuda_compiled
import issue_budgets as budgets
import pytest
import torch

pytestmark = pytest.mark.skipif(cuda_compiled.missing() is not None, reason=str(cuda_compiled.missing()))

SLACK = 1.02  # what another version of the compiler may make of the same source

GOLDEN = json.loads(budgets.GOLDEN.read_text())
#: Those measured here; `python tests/resources/issue_budgets.py` measures all.
PROBLEMS = [p for p in budgets.PROBLEMS if p.dtype == "bfloat16" or (p.side, p.classes) == (7, 7)]


@functools.cache
def measured():
    return budgets.measure_all(PROBLEMS)


def complaints(found, golden):
    for name, figures in found.items():
        for what in ("instructions", "wavefronts"):
            if figures[what] > SLACK * golden[name][what]:
                yield f"{name}: {figures[what]} {what} a pair, known {golden[name][what]}"


def test_no_kernel_issues_more_than_the_golden_file_knows():
    assert measured().keys() <= GOLDEN.keys(), "not all problems are in the golden file: python " + budgets.__file__
    wrong = list(complaints(measured(), GOLDEN))
    assert not wrong, "\n".join(wrong)


def test_a_regression_is_named():
    good = {"forward C512": {"instructions": 1000, "wavefronts": 50}}
    assert list(complaints(good, good)) == []
    worse = {"forward C512": {"instructions": 1021, "wavefronts": 50}}
    assert list(complaints(worse, good)) == ["forward C512: 1021 instructions a pair, known 1000"]


def test_the_features_are_read_once_and_their_gradient_is_written_once():
    """Twice where the weight is not detached and the shared memory does not hold the pair."""
    for problem in PROBLEMS:
        for way in ("forward", "backward", "forward, not detached,"):
            if figures := measured().get(f"{way} {problem.name}"):
                times = figures["features"] / problem.features_bytes
                assert times == 1 or (times == 2 and "not" in way), f"{way} {problem.name}: {times}"


def test_the_kinds_add_up():
    for name, figures in measured().items():
        assert sum(figures["kinds"].values()) == figures["instructions"], name


def test_a_kernel_that_may_start_early_waits_before_it_touches_memory():
    memory = re.compile(r"(LDG|LDGSTS|LD|STG|ST|UBLKCP|ATOMG|RED)\b")
    early = {
        name: code
        for name, code in budgets.listings().items()
        if re.search("(forward|backward|cam_weight)_kernel", name)
    }
    assert len(early) == 84
    for name, code in early.items():
        texts = [instruction.text for instruction in code]
        assert texts.index("ACQBULK") < next(i for i, text in enumerate(texts) if memory.match(text)), name
        assert texts.count("PREEXIT") == ("backward_kernel" not in name), name  # lets the backward start


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("layout", budgets.kernels.LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_emulator_of_the_source_counts_the_same(dtype, layout, detach):
    """Whole launches of both machines: outputs, mma, and the bytes that asynchronous copies and wide stores move."""
    problem = budgets.Problem(200, 7, 11, layout, dtype)
    head = budgets.Head(problem, detach=detach)
    kernel, run = head.forward(whole=True)
    head.check_forward()
    saved, counters = budgets.kernels.forward(
        head.case, cluster=head.cluster, stages=head.stages, maps=False, detach=detach
    )
    for name in saved:
        torch.testing.assert_close(head.saved[name], saved[name], rtol=1e-5, atol=1e-6, equal_nan=True)
    agree(kernel, run, counters)
    kernel, run = head.backward(whole=True)
    head.check_backward()
    ups = [torch.ones(()), None, None, None]
    gradients, counters = budgets.kernels.backward(head.case, saved, ups, detach=detach)
    for name in gradients:
        torch.testing.assert_close(head.gradients[name], gradients[name], rtol=1e-2, atol=1e-4)
    agree(kernel, run, counters)


def agree(kernel, run, counters):
    code = budgets.listings()[kernel]

    def total(opcode, column):
        return sum(row[column] for i, row in zip(code, run.counts.tolist(), strict=True) if i.text.startswith(opcode))

    lanes, read, written = (budgets.COUNTS.index(x) for x in ("lanes", "read", "written"))
    assert total("HMMA", lanes) == 32 * counters["mma"]  # one that its guard turns off is issued too
    assert total("UBLKCP", read) == counters["bulk_copies"]
    assert total("LDGSTS", read) == counters["cp_async_copies"]
    assert total("STG.E.NA.128", written) == counters["streamed_stores"]


def test_the_mma_do_the_work_that_maps_and_means_need():
    """Forward: both views' maps, with a high and a low part of the weight, and 16 rows of an identity for the means."""
    for layout in budgets.kernels.LAYOUTS:
        figures = measured()[f"forward C512 8x8 L16 {layout} bfloat16"]
        assert figures["kinds"]["mma"] * 16 * 8 * 16 == 2 * 64 * 512 * (16 * 2 + 16)
