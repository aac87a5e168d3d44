"""A study: its runs, one after the other or in several processes, and the table of those that are finished."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import checkpoint
from ..config import NOTHING, Checked, UserError, option
from ..run import Busy, Diverged
from ..study import grid, measure, pictures, results, table
from ..study.table import Table
from .train import Result, train

logger = logging.getLogger(__name__)

WHOLE_STATE = ("last.pt", "previous.pt")  #: of a finished run, which best.pt and the log outlive


@dataclass(frozen=True)
class Options(Checked):
    """the runs of a table of the paper, or of your own file, and their table with intervals"""

    study: str = option("", "a name in trainer/studies, such as table1, fig3 or synthetic, or a file", positional=True)
    data: str = option("", "in place of the study's: raf-db:PATH, ferplus:PATH, imagefolder:PATH, synthetic")
    weights: str = option("", "of the backbone, in place of the study's (docs/weights.md)")
    options: dict = option({}, "of every run, in place of the study's, such as '{epochs: 5, optim: {clip: 1}}'")
    seeds: str = option("", "in place of the study's, such as 0,1,2")
    root: str = option("runs", "folder of the runs", changes=NOTHING)
    results: str = option("", "file of what the runs gave; ROOT/STUDY/results.jsonl if left out", changes=NOTHING)
    at_most: int = option(0, "runs by this start; 0: all that are missing", changes=NOTHING, low=0)
    processes: int = option(
        1, "that share the runs, each on a GPU of its own where there are some", changes=NOTHING, low=1
    )
    table: bool = option(False, "only the table of the runs that are finished", changes=NOTHING)

    def run(self) -> int:
        study = grid.read(self.study, data=self.data, weights=self.weights, options=self.options, seeds=self._seeds())
        folder = Path(self.root).expanduser() / study.name
        file = Path(self.results).expanduser() if self.results else folder / "results.jsonl"
        if not self.table:
            if self.processes > 1:
                self._share()
            else:
                self._run(study, folder, file)
        found = table.of(study, results.read(file))
        if not found.lines:
            print(f"no run of {study.name} is finished")
            return 0
        written = self._write(found, folder)
        print(table.text(found))
        print(f"{folder}: {', '.join(written)}; {file}")
        return 0

    def _seeds(self) -> tuple[int, ...]:
        try:
            return tuple(int(seed) for seed in self.seeds.split(",") if seed.strip())
        except ValueError:
            raise UserError(f"seeds: got {self.seeds!r}, expected whole numbers such as 0,1,2") from None

    def _run(self, study: grid.Study, folder: Path, file: Path) -> None:
        """The missing runs but for those that another process holds, which it will finish."""
        runs, started = study.runs(folder), 0
        for run in runs:
            done = {results.identity(record) for record in results.read(file)}
            if run.identity in done:
                continue
            if self.at_most and started == self.at_most:
                break
            left = sum(r.identity not in done for r in runs)
            logger.info("%s: %s, seed %d; %d of %d runs are left", study.name, run.row, run.seed, left, len(runs))
            place = folder / run.config.name
            try:
                result = train(run.config, resume=(place / "last.pt").is_file())
                results.add(file, record(run, result))
            except Busy as busy:
                logger.info("%s", busy)
                continue
            except Diverged as error:
                results.add(file, {**about(run), "failed": str(error)})
            started += 1
            for name in WHOLE_STATE:
                (place / name).unlink(missing_ok=True)

    def _share(self) -> None:
        """As many processes as asked for, each of which takes the runs that no other holds.

        Raises:
            UserError: one of them failed.
        """
        own = [f"--{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if f.name not in NOT_PASSED]
        command = [sys.executable, "-m", "trainer", "study", self.study, *own, f"--options={self.options}"]
        gpus, threads = torch.cuda.device_count(), max(1, torch.get_num_threads() // self.processes)
        children = []
        for i in range(self.processes):
            device = {"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else {}
            children.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads), **device}))
        if bad := [status for status in [child.wait() for child in children] if status]:
            raise UserError(f"processes: {len(bad)} of {self.processes} ended with status {bad[0]}; see above")

    def _write(self, found: Table, folder: Path) -> list[str]:
        """The table as files; their names."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"table.md": table.markdown(found), "table.csv": table.as_csv(found)}
        for name, content in texts.items():
            checkpoint.write(folder / name, content)
        drawn = {"table.png": pictures.accuracies, "curves.png": pictures.curves}
        return [*texts, *(name for name, draw in drawn.items() if draw(folder / name, found))]


NOT_PASSED = ("study", "options", "processes", "table")


def about(run: grid.Run) -> dict:
    """Which run a record is of."""
    return {"row": run.row, "seed": run.seed, "fold": run.fold, "key": run.key}


def record(run: grid.Run, result: Result) -> dict:
    """What a finished run gave, as plain values."""
    name = "test" if "test" in result.used.splits else result.chooser
    last, best = result.history[-1], result.best
    split = result.used.splits[name]
    images = "\n".join([*split.digests, *map(str, split.counts(len(result.classes)))])
    return {
        **about(run),
        "method": run.config.method.name,
        "split": name,
        "classes": list(result.classes),
        "images": hashlib.sha256(images.encode()).hexdigest()[:16],
        "last": last[name],
        "best": {**best[name], "epoch": best["epoch"]},
        "losses": {k: v for k, v in last.items() if isinstance(v, float) and k not in ("seconds", "images_per_s")},
        "view_difference": measure.view_difference(result.method, split),
        "gradient_share": measure.gradient_share(result.method, split),
        "seconds": sum(row["seconds"] for row in result.history),
    }
