"""Studies: their files, their runs, which resume, and the statistics of their tables."""

import csv
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from support import child, runs
from torch import nn

from trainer import data, loop, presets
from trainer.__main__ import main
from trainer.commands import load
from trainer.config import Backbone, UserError, found, from_dict
from trainer.data import Split
from trainer.data.views import views
from trainer.run import Run
from trainer.study import grid, measure, pictures, results, running, table

TINY = {
    "epochs": 2,
    "image_size": 32,
    "batch_size": 8,
    "backbone": {"options": runs.TINY},
    "data": {"name": "synthetic", "train_size": 24, "test_size": 16},
    "compute": {"device": "cpu", "backend": "reference"},
}
INLINE = re.sub(r'"(\w+)": ', r"\1 = ", json.dumps(TINY))  # TOML
FILE = f"""
title = "Three methods"
preset = "demo"
seeds = [3, 5]
compare = "plain"
options = {INLINE}

[[rows]]
label = "plain"
method = "baseline"
paper = {{ overall = 87.42, mean = 78.53 }}

[[rows]]
label = "RAC"
method = "rac"
grid = {{ "method.consistency_weight" = [0.5, 2.0] }}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "three.toml"
    path.write_text(FILE)
    return path


NONE = {"materialize_grads": True}
COUNTS, CPU = (9, 5, 6, 8, 4, 7, 9), torch.device("cpu")
LABELS = ["plain", "RAC, consistency_weight 0.5", "RAC, consistency_weight 2.0"]


def study(file, root, *options):
    return main(["study", str(file), f"--root={root}", *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    (root / "three.toml").write_text(FILE)
    assert study(root / "three.toml", root / "runs") == 0
    return root


def records(root):
    return results.read(root / "runs" / "three" / "results.jsonl")


def test_every_study_that_comes_with_the_trainer_can_be_run():
    assert {f"table{n}" for n in range(1, 8)} | {"fig3", "faces", "strength", "synthetic"} <= set(grid.found())
    for name in grid.found():
        chosen = grid.read(name)
        every = chosen.runs()
        assert len(chosen.seeds) >= 5 and len(every) == len(chosen.rows) * len(chosen.seeds)
        assert len({run.key for run in every}) == len({run.config.name for run in every}) == len(every)
    methods = {run.config.method.name for run in grid.read("synthetic").runs()}
    assert methods == set(found("methods")) - {"rac_transform", "rac_ablation"}


@pytest.mark.parametrize("file", sorted((child.ROOT / "bench/results/study").glob("*.jsonl")), ids=lambda f: f.stem)
def test_the_records_that_are_kept_are_of_runs_that_their_study_still_wants(file):
    """A change of an option's name, default or meaning for the results would orphan days of training."""
    wanted = {run.identity for run in grid.read(file.stem).runs()}
    assert [results.identity(r) for r in results.read(file) if results.identity(r) not in wanted] == []


def test_rows_differ_only_in_what_they_say(file):
    chosen = grid.read(str(file))
    assert [row.label for row in chosen.rows] == LABELS
    every = chosen.runs()
    assert [(r.row, r.seed) for r in every[:4]] == [(row.label, 3) for row in chosen.rows] + [("plain", 5)]
    assert [r.config.method.name for r in every[:3]] == ["baseline", "rac", "rac"]
    assert [r.config.method.consistency_weight for r in every[1:3]] == [0.5, 2.0]
    for run in every:
        assert (run.config.epochs, run.config.batch_size, run.config.seed) == (2, 8, run.seed)
        assert run.config.optim == presets.demo().optim and run.config.augment == presets.demo().augment
    # A row of the preset's own method starts from that method's defaults, not from the preset's.
    own = grid.read("synthetic").runs()
    assert {r.config.method.consistency_weight for r in own if r.row == "RAC + RSL"} == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({'title = "Three methods"': "titel = 1"}, "study.titel: got an unknown entry, expected one of about"),
        ({'method = "rac"': 'method = "rak"'}, "method: got 'rak', expected one of baseline"),
        ({'"method.consistency_weight"': '"method.lambda"'}, "lambda: got an unknown option"),
        ({"[0.5, 2.0]": "[0.5, -2.0]"}, "method.consistency_weight: got -2.0, expected a finite number >= 0"),
        ({'compare = "plain"': 'compare = "other"'}, "compare: got 'other', expected one of plain"),
        ({'label = "RAC"\n': 'label = "plain"\n', "grid = ": "# "}, "rows.label: got 'plain' twice"),
        ({"seeds = [3, 5]": "seeds = [3, 3]"}, r"seeds: got \(3, 3\), expected different whole numbers"),
        ({'preset = "demo"': 'preset = "dem"'}, "preset: got 'dem', expected one of paper"),
        ({'preset = "demo"': 'preset = "demo"\nfolds = true'}, "folds: got True, expected options.split.folds too"),
        ({"[[rows]]": "[rows"}, "study: got .*three.toml, which is no TOML"),
    ],
)
def test_a_file_with_a_mistake_is_refused_before_anything_runs(file, change, message):
    text = FILE
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        grid.read(str(file))
    with pytest.raises(UserError, match="study: got 'table9', expected one of .*table7, or a TOML file"):
        grid.read("table9")


