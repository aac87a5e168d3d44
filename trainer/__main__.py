"""``python -m trainer train`` and ``python -m trainer demo``."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys

from .config import DEMO, Config
from .loop import train

_HELP = {
    "data": "synthetic, or imagefolder:PATH with PATH/train/<class> and PATH/val/<class>",
    "backbone": "a timm model with an exact linear CAM",
    "method": "rebalanced, or baseline: plain cross-entropy on one view",
    "decay": "ExponentialLR factor of an epoch",
    "alpha": "mass moved from the label to rare classes, Eq. 8",
    "consistency_weight": "lambda of Eq. 6",
    "beta": "of Eq. 4",
    "train_size": "images of the synthetic training set",
    "backend": "of the fused head; chosen if left out",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("train", help="one run; results under runs/NAME")
    demo = commands.add_parser("demo", help="baseline against rebalanced on synthetic faces, minutes on a CPU")
    for f in dataclasses.fields(Config):
        if f.name in ("backbone_options", "channels_last"):
            continue
        kind = {"str | None": str}.get(str(f.type)) or {"str": str, "int": int, "float": float}[str(f.type)]
        flag = "--" + f.name.replace("_", "-")
        trainer.add_argument(flag, type=kind, default=f.default, help=f"{_HELP.get(f.name, '')} (default {f.default})")
    trainer.add_argument("--channels-last", action="store_true")
    trainer.add_argument("--resume", action="store_true", help="go on from runs/NAME/last.pt")
    demo.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = options.pop("command")
    try:
        if command == "demo":
            configs = [
                dataclasses.replace(DEMO, method=m, name=f"demo-{m}", seed=options["seed"])
                for m in ("baseline", "rebalanced")
            ]
            results = [train(c) for c in configs]
        else:
            resume = options.pop("resume")
            configs = [Config(**options)]
            results = [train(configs[0], resume=resume)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table([c.method for c in configs], results))
    for result in results:
        print(f"pictures: {result['directory']}/confusion.png, {result['directory']}/cam.png")
    return 0


def table(methods: list[str], results: list[dict]) -> str:
    """Accuracies in percent of the last epoch, a column for each run."""

    def row(name: str, count: object, cells: list) -> str:
        return f"{name:<12}{count!s:>8}" + "".join(
            f"{c:>14.2f}" if isinstance(c, float) else f"{c or '-':>14}" for c in cells
        )

    lines = [row("class", "train", methods)]
    for i, name in enumerate(results[0]["classes"]):
        lines.append(row(name, results[0]["counts"][i], [r["per_class"][i] for r in results]))
    lines.append(row("mean", "", [r["mean"] for r in results]))
    lines.append(row("overall", "", [r["overall"] for r in results]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
