"""How many random configurations are tried: 1,000 a backend, always the same, 80 of Triton's interpreter or with
HYPOTHESIS_PROFILE=short, 10 with HYPOTHESIS_PROFILE=few (for Triton on a GPU, where each is compiled);
HYPOTHESIS_PROFILE=long for more.

Every CPU tensor begins as NaN (test_poison.py), so that an output a kernel leaves unwritten is found. PyTorch's
deterministic mode fills only what its dispatcher allocates; this switch of its CPU allocator also reaches the outputs
of the C++ operators. What glibc's malloc hands out, the scratch of the CPU kernels, is NaN too, but for small pieces
that were used before.
"""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from rebalfer_kernels import native, ops, signatures

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.differing_executors]}
settings.register_profile("ci", max_examples=1000, derandomize=True, database=None, **_common)
settings.register_profile("short", parent=settings.get_profile("ci"), max_examples=80)
settings.register_profile("few", parent=settings.get_profile("ci"), max_examples=10)
settings.register_profile("long", max_examples=20000, **_common)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "short" if os.environ.get("TRITON_INTERPRET") == "1" else "ci")
)

_c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
ctypes.c_bool.in_dll(_c10, "FLAGS_caffe2_cpu_allocator_do_junk_fill").value = True

_M_PERTURB = -6
if hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(_M_PERTURB, 0x100)  # not 0, which would turn it off; its low byte inverted is the filling


@pytest.fixture(params=["C++", "Python"])
def autograd(request):
    """The language in which the head's backward is recorded outside of compiled calls."""
    request.getfixturevalue({"C++": "cpp_autograd", "Python": "python_autograd"}[request.param])
    return request.param


@pytest.fixture
def cpp_autograd():
    """Skips where the library cannot be built; test_native.py has a test that it can be where there is a compiler."""
    there, reason = native.load("autograd")
    if not there:
        pytest.skip(f"the C++ autograd is absent: {reason}")


@pytest.fixture
def python_autograd(monkeypatch):
    """The head's backward is recorded in Python, so that what replaces an operator in ``OPERATORS`` is called."""
    monkeypatch.setattr(ops, "recorded", lambda *arguments: None)
    signatures._decided.clear()
    yield
    signatures._decided.clear()