def test_a_study_of_folds_tests_on_each_part_once():
    chosen = grid.read("faces", seeds=(0, 1, 2, 3, 4, 5))
    assert [r.config.split.fold for r in chosen.runs() if r.row == "RAC"] == [0, 1, 2, 3, 4, 0]


def test_data_weights_and_options_take_the_place_of_the_studys():
    chosen = grid.read("table1", data="ferplus:/x", weights="w.pth", options={"epochs": 3, "optim": {"clip": 1.0}})
    for run in chosen.runs():
        config = run.config
        assert (config.data.name, config.data.path, config.backbone.weights) == ("ferplus", "/x", "w.pth")
        assert (config.epochs, config.optim.clip, config.backbone.name) == (3, 1.0, "resnet18")


def test_a_key_is_of_what_changes_results():
    paper = presets.paper()
    same = [{"name": "x"}, {"output": {"root": "/y"}}, {"compute": {"threads": 3}}, {"split": {"groups": ""}}]
    other = [{"seed": 1}, {"epochs": 7}, {"method": {"alpha": 0.2}}, {"data": {"train_size": 9}}]
    other += [
        {"backbone": {"weights": "/z/sface.safetensors"}},
        {"augment": {"flip": 0.1}},
        {"method": {"name": "rac"}},
    ]
    assert {grid.key(from_dict(change, paper)) for change in same} == {grid.key(paper)}
    keys = [grid.key(from_dict(change, paper)) for change in other]
    assert len({*keys, grid.key(paper)}) == len(other) + 1
    moved = from_dict({"backbone": {"weights": "/elsewhere/sface.safetensors"}}, paper)
    assert grid.key(moved) in keys  # the same weights in another place


def test_the_rows_of_a_study_are_the_runs_of_train(finished, tmp_path):
    """The record of a run has the numbers of the same run by hand."""
    assert [(r["row"], r["seed"]) for r in records(finished)] == [
        (row, seed)
        for seed in (3, 5)
        for row in ("plain", "RAC, consistency_weight 0.5", "RAC, consistency_weight 2.0")
    ]
    options = ["--method=rac", "--method.consistency-weight=2", "--seed=5", "--epochs=2", "--learning-rate=0.002"]
    assert runs.train(tmp_path, "--name=a", "--data.train-size=24", "--data.test-size=16", *options) == 0
    rows, record = runs.rows(tmp_path / "a"), records(finished)[-1]
    assert record["last"] == rows[-1]["test"] and record["losses"]["loss"] == rows[-1]["loss"]
    assert record["device"] == "CPU"
    best = max(rows, key=lambda row: row["test"]["mean"])
    assert record["best"] == {**best["test"], "epoch": best["epoch"]}


