"""The CPU kernels on each instruction set that this CPU has, chosen by REBALFER_CPU_ISA and no other."""

import os
import re

import pytest
import torch
from support import child
from support.machine import ISAS_HERE

import rebalfer_kernels as rk

pytestmark = pytest.mark.skipif(rk.backends()["cpu"] != "available", reason=rk.backends()["cpu"])

# Values and gradients of every option, dtype, layout and odd shape against the float64 truth.
SUITE = """
import sys, pytest, torch, rebalfer_kernels as rk
assert rk.backends()["cpu"] == "available"
assert torch.ops.rebalfer_kernels.cpu_isa() == sys.argv[1], torch.ops.rebalfer_kernels.cpu_isa()
names = "cpu and (options or shapes or square or rounded_to_nearest)"
sys.exit(pytest.main(["tests/test_head.py", "tests/test_functional.py", "-p", "no:cacheprovider", "-k", names]))
"""
CALL = "import torch, rebalfer_kernels as rk; rk.class_activation_maps(torch.ones(1, 2, 1, 1), torch.ones(2, 2))"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_agreement_on(isa):
    if isa not in ISAS_HERE:
        pytest.skip(f"this CPU has only {', '.join(ISAS_HERE)}")
    if isa == torch.ops.rebalfer_kernels.cpu_isa():
        pytest.skip("the whole suite runs on it here")
    result = child.run("-c", SUITE, isa, timeout=600, REBALFER_CPU_ISA=isa)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (passed,) = re.findall(r"(\d+) passed", result.stdout)
    assert int(passed) > 100


def test_without_a_wish_the_widest_is_chosen():
    assert torch.ops.rebalfer_kernels.cpu_isa() == (os.environ.get("REBALFER_CPU_ISA") or ISAS_HERE[-1])


@pytest.mark.parametrize("isa", [i for i in ("avx512", "avx2") if i not in ISAS_HERE] + ["avx1024"])
def test_an_instruction_set_that_is_not_there_is_refused(isa):
    result = child.run("-c", CALL, REBALFER_CPU_ISA=isa)
    assert result.returncode == 1
    assert f"REBALFER_CPU_ISA: got '{isa}', expected one of this CPU's: " in result.stderr
