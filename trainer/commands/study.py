"""A study: its runs, one after the other or in several processes, and the table of those that are finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import NOTHING, Checked, UserError, option
from ..study import files, grid, results, running, table


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
    processes: int = option(1, "that share the runs, each on a GPU if there are some", changes=NOTHING, low=1)
    table: bool = option(False, "only the table of the runs that are finished", changes=NOTHING)

    def run(self) -> None:
        study = grid.read(self.study, data=self.data, weights=self.weights, options=self.options, seeds=self._seeds())
        folder = Path(self.root).expanduser() / study.name
        file = Path(self.results).expanduser() if self.results else folder / "results.jsonl"
        if not self.table and self.processes > 1:
            running.share(self.processes, self.study, vars(self))
        elif not self.table:
            running.run_missing(study, folder, file, self.at_most)
        found = table.of(study, results.read(file))
        if not found.lines:
            print(f"no run of {study.name} is finished")
            return
        written = files.write(folder, found)
        print(table.text(found))
        print(f"{folder}: {', '.join(written)}; {file}")

    def _seeds(self) -> tuple[int, ...]:
        try:
            return tuple(int(seed) for seed in self.seeds.split(",") if seed.strip())
        except ValueError:
            raise UserError(f"seeds: got {self.seeds!r}, expected whole numbers such as 0,1,2") from None