def test_the_share_of_the_gradient_is_recorded_over_training(finished, tmp_path):
    """After epochs 1 and 2 of two; a run of one epoch has the same weights after it."""
    options = ["--method=rac", "--method.consistency-weight=2", "--seed=5", "--epochs=1", "--learning-rate=0.002"]
    assert runs.train(tmp_path, "--name=a", "--data.train-size=24", "--data.test-size=16", *options) == 0
    trained = load(str(tmp_path / "a" / "last.pt"), "cpu")
    after_one = measure.gradient_share(trained.method, data.prepare(trained.config).splits["test"])
    record = records(finished)[-1]
    whole = {"1": pytest.approx(after_one, rel=1e-4), "2": pytest.approx(record["gradient_share"], rel=1e-12)}
    assert record["gradient_share_over"] == whole and after_one != pytest.approx(record["gradient_share"], rel=1e-3)
    assert "gradient_share" not in record["losses"]
    plain, first, second = table.of(grid.read(str(finished / "three.toml")), records(finished)).lines
    assert not plain.gradient_share_over and [e.n for e in first.gradient_share_over.values()] == [2, 2]
    values = [r["gradient_share_over"]["1"] for r in records(finished) if r["row"] == second.label]
    mean = f"{sum(values) / 2:.2f}"
    header, *cells = table.cells(table.of(grid.read(str(finished / "three.toml")), records(finished)))
    column = header.index("the same after epoch 1, 2")
    assert cells[0][column] == "" and cells[2][column].startswith(f"{mean}, ")
    (*_, of_second) = csv.DictReader((finished / "runs" / "three" / "table.csv").read_text().splitlines())
    assert float(of_second["gradient_share after epoch 1 mean"]) == pytest.approx(sum(values) / 2)


def test_its_files_agree(finished, capsys):
    folder = finished / "runs" / "three"
    assert study(finished / "three.toml", finished / "runs", "--table") == 0
    text = capsys.readouterr().out
    with open(folder / "table.csv", newline="") as file_:
        rows = list(csv.DictReader(file_))
    mine = records(finished)
    markdown = (folder / "table.md").read_text()
    for row, label in zip(rows, LABELS, strict=True):
        a, b = (r["last"]["overall"] for r in mine if r["row"] == label)
        assert row["row"] == label and float(row["overall mean"]) == pytest.approx((a + b) / 2)
        half = 12.706204736 * abs(a - b) / 2  # t of 97.5 % with one degree of freedom, times s / sqrt 2
        assert float(row["overall half"]) == pytest.approx(half, rel=1e-6)
        shown = f"{(a + b) / 2:.2f} ± {half:.2f}"
        assert shown in text and shown in markdown
    assert rows[0]["paper mean"] == "78.53" and "78.53" in text and rows[1]["paper mean"] == ""
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*/last.pt")) and len(list(folder.glob("*/best.pt"))) == 6


