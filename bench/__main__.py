"""Measure the head's loss against other ways to compute it, and write docs/benchmark.md.

    python -m bench all                        every measurement of a CPU and the report; --list prints the commands
    python -m bench op                         every case, into bench/results/; taskset picks the cores
    python -m bench op --memory reused         the same where no page is fresh
    python -m bench op --set curves            along N, C and L; --set all: other maps, classes, dtypes, operations too
    python -m bench op --isa avx2              a CPU with AVX-512 held to AVX2
    python -m bench op --cases C512 --seconds 5 --out DIR
    python -m bench op --device cuda           the GPU's cases, in CUDA graphs and call by call
    python -m bench memory                     which of the two a training loop sees, by its page faults
    python -m bench step                       a whole training step, and a whole run extrapolated from it
    python -m bench methods                    a step of every method of the trainer, in turns
    python -m bench gpu-check right --out DIR  what a GPU must show; fast, deep: two more parts, see bench/verify
    python -m bench tune --cases C512          search the Triton tiles of GPU cases, propose rows of triton_tiles.TABLE
    python -m bench budget                     instructions that the GPU kernels issue, counted without a GPU
    python -m bench model                      docs/gpu-model.md: how long they should take, and what they wait for
    python -m bench compare A B                what got slower beyond the noise from one result, or folder, to another
    python -m bench report                     docs/benchmark.md and .html, pictures, the README's line (--check: only
                                               compare)
    python -m pytest tests/bench/test_micro.py -o addopts= --benchmark-only     the public functions, one by one;
                                               --benchmark-autosave, later --benchmark-compare, compares two runs

What memory costs decides much on a CPU, so malloc's rules are fixed, in one of two ways. "fresh": a tensor of 128 KiB
and more gets pages of its own from the system and gives them back (glibc's threshold when a process begins, held
there). "reused": nothing is given back, so that pages are rarely touched for the first time. Left to itself, glibc
switches between the two strategies depending on earlier frees.

Not measured: bytes moved by compiled contenders, and on a GPU by any.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import memory

if TYPE_CHECKING:  # PyTorch is imported only after what must be set before
    from .cases import Case
    from .clocks import Clock

RESULTS = Path(__file__).with_name("results")
#: Instruction set -> the variables that hold our kernels, PyTorch's own and compiled ones, MKL and oneDNN to it. What
#: torch.compile has cached for another set would be taken and give wrong results, so it has a cache of its own.
ISAS = {
    "avx2": {
        "REBALFER_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_avx2")),
    }
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 for stale documents, disturbed times, a slowdown; 2 for refusals."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    op = commands.add_parser("op", help="time the loss, forward and backward")
    op.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    op.add_argument(
        "--cases", default="", metavar="SUBSTRING", help="those whose name contains it, as in N32-C512-nchw"
    )
    op.add_argument("--set", choices=("short", "curves", "all"), default="short", help="of cases; see bench/cases.py")
    op.add_argument("--more", action="store_true", help="max-autotune and a gradient in the forward, too")
    op.add_argument("--seconds", type=float, default=20.0, help="of timing for each case")
    op.add_argument("--memory", choices=memory.RULES, default="fresh", help="of a CPU; see python -m bench --help")
    op.add_argument("--isa", choices=ISAS, help="hold a CPU, ours and PyTorch's kernels, to an older instruction set")
    op.add_argument("--limit", type=float, default=3600.0, help="seconds in all; later cases are left out")
    step = commands.add_parser("step", help="time a whole training step")
    methods = commands.add_parser("methods", help="time a training step of every method of the trainer")
    for command in (step, methods):
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        command.add_argument("--seconds", type=float, default=60.0, help="of timing in all")
    for command in (op, step, methods):
        command.add_argument(
            "--allow-load",
            action="store_true",
            help="measure a CPU beside other programs; the report uses only undisturbed results",
        )
    faults = commands.add_parser("memory", help="which kind of memory a training loop on this CPU sees")
    faults.add_argument("--count", action="store_true", help="only count, in this process, with malloc as it is")
    for command in (step, methods, faults):
        command.add_argument("--backbone", default="resnet18", help="a timm model")
        command.add_argument("--amp", choices=("off", "bf16", "fp16"), help="bf16 on a GPU, else off")
        command.add_argument("--image-size", type=int, default=224)
        command.add_argument("--batch-size", type=int, default=32, help="images; each comes with its twin")
    for command in (op, step, methods, faults):
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of the result, else bench/results")
        command.add_argument(
            "--rehearse",
            action="store_true",
            help="try the GPU's program out on a CPU: small sizes, and no time means anything",
        )
    check = commands.add_parser("gpu-check", help="a part of what a GPU must show, bounded in time")
    check.add_argument("part", choices=("right", "fast", "deep"), help="complete in itself, 9 minutes at most")
    check.add_argument("--out", type=Path, required=True, help="folder of the results, at most 8 files")
    check.add_argument("--seconds", type=float, default=540.0, help="in all")
    check.add_argument("--only", nargs="+", metavar="PIECE", help="such as memcheck-cuda, with the builds they need")
    check.add_argument("--rehearse", action="store_true", help="try the check out on a CPU, with its kernels")
    tune = commands.add_parser("tune", help="search the tiles of the Triton kernels on a GPU")
    tune.add_argument(
        "--cases", default="", metavar="SUBSTRING", help="those whose name contains it, as in N32-C512-nchw"
    )
    tune.add_argument("--seconds", type=float, default=3600.0, help="in all; what is the best by then is proposed")
    report = commands.add_parser("report", help="write docs/benchmark.md, .html, their pictures, the README's line")
    report.add_argument("--check", action="store_true", help="fail if one differs, write nothing")
    compare = commands.add_parser("compare", help="what changed between two results; fails where ours got slower")
    compare.add_argument("before", type=Path, metavar="A", help="a file that op or step wrote, or a folder of them")
    compare.add_argument("after", type=Path, metavar="B")
    budget = commands.add_parser("budget", help="instructions that the GPU kernels issue, against the goals")
    budget.add_argument(
        "--kernel", metavar="NAME", help='where those of one go, as of "forward C512 7x7 L7 nchw bfloat16"'
    )
    budget.add_argument("--only", default="", metavar="SUBSTRING", help="rows whose name contains it")
    model = commands.add_parser("model", help="write docs/gpu-model.md, times predicted for a GPU")
    model.add_argument("--check", action="store_true", help="fail if it differs, write nothing")
    whole = commands.add_parser("all", help="every measurement of a CPU, one after the other, then the report")
    whole.add_argument("--list", action="store_true", help="only print the commands")
    scale = commands.add_parser("scale", help="write docs/scale.md, a plan for several GPUs")
    scale.add_argument("--check", action="store_true", help="fail if it differs, write nothing")
    options = parser.parse_args(arguments)
    command_of = {
        "op": _op, "memory": _memory, "step": _step, "methods": _methods, "gpu-check": _gpu_check, "tune": _tune,
        "budget": _budget, "model": _model, "report": _report, "scale": _scale,
        "compare": _compare, "all": _all,
    }  # fmt: skip
    try:
        return command_of[options.command](options)
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2


class Refused(Exception):
    """What was asked cannot be measured here."""


def _op(options: argparse.Namespace) -> int:
    kind = "rehearsal" if options.rehearse else options.device
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts and would print at each start
    if kind == "cpu":
        _settle(options.memory, ISAS.get(options.isa, {}))

    from . import goals, measure, op
    from .cases import REHEARSED

    cases = REHEARSED if options.rehearse else _cases(options.device, options.cases, options.set)
    if kind == "cpu" and not options.allow_load:
        _refuse_load(measure.FOREIGN_LIMIT)
    rules = options.memory if kind == "cpu" else None
    clock, out = _clock(kind), options.out
    result, path = op.run(
        cases, options.seconds, options.limit, out, kind=kind, clock=clock, memory=rules, of=options.set,
        contenders=functools.partial(op.contenders, more=options.more),
    )  # fmt: skip
    print(*map(goals.summary, result["goals"]), path, sep="\n")
    disturbed = kind == "cpu" and not result["quiet"]
    return int(bool(result["rejected"] or result["errors"] or disturbed))


def _step(options: argparse.Namespace) -> int:
    from . import step

    result, path = step.run(**_training(options))
    print(path)
    disturbed = result["kind"] == "cpu" and not result["quiet"]
    return int(bool(result["rejected"] or result["errors"] or disturbed))


def _methods(options: argparse.Namespace) -> int:
    from . import methods

    result, path = methods.run(**_training(options))
    print(path)
    return int(result["kind"] == "cpu" and not result["quiet"])


def _training(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of what times training steps."""
    import torch

    from . import measure, step

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not options.rehearse else "cpu"
    kind = "rehearsal" if options.rehearse else device
    if kind == "cpu" and not options.allow_load:
        _refuse_load(measure.FOREIGN_LIMIT)
    config = step.measured(options.backbone, options.image_size, options.batch_size, options.amp, device)
    return {
        "config": step.REHEARSAL if options.rehearse else config,
        "device": device,
        "seconds": options.seconds,
        "directory": options.out,
        "clock": _clock(kind),
        "kind": kind,
    }


