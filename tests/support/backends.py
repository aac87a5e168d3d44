"""The backends that a test runs over: where their tensors live, which dtypes they serve, why one is skipped here.

    @pytest.mark.parametrize("backend", BACKENDS)                        every backend
    @pytest.mark.parametrize(("backend", "dtype"), with_dtypes(...))     every backend with each of its dtypes
    @pytest.mark.parametrize("backend", serving(torch.float64))          the backends that serve a dtype

A backend that is not available, or that needs a GPU where there is none, is skipped with its own reason.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

import rebalfer_kernels as rk
from rebalfer_kernels.backend import BACKENDS as OF_PACKAGE

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    name: str
    device: str  #: type of the device that its tensors live on
    dtypes: tuple[torch.dtype, ...]  #: of the features

    @property
    def widest(self) -> torch.dtype:
        """The dtype in which laws are checked."""
        return self.dtypes[0]

    def reaches(self, classes: int, positions: int) -> bool:
        """Whether its kernels are made for so many classes and places of a map."""
        limits = OF_PACKAGE[self.name].limits
        return classes <= limits.get("classes", classes) and positions <= limits.get("positions", positions)

    @property
    def rtol(self) -> float:
        """Relative tolerance of two results that differ only in rounding, in the widest dtype."""
        return 1e-7 if self.widest == torch.float64 else 1e-4


#: Triton's interpreter, chosen before Triton is imported, runs the kernels on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_ALL = (
    Backend("reference", "cpu", (torch.float64, torch.float32, *SIXTEEN_BIT)),
    Backend("cpu", "cpu", (torch.float64, torch.float32, *SIXTEEN_BIT)),
    Backend("triton", "cpu" if INTERPRETED else "cuda", (torch.float32, *SIXTEEN_BIT)),
    Backend("cuda", "cuda", (torch.float32, *SIXTEEN_BIT)),
)
_REASONS = rk.backends()


def _param(backend: Backend, *more: object):
    reason = _REASONS[backend.name]
    marks = [pytest.mark.skipif(reason != "available", reason=f"{backend.name}: {reason}")]
    if backend.device == "cuda":
        marks.append(pytest.mark.gpu)
    names = [backend.name, *(str(x).removeprefix("torch.") for x in more)]
    return pytest.param(backend, *more, marks=marks, id="-".join(names))


BACKENDS = [_param(b) for b in _ALL]
FUSED = [_param(b) for b in _ALL if b.name != "reference"]
GPU = [_param(b) for b in _ALL if b.device == "cuda"]


def serving(dtype: torch.dtype):
    return [_param(b) for b in _ALL if dtype in b.dtypes]


def with_dtypes(*dtypes: torch.dtype):
    return [_param(b, dtype) for b in _ALL for dtype in dtypes if dtype in b.dtypes]
