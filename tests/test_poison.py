"""Fresh CPU tensors are poisoned in every test (conftest.py), those of the C++ operators included, and so is scratch.

The pattern 0x7fedbeef is a NaN as float32, every second element a NaN as a 16-bit number, and 1.7e308 as float64.
"""

import ctypes
from pathlib import Path

import pytest
import torch

COUNT = 1000


def leave_ones_behind():
    """Memory of the same size that is not NaN and would be handed out next."""
    del [torch.ones(COUNT) for _ in range(8)][:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_python_begin_poisoned(dtype):
    leave_ones_behind()
    fresh = torch.empty(COUNT, dtype=dtype)
    poisoned = fresh > 1e308 if dtype == torch.float64 else fresh.isnan()
    assert poisoned.all() if dtype.itemsize >= 4 else poisoned.reshape(-1, 2).any(1).all()


def test_tensors_of_the_operators_begin_poisoned():
    """The call by which csrc/cpu/tensors.h allocates its outputs."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
    one, handle, data = ctypes.c_int64 * 1, ctypes.c_void_p(), ctypes.c_void_p()
    leave_ones_behind()
    assert not library.aoti_torch_empty_strided(
        ctypes.c_int64(1), one(COUNT), one(1), library.aoti_torch_dtype_float32(), library.aoti_torch_device_type_cpu(),
        0, ctypes.byref(handle),
    )  # fmt: skip
    assert not library.aoti_torch_get_data_ptr(handle, ctypes.byref(data))
    values = torch.tensor((ctypes.c_float * COUNT).from_address(data.value))
    assert not library.aoti_torch_delete_tensor_object(handle)
    assert values.isnan().all()


def test_scratch_begins_poisoned():
    """By the calls of csrc/cpu/tensors.h."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("this C library has no mallopt")
    libc.malloc.restype = libc.calloc.restype = ctypes.c_void_p
    leave_ones_behind()
    poisoned, zeros = libc.malloc(ctypes.c_size_t(4 * COUNT)), libc.calloc(ctypes.c_size_t(COUNT), ctypes.c_size_t(4))
    read = (ctypes.c_float * COUNT).from_address
    assert torch.tensor(read(poisoned)).isnan().all() and not torch.tensor(read(zeros)).any()
    libc.free(ctypes.c_void_p(poisoned)), libc.free(ctypes.c_void_p(zeros))