def test_the_pictures_show_the_numbers_of_the_table(finished, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    found = table.of(grid.read(str(finished / "three.toml")), records(finished))
    assert pictures.curves(tmp_path / "a.png", found)
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "method.consistency_weight" and axes.get_title() == "RAC"
    across = {line.get_label(): line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"}
    assert across == {"overall, plain": found.lines[0].overall.mean, "mean, plain": found.lines[0].mean.mean}
    curves = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    for name in ("overall", "mean"):
        values = [getattr(line, name).mean for line in found.lines[1:]]
        assert curves[name] == [[0.5, values[0]], [2.0, values[1]]]
    assert pictures.accuracies(tmp_path / "a.png", found)
    (axes,) = drawn[1].axes
    assert [bars.get_label() for bars in axes.containers] == ["overall", "mean"]
    for bars in axes.containers:
        estimates = [getattr(line, bars.get_label()) for line in found.lines]
        assert bars[0].get_xdata().tolist() == [e.mean for e in estimates]
        halves = [(right[0] - left[0]) / 2 for left, right in bars[2][0].get_segments()]
        assert halves == pytest.approx([e.half for e in estimates])
    assert not pictures.curves(tmp_path / "a.png", found._replace(lines=found.lines[:1]))  # nothing varies there
    assert (finished / "runs/three/curves.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_run_again_and_missing_ones_are(finished, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "kept.jsonl"
    lines = (finished / "runs" / "three" / "results.jsonl").read_text().splitlines()
    kept.write_text("\n".join(lines[:2] + lines[4:]) + "\n")
    ran, whole = [], running.train
    monkeypatch.setattr(running, "train", lambda config, **kw: ran.append(config.name) or whole(config, **kw))
    file = finished / "three.toml"
    assert study(file, tmp_path / "r", f"--results={kept}", "--at-most=1") == 0
    assert ran == ["rac-consistency_weight-2.0-3"]
    assert study(file, tmp_path / "r", f"--results={kept}") == 0
    assert ran == ["rac-consistency_weight-2.0-3", "plain-5"]
    again = {results.identity(r): (r["last"], r["view_difference"]) for r in results.read(kept)}
    assert again == {results.identity(r): (r["last"], r["view_difference"]) for r in records(finished)}
    # Another option makes another study of the same file: none of these runs counts.
    capsys.readouterr()
    assert study(file, tmp_path / "r", f"--results={kept}", "--table", "--options={epochs: 3}") == 0
    assert "no run of three is finished" in capsys.readouterr().out


def test_a_run_that_was_killed_continues(finished, tmp_path, monkeypatch, capsys):
    save, calls = Run.finish_epoch, []

    def killed(self, state):
        save(self, state)
        calls.append(self.folder.name)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "finish_epoch", killed)
    options = [finished / "three.toml", tmp_path / "r", "--at-most=1", "--seeds=3"]
    assert study(*options) == 130
    resumed, whole = [], running.train
    monkeypatch.setattr(running, "train", lambda config, **kw: resumed.append(kw["resume"]) or whole(config, **kw))
    assert study(*options) == 0
    assert resumed == [True] and calls == ["plain-3"] * 2  # one epoch before, one after
    (mine,) = results.read(tmp_path / "r" / "three" / "results.jsonl")
    assert mine["last"] == records(finished)[0]["last"]


def test_a_run_that_another_process_holds_is_left_to_it(finished, tmp_path, caplog):
    first = grid.read(str(finished / "three.toml")).runs(tmp_path / "r" / "three")[0]
    with Run(first.config):
        assert study(finished / "three.toml", tmp_path / "r", "--seeds=3") == 0
    assert "another process is writing" in caplog.text
    assert [r["row"][:3] for r in results.read(tmp_path / "r" / "three" / "results.jsonl")] == ["RAC", "RAC"]


def test_processes_share_the_runs(finished, tmp_path):
    # An option that is null, and of no row, arrives as such in the processes.
    options = ["--seeds=3", f"--root={tmp_path}/r", "--processes=2", "--options={method: {alpha: null}}"]
    done = child.run("-m", "trainer", "study", finished / "three.toml", *options, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    shared = {results.identity(r): r["last"] for r in results.read(tmp_path / "r" / "three" / "results.jsonl")}
    assert shared == {results.identity(r): r["last"] for r in records(finished) if r["seed"] == 3}


def test_no_other_process_takes_a_run_before_its_record_is_written(file, tmp_path, monkeypatch):
    of, folder = grid.read(str(file)), tmp_path / "r"
    ran, whole, make = [], running.train, running.record
    monkeypatch.setattr(running, "train", lambda config, **kw: ran.append(config.name) or whole(config, **kw))

    def record(run, result):
        monkeypatch.setattr(running, "record", make)
        running.run_missing(of, folder, tmp_path / "results.jsonl", at_most=1)  # as another process would
        return make(run, result)

    monkeypatch.setattr(running, "record", record)
    running.run_missing(of, folder, tmp_path / "results.jsonl", at_most=1)
    assert len(ran) == len(set(ran)) == len(results.read(tmp_path / "results.jsonl")) == 2


def test_a_run_that_diverges_is_counted_and_the_others_go_on(file, tmp_path, capsys):
    file.write_text(
        FILE.replace('grid = { "method.consistency_weight" = [0.5, 2.0] }', "options = { learning_rate = 1e30 }")
    )
    assert study(file, tmp_path / "r") == 0
    assert re.search(r"RAC +0 \+ 2 diverged", capsys.readouterr().out)
    failed = [r for r in results.read(tmp_path / "r" / "three" / "results.jsonl") if "failed" in r]
    assert len(failed) == 2 and "not finite" in failed[0]["failed"]


def test_results_of_other_images_are_refused(finished, tmp_path):
    mine = records(finished)
    mine[1]["images"] = "0"
    with pytest.raises(UserError, match="evaluated on other images than the runs before it"):
        table.of(grid.read(str(finished / "three.toml")), mine)


def test_a_table_says_what_trained_its_runs(finished):
    chosen, mine = grid.read(str(finished / "three.toml")), records(finished)

    def said(of):
        return [note for note in table.footnotes(table.of(chosen, of)) if note.startswith("trained on")]

    assert said(mine) == ["trained on CPU"]
    mine[0]["device"] = "NVIDIA H200"
    assert said(mine) == ["trained on CPU (5 runs) and NVIDIA H200 (1 run)"]
    del mine[1]["device"]  # as of an older version
    assert said(mine) == ["trained on CPU (4 runs) and NVIDIA H200 (1 run) and a device that was not recorded (1 run)"]
    assert said([{k: v for k, v in r.items() if k != "device"} for r in mine]) == []


def test_a_table_says_what_its_networks_start_from(tmp_path):
    def start(row, base):
        text = FILE.replace("backbone = {", f"backbone = {{weights = {base!r}, ")
        (tmp_path / "s.toml").write_text(text.replace('method = "rac"', 'method = "rac"\n' + row))
        (first, *_) = table.footnotes(table.of(grid.read(str(tmp_path / "s.toml")), []))
        return first.partition("batches of 8, ")[2].partition(", at")[0]

    assert start("", "") == "from random weights" and start("", "sface") == "from the weights sface"
    row = "options = { backbone = { weights = '' } }"
    assert start(row, "sface") == "from the weights of each row" and start(row, "") == "from random weights"


def test_a_damaged_file_of_results_is_named(tmp_path):
    for text in ("{", "[1]", '{"row": 1}'):
        (tmp_path / "r.jsonl").write_text(text + "\n")
        with pytest.raises(UserError, match=r"results: got .*r.jsonl, which is no file of results"):
            results.read(tmp_path / "r.jsonl")


def test_the_estimates_are_those_of_scipy():
    random = np.random.default_rng(0)
    a, b = random.normal(78, 2, 5), random.normal(80, 2, 5)
    mine = table.estimate(a.tolist())
    low, high = stats.t.interval(0.95, 4, loc=a.mean(), scale=stats.sem(a))
    assert (mine.mean - mine.half, mine.mean + mine.half) == pytest.approx((low, high))
    made = [
        {"row": row, "seed": seed, "fold": 0, "key": key, "split": "test", "classes": ["x", "y"], "images": "1",
         "last": {"overall": 2 * v, "mean": v, "f1": v, "per_class": [v, None]}, "best": {"mean": v + 1},
         "view_difference": None, "seconds": 1.0}
        for row, values in (("plain", a), ("RAC", b))
        for seed, (v, key) in enumerate(zip(values.tolist(), "abcde", strict=True))
    ]  # fmt: skip
    rows = tuple(grid.Row(label, {}, {}, "") for label in ("plain", "RAC"))

    class Study(grid.Study):
        def runs(self, root=None):
            return [grid.Run(r["row"], r["seed"], 0, None, r["key"]) for r in made]

    chosen = Study("s", "t", rows, (0, 1, 2, 3, 4), "plain", presets.demo())
    plain, rac = table.of(chosen, made).lines
    assert rac.p == pytest.approx(stats.ttest_rel(b, a).pvalue) and math.isnan(plain.p)
    assert rac.difference.mean == pytest.approx((b - a).mean())
    assert rac.difference.half == pytest.approx(stats.t.ppf(0.975, 4) * stats.sem(b - a))
    assert rac.overall_difference.mean == pytest.approx(2 * (b - a).mean()) and not plain.overall_difference.n
    header, _, cells = table.cells(table.of(chosen, made))
    assert cells[header.index("overall - plain")].startswith(f"{2 * (b - a).mean():+.2f} ± ")
    assert rac.best.mean == pytest.approx(b.mean() + 1) and rac.per_class[1].n == 0 and rac.view_difference.n == 0


class Maps(nn.Module):
    """Its maps are what they are given to be."""

    def __init__(self, maps):
        super().__init__()
        self.given = nn.Parameter(maps)

    @property
    def backbone(self):
        return self

    def maps(self, images):
        return self.given


def test_the_difference_of_maps_is_of_the_mirrored_back(monkeypatch):
    monkeypatch.setattr(measure, "views", lambda images, backbone, both: images)
    own = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    twin = own + 0.1
    split = Split(torch.zeros(3, 8, 8, 1, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    assert measure.view_difference(Maps(torch.cat([own, own.flip(3)])), split) == pytest.approx(0, abs=1e-6)
    got = measure.view_difference(Maps(torch.cat([own, twin.flip(3)])), split)
    a, b = own.double().numpy(), twin.double().numpy()
    assert got == pytest.approx(100 * math.sqrt(((a - b) ** 2).sum() / (((a**2).sum() + (b**2).sum()) / 2)), rel=1e-5)
    assert measure.view_difference(Maps(torch.cat([own, own])), split) > 50


def test_a_method_without_maps_has_no_difference(tmp_path):
    (tmp_path / "b.toml").write_text(FILE.replace('"rac"', '"bbn"').partition("grid =")[0])
    assert study(tmp_path / "b.toml", tmp_path / "r", "--seeds=3") == 0
    mine = {r["row"]: r["view_difference"] for r in results.read(tmp_path / "r" / "b" / "results.jsonl")}
    assert mine["RAC"] is None and mine["plain"] > 0


@pytest.mark.parametrize("at_once", [measure.WITH_GRADIENT, 4])
def test_the_share_of_the_gradient_is_that_of_plain_computation(at_once, monkeypatch):
    """With eval mode's BatchNorm and the weight of the maps held, as the fused loss has it, in parts of any size."""
    monkeypatch.setattr(measure, "WITH_GRADIENT", at_once)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 32, 32, 1), dtype=torch.uint8, generator=random)
    labels = torch.tensor([0, 1, 2, 3, 4, 6])
    backbone = Backbone("resnet10t", runs.TINY)
    base = dataclasses.replace(presets.demo(), image_size=32, backbone=backbone)
    method = loop.build(dataclasses.replace(base, method=found("methods")["rac"](consistency_weight=3.0)), COUNTS, CPU)
    seen, whole = [], method.loss_of
    monkeypatch.setattr(method, "loss_of", lambda features, y: seen.append(len(features)) or whole(features, y))
    got = measure.gradient_share(method.train(), Split(images, labels))
    assert seen == ([12, 12] if at_once > 6 else [8, 8, 4, 4])  # both views, once and twice the weight

    method.eval()
    features = method.backbone(views(images, method.backbone, both=True))
    own, twin = features.mean((2, 3)).matmul(method.head.weight.T).add(method.head.bias).chunk(2)
    classified = nn.functional.cross_entropy(own, labels) + nn.functional.cross_entropy(twin, labels)
    n = torch.tensor(COUNTS, dtype=torch.float64)
    weights = (1 - 0.9999) / (1 - 0.9999**n)
    weights = weights / weights.sum() * len(n)
    a, b = torch.einsum("lc,nchw->nlhw", method.head.weight.detach(), features).chunk(2)
    consistency = 3.0 * (weights[:, None, None] * (a - b.flip(3)).square()).mean()
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(t, tuple(method.parameters()), retain_graph=True, **NONE)])
        for t in (classified, consistency)
    ]
    c, m = (g.norm().item() for g in norms)
    assert got == pytest.approx(100 * m / (c + m), rel=1e-3) and 0 < got < 100
    assert method.consistency_weight == 3.0
    assert measure.gradient_share(loop.build(base, COUNTS, CPU), Split(images, labels)) is not None
    plain = dataclasses.replace(base, method=found("methods")["baseline"]())
    assert measure.gradient_share(loop.build(plain, COUNTS, CPU), Split(images, labels)) is None
