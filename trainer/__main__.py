"""Train a classifier with re-balanced attention consistency and smooth labels, or plain cross-entropy beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from .config import DEMO, METHODS, Config
from .loop import Result, cams, train


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, 130 after Ctrl-C."""
    options = vars(_parser().parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.perf_counter()
    command = options.pop("command")
    try:
        if command == "cams":
            cams(options["run"], options["out"], options["classes"])
            return 0
        root, resume = options.pop("root"), options.pop("resume", False)
        if command == "demo":
            configs = [dataclasses.replace(DEMO, method=m, name=f"demo-{m}", **options) for m in reversed(METHODS)]
        else:
            configs = [Config(**options)]
        results = [train(c, resume=resume, root=root) for c in configs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table([c.method for c in configs], results))
    print(f"pictures ({time.perf_counter() - started:.0f} s in all):")
    for result in results:
        print(f"  {result.directory / 'confusion.png'}\n  {result.directory / 'cam.png'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("train", help="one run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    demo = commands.add_parser("demo", help="both methods on synthetic faces, minutes on two CPU cores")
    draw = commands.add_parser("cams", help="a picture of a run's class activation maps")
    kinds: dict[str, Any] = {"str": str, "str | None": str, "int": int, "float": float, "dict": json.loads}
    for f in dataclasses.fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), str(f.type)
        if kind == "bool":
            run.add_argument(flag, action="store_true", help=f.metadata["help"])
        else:
            default = {} if kind == "dict" else f.default
            run.add_argument(flag, type=kinds[kind], default=default, help=f.metadata["help"])
    run.add_argument("--resume", action="store_true", help="continue from runs/NAME/last.pt, as if never interrupted")
    demo.add_argument("--seed", type=int, default=DEMO.seed)
    demo.add_argument("--epochs", type=int, default=DEMO.epochs)
    draw.add_argument("run", type=Path, help="folder of the run, such as runs/demo-rebalanced")
    draw.add_argument("out", type=Path, help="the picture, a .png")
    draw.add_argument("--classes", nargs="+", metavar="CLASS", help="rows of the picture; default: every class")
    for command in (run, demo):
        command.add_argument("--root", type=Path, default="runs", help="folder of the runs")
    return parser


def table(methods: list[str], results: list[Result]) -> str:
    """Test accuracies in percent, a column for each run: the last epoch, and the best one by its mean accuracy."""

    def row(name: str, count: object, cells: list) -> str:
        texts = (f"{c:.2f}" if isinstance(c, float) else str(c or "-") for c in cells)
        return f"{name:<18}{count!s:>7}" + "".join(f"{t:>13}" for t in texts)

    first, last = results[0], [r.history[-1] for r in results]
    best = [max(r.history, key=lambda h: h["mean"]) for r in results]
    lines = [row("accuracy in %", "images", methods)]
    for i, name in enumerate(first.classes):
        lines.append(row(name, first.counts[i], [h["per_class"][i] for h in last]))
    for key in ("mean", "overall"):
        lines.append(row(key, sum(first.counts) if key == "overall" else "", [h[key] for h in last]))
    for key in ("mean", "overall"):
        lines.append(row(f"{key}, best epoch", "", [h[key] for h in best]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
