"""Every operation of a backend once, forward and backward, at small sizes: what a sanitizer watches.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.every_op cuda triton

Results are compared with float64 as in the doctor; the exit status is 1 if one is wrong.
"""

from __future__ import annotations

import sys

import torch

import rebalfer_kernels as rk
from rebalfer_kernels import doctor

SIZES = (doctor.SMALL, doctor.ODD)


def main(backends: list[str], device: str) -> int:
    """Run the operations of these backends, those that are there; the exit status."""
    rows = []
    for backend in backends:
        reason = rk.backends()[backend]
        print(f"{backend}: {reason}", flush=True)
        if reason != "available":
            continue
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for name, (op, *_) in doctor.OPERATIONS.items():
                for layout in doctor.LAYOUTS if op != "cross_entropy" else ("rows",):
                    rows.append(doctor.check(backend, device, name, dtype, layout, SIZES))
                    row = rows[-1]
                    print(f"  {name}, {row['dtype']}, {layout}: {row['state']} {row['note']}".rstrip(), flush=True)
    return int(any(row["state"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "cuda" if torch.cuda.is_available() else "cpu"))
