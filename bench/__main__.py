"""Measure the head's loss against other ways to compute it, and write the README's numbers.

    python -m bench op                         every case, into bench/results/; taskset picks the cores
    python -m bench op --memory reused         the same where no page is fresh
    python -m bench op --cases C512 --seconds 5 --out DIR
    python -m bench op --device cuda           the GPU's cases, in CUDA graphs and call by call
    python -m bench step                       a whole training step, and a whole run extrapolated from it
    python -m bench gpu-check --out DIR        all that a GPU must show: build, doctor, tests, op, step, sanitizers
    python -m bench tune --cases C512          search the Triton tiles of GPU cases, propose rows of triton_tiles.TABLE
    python -m bench report                     the README's section from the newest results (--check: only compare)
    python -m pytest tests/bench -o addopts= --benchmark-only      micro-benchmarks of the public functions

What memory costs decides much on a CPU, so malloc's rules are fixed, in one of two ways. "fresh": a tensor of 128 KiB
and more gets pages of its own from the system and gives them back (glibc's threshold when a process begins, held
there). "reused": nothing is given back, so that pages are rarely touched for the first time. Left alone, glibc moves
between the two by what was freed before.

Not measured: bytes moved by compiled contenders, and on a GPU by any.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

MEMORY = {
    "fresh": {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)},
    "reused": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 for a stale README or disturbed times, 2 for what was refused."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    op = commands.add_parser("op", help="time the loss, forward and backward")
    op.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    op.add_argument("--cases", default="", metavar="SUBSTRING", help="those whose name has it, as in N32-C512-nchw")
    op.add_argument("--seconds", type=float, default=20.0, help="of timing for each case")
    op.add_argument("--memory", choices=MEMORY, default="fresh", help="of a CPU; see python -m bench --help")
    op.add_argument("--limit", type=float, default=3600.0, help="seconds in all, on a GPU; later cases are left out")
    op.add_argument(
        "--allow-load",
        action="store_true",
        help="go on beside other programs; the README takes only undisturbed results",
    )
    step = commands.add_parser("step", help="time a whole training step")
    step.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    step.add_argument("--seconds", type=float, default=60.0, help="of timing in all")
    step.add_argument("--image-size", type=int, default=224)
    step.add_argument("--batch-size", type=int, default=32, help="images; each comes with its twin")
    for command in (op, step):
        command.add_argument("--out", type=Path, help="folder of the result, bench/results unless given")
        command.add_argument(
            "--rehearse",
            action="store_true",
            help="try the GPU's program out on a CPU: one small size, and no time means anything",
        )
    check = commands.add_parser("gpu-check", help="all that a GPU must show, bounded in time")
    check.add_argument("--out", type=Path, required=True, help="folder of the results, at most 8 files")
    check.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the steps")
    check.add_argument("--seconds", type=float, default=480.0, help="in all")
    check.add_argument("--only", nargs="+", metavar="STEP", help='such as "build cuda" memcheck racecheck')
    tune = commands.add_parser("tune", help="search the tiles of the Triton kernels on a GPU")
    tune.add_argument("--cases", default="", metavar="SUBSTRING", help="those whose name has it, as in N32-C512-nchw")
    report = commands.add_parser("report", help="write the README's section")
    report.add_argument("--check", action="store_true", help="fail if the README differs, write nothing")
    options = parser.parse_args(arguments)
    if options.command == "report":
        return _report(options.check)
    if options.command == "gpu-check":
        from . import gpu_check

        return gpu_check.main(options.out, options.device, options.seconds, options.only)
    if options.command == "tune":
        return _tune(options.cases)
    if options.command == "step":
        return _step(options)
    return _gpu_op(options) if options.device == "cuda" or options.rehearse else _op(options)


def _gpu_op(options: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts launches and would print at each start
    import torch

    from . import baselines, gpu_op, gpu_timing, op
    from .cases import CASES, Case

    if options.rehearse:
        torch.set_num_threads(1)  # so small, they are only slower with more
        cases = [Case(2, 32, layout, torch.float32) for layout in ("channels_last", "nchw")]
        clock, contenders, kind = gpu_timing.WallClock(), lambda: baselines.FORMULATIONS, "rehearsal"
    else:
        cases = [c for c in CASES if c.device == "cuda" and options.cases in c.name]
        clock, contenders, kind = gpu_timing.CudaClock(), gpu_op.contenders, "cuda"
        if not cases:
            print(f"error: no case of 'cuda' has {options.cases!r} in its name", file=sys.stderr)
            return 2
        if not torch.cuda.is_available():
            print("error: PyTorch sees no GPU here", file=sys.stderr)
            return 2
    result, path = gpu_op.run(
        cases, options.seconds, options.limit, options.out or op.RESULTS, clock=clock, contenders=contenders, kind=kind
    )
    print(path)
    return 1 if result["rejected"] or result["errors"] else 0


def _tune(substring: str) -> int:
    import torch

    from . import tune
    from .cases import CASES

    if not torch.cuda.is_available():
        print("error: PyTorch sees no GPU here, and tiles can be compared on one alone", file=sys.stderr)
        return 2
    for case in (c for c in CASES if c.device == "cuda" and substring in c.name):
        print(tune.main(case), flush=True)
    return 0


def _step(options: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from . import gpu_timing, op, step

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not options.rehearse else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    config = step.REHEARSAL if options.rehearse else step.MEASURED
    if options.rehearse:
        torch.set_num_threads(1)
    else:
        config = dataclasses.replace(config, image_size=options.image_size, batch_size=options.batch_size)
    clock = gpu_timing.CudaClock() if device == "cuda" else gpu_timing.WallClock()
    kind = "rehearsal" if options.rehearse else device
    result, path = step.run(config, device, options.seconds, options.out or op.RESULTS, clock=clock, kind=kind)
    print(path)
    return 1 if result["rejected"] or result["errors"] else 0


def _op(options: argparse.Namespace) -> int:
    _settle(options.memory)
    from . import op, timing
    from .cases import CASES

    cases = [c for c in CASES if c.device == options.device and options.cases in c.name]
    if not cases:
        print(f"error: no case of {options.device!r} has {options.cases!r} in its name", file=sys.stderr)
        return 2
    meter = timing.LoadMeter()
    time.sleep(1)
    foreign = meter.foreign_cores()
    print({key: value for key, value in op.environment().items() if key != "backends"}, f"foreign cores {foreign:.2f}")
    if foreign > op.FOREIGN_LIMIT and not options.allow_load:
        print("error: other programs are running here, so no time would be right (--allow-load)", file=sys.stderr)
        return 2
    result = op.run(cases, options.seconds, options.memory)
    for goal in result["goals"]:
        figure = "-" if goal["figure"] is None else f"{goal['figure']:.2f}"
        print(f"{'met' if goal['met'] else 'NOT'}  {goal['goal']}: {figure}, {goal['sense']} {goal['bound']:g}")
    print(op.write(result, options.out or op.RESULTS))
    return 0 if result["quiet"] and not result["rejected"] else 1


def _report(check: bool) -> int:
    from . import report

    text = report.README.read_text()
    wanted = report.insert(text, report.render(report.newest(), report.newest_gpu()))
    if check:
        if text != wanted:
            print("error: README.md is not what `python -m bench report` writes", file=sys.stderr)
        return int(text != wanted)
    report.README.write_text(wanted)
    return 0


def _settle(memory: str) -> None:
    """Start again, if need be, with what must be set before a process begins: pinned threads, and malloc's rules."""
    wanted = {
        "OMP_PROC_BIND": "true",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "KINETO_LOG_LEVEL": "99",  # the profiler counts allocations here and would print at each start
        **MEMORY[memory],
    }
    if not wanted.items() <= os.environ.items():
        others = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], {**others, **wanted})


if __name__ == "__main__":
    sys.exit(main())
