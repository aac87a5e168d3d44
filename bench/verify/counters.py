"""A forward and a backward of the benchmark's sizes under Nsight Compute: what each kernel moved and waited for.

    ncu … python -m bench.verify.counters cuda

with the arguments of :func:`profiled`.
"""

from __future__ import annotations

import argparse
import functools
import time

import torch

from .. import baselines
from ..cases import Case, problem
from ..measure import once

#: The paper's batch and a large one.
CASES = [
    Case(n, c, layout, torch.bfloat16, "cuda")
    for n, c in ((32, 512), (512, 2048))
    for layout in ("nchw", "channels_last")
]
STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "no_instruction", "not_selected", "short_scoreboard", "wait",
)  # fmt: skip
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_bytes.sum",
    "smsp__inst_executed.sum",
    "sm__inst_executed.avg.per_cycle_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__cycles_elapsed.avg.per_second",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    *(f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio" for reason in STALLS),
)


def profiled(ncu: str) -> list[str]:
    """The beginning of the command: these metrics of what :func:`main` marks, as CSV; clocks stay as they are."""
    settings = ["--profile-from-start", "off", "--clock-control", "none", "--target-processes", "application-only"]
    return [ncu, *settings, "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]


def main(backend: str, seconds: float) -> None:
    """Each case once to compile and once under the profiler, until the time is up."""
    end = time.monotonic() + seconds
    for case in CASES:
        if time.monotonic() > end:
            break
        run = functools.partial(once, functools.partial(baselines.ours, backend=backend), problem(case))
        run()
        torch.cuda.synchronize()
        print(case.name, flush=True)
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.verify.counters", description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=baselines.fused_backends("cuda"))
    parser.add_argument("--seconds", type=float, default=600.0, help="in all")
    options = parser.parse_args()
    main(options.backend, options.seconds)