def _memory(options: argparse.Namespace) -> int:
    from . import step

    config = step.measured(options.backbone, options.image_size, options.batch_size, options.amp, "cpu")
    kind = "cpu"
    if options.rehearse:
        config, kind = step.REHEARSAL, "rehearsal"
    if options.count:
        print(memory.head_faults(config))
        return 0
    again = ["--backbone", options.backbone, "--image-size", str(options.image_size)]
    again += ["--batch-size", str(options.batch_size), *(["--amp", options.amp] if options.amp else [])]
    result, path = memory.run(config, [*again, *(["--rehearse"] if options.rehearse else [])], options.out, kind=kind)
    print(f"page faults of the head in a step: {result['faults']}; memory is {result['seen']}", path, sep="\n")
    return 0


#: Every measurement of a CPU that the report shows.
ALL = (
    "op --more", "op --more --memory reused", "memory", "op --memory reused --set curves --seconds 5",
    "op --memory reused --set all --seconds 5 --limit 7200",
    "step --backbone resnet18 --image-size 112 --batch-size 16 --seconds 240",
    "step --backbone mobilenetv1_100 --image-size 112 --batch-size 16 --seconds 120",
    "methods --backbone resnet18 --image-size 112 --batch-size 16 --seconds 240", "report",
)  # fmt: skip


