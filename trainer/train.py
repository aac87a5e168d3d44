"""One run: everything is checked before an image is read; then data, method, epochs, pictures, table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from . import backbones, compute, data, distributed, loop, metrics, optim, weights
from .config import Config, UserError, as_dict, expect_package, logger, one_line, without_effect
from .data import frozen
from .methods import Method, Task
from .run import Run
from .state import State


@dataclass(frozen=True)
class Result:
    """What a finished run has to say."""

    used: data.Data  #: what it was trained and evaluated on
    history: list[dict]  #: the rows of metrics.jsonl
    method: Method  #: with the weights that the last epoch was evaluated with
    folder: Path

    @property
    def best(self) -> dict:
        """The row of the epoch with the highest mean on the split that chooses."""
        return max(self.history, key=lambda row: row[self.used.chooser]["mean"])

    def columns(self) -> dict[str, dict]:
        """Title -> scores of the last and of the best epoch on each split."""
        last, splits = self.history[-1], self.used.evaluated
        return {f"{name}, last": last[name] for name in splits} | {f"{name}, best": self.best[name] for name in splits}

    def table(self) -> str:
        how = f"images: of train; best: epoch {self.best['epoch']}, chosen by the mean on {self.used.chooser}"
        return f"{metrics.table(self.used.classes, self.used.counts, self.columns())}\n{how}\n{self.folder}"


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, measure: loop.Measure = lambda *_: {}
) -> Result:
    """Run ``config`` into its folder, ``config.output.root/config.name``; ``measure`` adds to the row of each epoch.

    Raises:
        UserError: what the user can mend, by the name of its option. Stopped: a signal came; the state is saved.
    """
    if config.output.tensorboard:
        expect_package("output.tensorboard", "tensorboard")
    device = compute.device_of(config.compute)
    with distributed.processes(device), Run(config, resume=resume, overwrite=overwrite) as run:
        optim.fewest(config)
        compute.try_backend(config.compute, device)
        for name, value in as_dict(config).items():
            logger.info("%s: %s", name, json.dumps(value, ensure_ascii=False))
        for line in without_effect(config):
            logger.info("note: %s", line)
        text = "on %s in %d processes with %d threads; another number of them rounds differently"
        logger.info(text, device, distributed.size(), torch.get_num_threads())
        backbone = backbones.create(config, run.saved and run.saved.get("weights", {}))
        optim.create(config, backbone, device)  # refuses its options while no image is read yet, as the method does
        config.method.build(backbone, Task((2,) * 7)).expect_able(config, distributed.size())
        sets = distributed.first(lambda: data.prepare(config))
        logger.info("%s", data.describe(sets))
        run.about = {"identity": sets.identity(), "chooser": sets.chooser, "notes": list(sets.notes)}
        run.about |= {"weights": backbone.origin, "threads": torch.get_num_threads(), "processes": distributed.size()}
        if run.saved:
            expect_same(run.saved, run.about, config.backbone.weights)
        method = loop.build(config, sets.counts, device, backbone)
        if run.saved:  # its backbone has no weights yet, but kept activations are computed with them
            method.load_state_dict(run.saved["model"])
        used = frozen.kept(config, backbone, sets) if config.augment.versions else sets
        state = loop.fit(config, method, used, run, measure)
        if config.output.pictures:
            draw(config, state, used, sets, run)
    return Result(used, state.history, state.take.evaluated, run.folder)


def expect_same(saved: dict, now: dict, start: str) -> None:
    """Raises :class:`UserError` if the data, or the weights ``start``, are not what the checkpoint was made with; says
    if threads differ."""
    if changed := data.changes(saved["identity"], now["identity"]):
        raise UserError(f"resume: got other data than the checkpoint was made with: {'; '.join(changed)}")
    if weights.changed(start, saved.get("weights", {})):
        raise UserError(f"resume: got backbone.weights {start!r}, which are not those that the run started from")
    for name in ("threads", "processes"):
        if (before := saved.get(name, now[name])) != now[name]:
            note = "note: %d %s, %d before: continues, but results may be rounded differently"
            logger.info(note, now[name], name, before)


def draw(config: Config, state: State, used: data.Data, sets: data.Data, run: Run) -> None:
    """The pictures of the last epoch, evaluated on what was ``used``; none of them may fail a run."""
    name, method, title = sets.reported, state.take.evaluated, f"{config.name}, epoch {state.epoch}"
    matrix = loop.evaluate(method, used.splits[name], len(sets.classes))
    assert matrix is not None, "the last evaluation had finite logits"
    if distributed.rank():
        return
    try:
        from . import figures

        figures.confusion_matrix(run.folder / "confusion.png", matrix, sets.classes, title, name)
        images, labels = sets.splits[name].one_of_each()
        figures.activation_maps(run.folder / "cam.png", method, images, labels, sets.classes, f"{title}, {name} images")
    except Exception as error:
        logger.warning("note: no pictures: %s", one_line(error))
