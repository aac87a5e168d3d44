"""The CUDA kernels stay within what they are known to take on sm_80, sm_90a and sm_100a; no GPU is needed."""

import re
import subprocess

import cubin
import cuda_compiled
import pytest

pytestmark = pytest.mark.skipif(cuda_compiled.missing() is not None, reason=str(cuda_compiled.missing()))

REGISTER_SLACK = 8  # what another version of the compiler may make of the same source


def instances():
    for name, by_architecture in cuda_compiled.figures().items():
        for architecture, taken in by_architecture.items():
            yield name, architecture, taken


def test_every_kernel_is_known_on_every_architecture():
    assert list(cuda_compiled.figures()) == list(cuda_compiled.golden())
    for name, by_architecture in cuda_compiled.figures().items():
        assert list(by_architecture) == list(cuda_compiled.SHARED), name


def test_nothing_is_spilled_and_no_figure_grew():
    wrong = []
    for name, architecture, taken in instances():
        known = cuda_compiled.golden()[name][architecture]
        wrong += [
            f"{name} on {architecture}: {what} {taken[what]}, must be 0"
            for what in ("stack", "local", "local accesses")
            if taken[what]
        ]
        limits = {"registers": known["registers"] + REGISTER_SLACK}
        limits |= {what: known[what] for what in ("static shared", "dynamic shared") if what in known}
        wrong += [
            f"{name} on {architecture}: {what} {taken[what]}, at most {limit}"
            for what, limit in limits.items()
            if taken[what] > limit
        ]
        if taken.get("blocks", 0) < known.get("blocks", 0):
            wrong.append(f"{name} on {architecture}: {taken['blocks']} blocks fit, known {known['blocks']}")
    assert not wrong, "\n".join(wrong)


def test_tensor_cores_bulk_copies_and_16_byte_accesses_are_there():
    wrong = []
    for name, architecture, taken in instances():
        needed = []
        if re.match(r"(forward|backward)_kernel<(BFloat16|Half)", name):
            needed.append("mma")
        if name.startswith("forward_kernel"):
            needed.append("wide loads")
            if re.match(r"\w+<\w+, false, ", name) and architecture != "sm_80":
                needed.append("bulk copies")
        if name.startswith("backward_kernel"):
            needed.append("wide stores")
        wrong += [f"{name} on {architecture}: no {what}" for what in needed if not taken[what]]
    assert not wrong, "\n".join(wrong)


def test_float32_is_never_computed_in_tf32():
    assert not [key for *key, taken in instances() if "<float" in key[0] and taken["mma"]]


def test_the_documentation_shows_the_golden_figures():
    assert cuda_compiled.PAGE.read_text() == cuda_compiled.page(cuda_compiled.golden())


def test_the_library_made_ahead_also_serves_later_gpus():
    command = [cubin.tool("cuobjdump"), "--list-ptx", cuda_compiled.library()]
    listed = set(re.findall(r"\.(sm_\w+)\.ptx", subprocess.run(command, capture_output=True, text=True).stdout))
    assert listed == {"sm_90"}