def _all(options: argparse.Namespace) -> int:
    """Goes on after a command that fails, as others may not; the worst exit status."""
    worst = 0
    for command in ALL:
        print(f"python -m bench {command}", flush=True)
        if not options.list:
            worst = max(
                worst, subprocess.run([sys.executable, "-m", "bench", *command.split()], check=False).returncode
            )
    return worst


def _gpu_check(options: argparse.Namespace) -> int:
    from .verify import gpu_check

    return gpu_check.main(options.part, options.out, options.seconds, options.rehearse, options.only)


def _budget(options: argparse.Namespace) -> int:
    from . import budget

    return budget.main(options.kernel, options.only)


def _model(options: argparse.Namespace) -> int:
    from . import model

    return _page(model.PAGE, model.page(), options)


def _scale(options: argparse.Namespace) -> int:
    from . import scale

    return _page(scale.PAGE, scale.page(), options)


def _page(path: Path, text: str, options: argparse.Namespace) -> int:
    """Write a page that differs; or, to ``--check``, name it and return 1."""
    differs = not path.exists() or path.read_text() != text
    if differs and options.check:
        print(f"error: {path.name} is not what `python -m bench {options.command}` writes", file=sys.stderr)
    elif differs:
        path.write_text(text)
    return int(options.check and differs)


def _tune(options: argparse.Namespace) -> int:
    from . import tune

    clock, start = _clock("cuda"), time.monotonic()
    cases = _cases("cuda", options.cases)
    for i, case in enumerate(cases):
        now = time.monotonic()
        if now < start + options.seconds:  # each case may use as much as the later ones
            print(tune.main(case, clock, now + (start + options.seconds - now) / (len(cases) - i)), flush=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    from . import report

    return report.main(options.check)


def _compare(options: argparse.Namespace) -> int:
    from . import compare

    try:
        return compare.main(options.before, options.after)
    except ValueError as error:
        raise Refused(str(error)) from None


def _cases(device: str, substring: str, of: str = "short") -> list[Case]:
    from .cases import SETS

    cases = [case for case in SETS[of](device) if substring in case.name]
    if not cases:
        raise Refused(f"no case of {device!r} has {substring!r} in its name")
    return cases


def _clock(kind: str) -> Clock:
    import torch

    from .clocks import CudaClock, WallClock

    if kind == "rehearsal":
        torch.set_num_threads(1)  # such small sizes are only slower with more
    if kind != "cuda":
        return WallClock()
    if not torch.cuda.is_available():
        raise Refused("PyTorch sees no GPU here")
    return CudaClock()


def _refuse_load(limit: float) -> None:
    from .measure import LoadMeter

    meter = LoadMeter()
    time.sleep(1)
    if (foreign := meter.foreign_cores()) > limit:
        raise Refused(f"other programs keep {foreign:.2f} cores busy, so no time would be right (--allow-load)")


def _settle(rules: str, isa: dict[str, str]) -> None:
    """Start again, if need be, with what a process begins with: pinned threads, malloc's rules, an instruction set."""
    wanted = {
        **isa,
        "OMP_PROC_BIND": "true",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "KINETO_LOG_LEVEL": "99",  # the profiler counts allocations here and would print at each start
        **memory.RULES[rules],
    }
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], {**memory.variables(rules), **wanted})


if __name__ == "__main__":
    sys.exit(main())
