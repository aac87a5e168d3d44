"""Where the tests run: the checkout, and the instruction sets of this CPU."""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]

#: Instruction sets of the CPU kernels that this CPU has, the narrowest first.
ISAS_HERE = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "avx2"], "AVX512": ["baseline", "avx2", "avx512"]}.get(
    torch.backends.cpu.get_cpu_capability(), ["baseline"]
)
