"""A run's folder: what is refused, what a resumption accepts, and what survives a failure."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from PIL import Image
from support import runs

from trainer import checkpoint, figures, metrics, run
from trainer.__main__ import main, parse
from trainer.data.batches import order
from trainer.methods import Method

NAMES = ["config.json", "metrics.jsonl", "last.pt", "previous.pt", "best.pt", "confusion.png", "cam.png"]


def error(capsys):
    """The last line on the standard error."""
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit(file, change):
    saved = checkpoint.read(file)
    change(saved)
    checkpoint.save(file, saved)


def strict(text):
    """JSON without the NaN and Infinity that Python would accept."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# The folder


def test_a_run_writes_its_files_and_prints_its_table(finished, tmp_path, capsys):
    assert sorted(os.listdir(finished)) == sorted([*NAMES, ".lock"])
    assert runs.train(tmp_path, "--epochs=2", "--name=a") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = runs.rows(tmp_path / "a")
    for name, key in (("mean", "mean"), ("overall", "overall"), ("macro-F1", "f1")):
        line = next(line.split() for line in lines if line.startswith(name))
        assert line[1:] == [f"{row['test'][key]:.2f}" for row in (rows[-1], max(rows, key=lambda r: r["test"]["mean"]))]
    assert lines[-1] == str(tmp_path / "a")


def test_a_piped_run_prints_whole_lines_only(faces_copy, capfd):
    assert folder_run(faces_copy, "--epochs=2", "--overwrite") == 0
    out, err = capfd.readouterr()
    assert "\r" not in out + err and "it/s" not in err and "step" not in err


def test_a_name_with_a_run_is_refused(copy, capsys):
    before = contents(copy)
    assert runs.train(copy, "--name=one", "--epochs=3") == 2
    assert error(capsys) == (
        f"name: got 'one', expected another one, --resume or --overwrite: {copy}/one has a run already "
        f"({', '.join(NAMES)})"
    )
    assert contents(copy) == before
    assert runs.train(copy, "--name=two") == 0
    assert {path: content for path, content in contents(copy).items() if path.parts[0] == "one"} == before


def test_overwriting_removes_what_the_old_run_wrote_and_nothing_else(copy, capsys):
    folder = copy / "one"
    for name in ("notes.txt", "events.out.tfevents.1.a", ".last.pt-abc.tmp"):
        (folder / name).write_text("kept?")
    assert runs.train(copy, "--name=one", "--overwrite", "--method=baseline") == 0
    assert sorted(os.listdir(folder)) == sorted(
        [".lock", "notes.txt", "config.json", "metrics.jsonl", "last.pt", "previous.pt", "best.pt"]
    )
    assert len(runs.rows(folder)) == 1 and runs.state(folder)["epoch"] == 1
    assert (folder / "notes.txt").read_text() == "kept?"
    assert runs.train(copy, "--name=fresh", "--method=baseline") == 0
    assert runs.differ(runs.state(folder), runs.state(copy / "fresh")) == []


def test_an_overwriting_that_is_refused_leaves_the_old_run(copy, capsys):
    before = contents(copy)
    for flags in (["--backbone=resnet17"], ["--optim.options={a: 1}"], ["--data=raf_db"], ["--resume"]):
        assert runs.train(copy, "--name=one", "--overwrite", *flags) == 2
    assert contents(copy) == before


def test_stale_temporary_files_are_removed(copy):
    stale = copy / "one/.last.pt-abc.tmp"
    stale.write_text("half")
    assert runs.train(copy, "--name=one", "--epochs=2", "--resume") == 0
    assert not stale.exists()


def test_a_run_in_use_is_refused_and_its_end_frees_the_name(copy, capsys):
    config = parse(["train", *runs.FLAGS, f"--output.root={copy}", "--name=one", "--epochs=2"]).config
    for _ in range(2):
        with run.Run(config, resume=True):
            before = contents(copy)
            for flags in ([], ["--resume"], ["--overwrite"]):
                assert runs.train(copy, "--name=one", "--epochs=2", *flags) == 2
                assert error(capsys) == f"name: got 'one', but another process is writing to {copy}/one"
            assert contents(copy) == before
    assert runs.train(copy, "--name=one", "--epochs=2", "--resume") == 0


def test_two_new_runs_of_one_name_at_once(tmp_path, capsys, monkeypatch):
    """The second starts while the first one reads its images, before it has written a file."""
    from trainer.data import synthetic

    read, statuses = synthetic.Options.read, []

    def start_another(*arguments):
        monkeypatch.setattr(synthetic.Options, "read", read)
        statuses.append(runs.train(tmp_path))
        return read(*arguments)

    monkeypatch.setattr(synthetic.Options, "read", start_another)
    assert runs.train(tmp_path) == 0 and statuses == [2]
    assert "another process is writing" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["run", "root", "read-only"])
def test_a_folder_that_cannot_be_written_is_named(where, tmp_path, capsys, monkeypatch):
    root, reason = tmp_path / "runs", r"(Not a directory|File exists)"
    if where == "run":
        root.mkdir()
        (root / "a").write_text("a file")
    elif where == "root":
        root.write_text("a file")
    else:

        def read_only(*_, **__):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(os, "open", read_only)
        reason = "Read-only file system"
    assert runs.train(root, "--name=a") == 2
    monkeypatch.undo()
    assert re.fullmatch(f"output.root: {root}/a can't be written: {reason}", error(capsys))


def test_a_folder_that_cannot_be_locked_is_used_with_a_note(tmp_path, caplog, monkeypatch):
    """Some network file systems have no locks."""

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run.fcntl, "flock", no_locks)
    assert runs.train(tmp_path, "--name=a") == 0
    assert (
        f"note: {tmp_path}/a can't be locked (No locks available): start no second run of this name" in caplog.messages
    )


def test_a_folder_that_is_deleted_meanwhile_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Method, "after_step", lambda *_: shutil.rmtree(tmp_path / "a", ignore_errors=True))
    assert runs.train(tmp_path, "--name=a") == 2
    assert error(capsys) == f"{tmp_path}/a/last.pt: can't be written: No such file or directory"


def test_tensorboard_where_it_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert runs.train(tmp_path, "--output.tensorboard") == 2
    assert error(capsys) == "output.tensorboard: needs packages that are not installed: pip install tensorboard"
    assert os.listdir(tmp_path) == []


def test_tensorboard_has_the_numbers_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert runs.train(tmp_path, "--name=a", "--epochs=2", "--output.tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    for tag, pick in (("loss", lambda r: r["loss"]), ("test/mean", lambda r: r["test"]["mean"])):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(row["epoch"], pytest.approx(pick(row))) for row in runs.rows(tmp_path / "a")]


# Resumption: what it accepts


def resume(root, *options, name="one"):
    return runs.train(root, f"--name={name}", "--epochs=2", "--resume", *options)


@pytest.mark.parametrize(
    "option, text",
    [
        ("--method.alpha=0.2", "method.alpha 0.3 -> 0.2"),
        ("--method=baseline", "method.name 'rebalanced' -> 'baseline'"),
        ("--data.train-size=41", "data.train_size 40 -> 41"),
        ("--batch-size=9", "batch_size 8 -> 9"),
        ("--learning-rate=0.01", "learning_rate 0.02 -> 0.01"),
        ("--image-size=40", "image_size 32 -> 40"),
        ("--seed=5", "seed 4 -> 5"),
        ("--backbone.frozen-batchnorm", "backbone.frozen_batchnorm False -> True"),
        ("--optim.decay=0.8", "optim.decay 0.85 -> 0.8"),
        ("--optim.clip=1", "optim.clip 0.0 -> 1.0"),
        ("--compute.amp=bf16", "compute.amp 'off' -> 'bf16'"),
        ("--split.choose-on=held-out", "split.choose_on 'test' -> 'held-out'"),
        ("--augment.noise=5", "augment.noise 0.0 -> 5.0"),
    ],
)
def test_an_option_that_changes_the_results_is_refused_by_name(option, text, root, capsys):
    before = contents(root)
    assert resume(root, option) == 2
    assert error(capsys) == f"resume: got other options than {root}/one/last.pt was made with: {text}"
    assert contents(root) == before


@pytest.mark.parametrize(
    "option, text",
    [
        ("--output.tensorboard", ""),
        ("--output.save-minutes=1", ""),
        ("--compute.device=auto", "compute.device 'cpu' -> 'auto'"),
        ("--compute.backend=null", "compute.backend 'reference' -> None"),
        ("--no-compute.channels-last", "compute.channels_last True -> False"),
    ],
)
def test_an_option_that_changes_nothing_or_only_the_rounding_is_accepted(option, text, copy, caplog, monkeypatch):
    monkeypatch.setenv("REBALFER_BACKEND", "reference")
    assert runs.train(copy, "--name=one", "--epochs=3", "--resume", option) == 0
    note = f"note: {text}: continues, but results may be rounded differently"
    assert note in caplog.messages if text else "rounded" not in caplog.text.replace("rounds", "")
    assert [row["epoch"] for row in runs.rows(copy / "one")] == [1, 2, 3]


def test_a_checkpoint_that_lacks_newer_options_has_their_defaults(copy, capsys):
    """As one does that was made before they existed."""

    def older(saved):
        del saved["config"]["optim"]["average"], saved["config"]["augment"], saved["config"]["method"]["beta"]
        del saved["threads"], saved["processes"]

    edit(copy / "one/last.pt", older)
    assert resume(copy) == 0
    assert resume(copy, "--optim.average=0.9") == 2
    assert error(capsys).endswith("optim.average 0.0 -> 0.9")
    edit(copy / "one/best.pt", older)
    assert main(["evaluate", str(copy / "one"), "--device=cpu"]) == 0


def test_an_option_of_a_newer_version_is_named(copy, capsys):
    edit(copy / "one/last.pt", lambda saved: saved["config"]["optim"].update(newer=1))
    assert resume(copy) == 2
    assert error(capsys).startswith("optim.newer: got an unknown option, expected one of ")


def test_more_epochs_continue_where_no_step_depends_on_their_number(finished, tmp_path, capsys):
    assert runs.train(tmp_path, "--name=a", "--epochs=1") == 0
    assert runs.train(tmp_path, "--name=a", "--epochs=2", "--resume") == 0
    assert runs.differ(runs.state(tmp_path / "a"), runs.state(finished)) == []
    for schedule, status in (("constant", 0), ("cosine", 2)):
        flags = [f"--name={schedule}", f"--optim.schedule={schedule}"]
        assert runs.train(tmp_path, *flags) == 0
        capsys.readouterr()
        assert runs.train(tmp_path, *flags, "--epochs=2", "--resume") == status
    assert error(capsys).endswith("epochs 1 -> 2, which its schedule follows")


def test_fewer_epochs_than_done_change_nothing(copy, monkeypatch):
    before = runs.state(copy / "one")
    titles = []
    monkeypatch.setattr(figures, "confusion_matrix", lambda *a: titles.append(a[3]))
    assert runs.train(copy, "--name=one", "--epochs=1", "--resume", "--output.pictures") == 0
    assert runs.differ(runs.state(copy / "one"), before) == [] and titles == ["one, epoch 2"]


# Resumption: the data


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A data set of folders and a run on it, to be copied."""
    top = tmp_path_factory.mktemp("faces")
    random = torch.Generator().manual_seed(0)
    for split, each in (("train", 6), ("val", 3)):
        for name in ("fear", "sad", "angry"):
            (top / f"data/{split}/{name}").mkdir(parents=True)
            for i in range(each):
                pixels = torch.randint(0, 255, (32, 32), generator=random, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(top / f"data/{split}/{name}/{split}{i}.png")
    assert folder_run(top) == 0
    return top


@pytest.fixture
def faces_copy(faces, tmp_path):
    return shutil.copytree(faces, tmp_path / "faces")


def folder_run(top, *options, data="data"):
    flags = [flag for flag in runs.FLAGS if not flag.startswith("--data")]
    return main(
        ["train", *flags, f"--output.root={top}/runs", "--data=imagefolder", f"--data.path={top}/{data}", *options]
    )


def recolour(file):
    with Image.open(file) as image:
        pixels = image.copy()
    pixels.putpixel((0, 0), 255 - pixels.getpixel((0, 0)))
    pixels.save(file)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda d: (d / "train/sad").rename(d / "train/happy"), "classes .*'sadness'.* -> .*'happiness'"),
        (lambda d: recolour(d / "train/fear/train2.png"), "1 changed files in train: train/fear/train2.png"),
        (lambda d: recolour(d / "val/fear/val2.png"), "1 changed files in val: val/fear/val2.png"),
        (
            lambda d: (d / "train/fear/train2.png").unlink(),
            "images of train .*; 1 missing files in train: ",
        ),
        (
            lambda d: shutil.copy(d / "val/fear/val0.png", d / "train/sad/new.png"),
            r"images of train \[6, 6, 6\] -> \[6, 7, 6\]; 1 new files in train: train/sad/new.png",
        ),
        (
            lambda d: (d / "train/sad/train0.png").rename(d / "train/fear/more.png"),
            "images of train .*; 1 new files in train: train/fear/more.png; 1 missing files in train: train/sad/train0",
        ),
    ],
    ids=["renamed class", "changed image", "changed val image", "missing image", "new image", "image of another class"],
)
def test_other_data_is_refused_and_what_changed_is_named(change, text, faces_copy, capsys):
    change(faces_copy / "data")
    if not (faces_copy / "data/train/sad").is_dir():
        (faces_copy / "data/val/sad").rename(faces_copy / "data/val/happy")
    before = contents(faces_copy / "runs")
    assert folder_run(faces_copy, "--epochs=2", "--resume") == 2
    assert re.match(f"resume: got other data than the checkpoint was made with: {text}", error(capsys))
    assert contents(faces_copy / "runs") == before


def test_swapped_images_are_refused(faces_copy, capsys):
    """The same files under each other's names: classes and counts are as before."""
    a, b = (faces_copy / "data/train" / name for name in ("fear/train0.png", "sad/train0.png"))
    a.rename(a.with_suffix(".tmp"))
    b.rename(a)
    a.with_suffix(".tmp").rename(b)
    assert folder_run(faces_copy, "--epochs=2", "--resume") == 2
    assert error(capsys).endswith("2 changed files in train: train/fear/train0.png, train/sad/train0.png")


@pytest.mark.parametrize("where", ["data/", "./data", "moved", "link"])
def test_the_same_data_elsewhere_is_accepted(where, faces_copy):
    if where == "moved":
        (faces_copy / "data").rename(faces_copy / "moved")
    if where == "link":
        (faces_copy / "link").symlink_to(faces_copy / "data")
    (faces_copy / "data/train/.DS_Store").write_text("") if where != "moved" else None
    assert folder_run(faces_copy, "--epochs=2", "--resume", data=where) == 0
    assert [row["epoch"] for row in runs.rows(faces_copy / "runs/demo")] == [1, 2]


# Files that are made from the state


def damage(file, way, older):
    if way == "missing":
        file.unlink()
    elif way == "cut off":
        file.write_bytes(file.read_bytes()[:50])
    else:
        shutil.copy(older, file)


@pytest.mark.parametrize("way", ["missing", "cut off", "of an older epoch"])
@pytest.mark.parametrize("name", ["best.pt", "metrics.jsonl"])
def test_what_is_made_from_the_state_is_made_again(name, way, copy, finished, tmp_path):
    assert runs.train(tmp_path, "--name=older") == 0
    damage(copy / "one" / name, way, tmp_path / "older" / name)
    assert resume(copy) == 0
    assert runs.rows(copy / "one") == runs.rows(finished)
    assert runs.differ(runs.state(copy / "one", "best.pt"), runs.state(finished, "best.pt")) == []


def test_best_pt_has_the_weights_and_row_of_the_best_epoch(finished):
    rows, best, last = runs.rows(finished), checkpoint.read(finished / "best.pt"), checkpoint.read(finished / "last.pt")
    top = max(rows, key=lambda row: row["test"]["mean"])
    assert best["epoch"] + 1 == top["epoch"] and best["score"] == top["test"]["mean"] == best["row"]["test"]["mean"]
    assert best["chooser"] == "test"
    if top["epoch"] == 2:
        assert runs.differ(best["model"], last["model"]) == []


@pytest.mark.parametrize("fails", ["metrics.jsonl", "best.pt"])
def test_a_full_disk_after_last_pt_leaves_nothing_that_contradicts_it(fails, finished, tmp_path, capsys, monkeypatch):
    """An epoch's state is saved, and then the disk is full: the files that are made from it are older, until the run
    is resumed."""
    replacing, count = checkpoint.replacing, []

    def full(path, keep=None):
        count.append(path.name)
        if path.name == fails and count.count("last.pt") == 3:  # of the beginning, epoch 1 and epoch 2
            raise checkpoint.UserError(f"{path}: can't be written: No space left on device")
        return replacing(path, keep)

    monkeypatch.setattr(checkpoint, "replacing", full)
    assert runs.train(tmp_path, "--name=a", "--epochs=2") == 2
    assert error(capsys) == f"{tmp_path}/a/{fails}: can't be written: No space left on device"
    monkeypatch.undo()
    assert (runs.state(tmp_path / "a")["epoch"], len(runs.rows(tmp_path / "a"))) == (2, 1 + (fails == "best.pt"))
    assert runs.train(tmp_path, "--name=a", "--epochs=2", "--resume") == 0
    for name in ("last.pt", "best.pt"):
        assert runs.differ(runs.state(tmp_path / "a", name), runs.state(finished, name)) == []
    assert runs.rows(tmp_path / "a") == runs.rows(finished)
    assert runs.state(tmp_path / "a", "best.pt")["epoch"] == 1  # the epoch whose best.pt was at stake


def test_a_full_disk_in_the_middle_loses_no_checkpoint(finished, tmp_path, capsys, monkeypatch):
    def full(_):
        log = tmp_path / "a/metrics.jsonl"
        if log.is_file() and log.stat().st_size:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert runs.train(tmp_path, "--name=a", "--epochs=2") == 2
    # The log of the first epoch was written, its best.pt was not.
    assert error(capsys) == f"{tmp_path}/a/best.pt: can't be written: No space left on device"
    assert runs.train(tmp_path, "--name=a", "--epochs=2", "--resume") == 2
    monkeypatch.undo()
    assert runs.state(tmp_path / "a")["epoch"] == 1 and not list((tmp_path / "a").glob(".*.tmp"))
    assert runs.train(tmp_path, "--name=a", "--epochs=2", "--resume") == 0
    for name in ("last.pt", "best.pt"):
        assert runs.differ(runs.state(tmp_path / "a", name), runs.state(finished, name)) == []


def test_a_plotting_error_fails_no_run(tmp_path, caplog, monkeypatch):
    def broken(*_):
        raise ValueError("no\nfont")

    monkeypatch.setattr(figures, "confusion_matrix", broken)
    assert runs.train(tmp_path, "--name=a", "--output.pictures") == 0
    assert "note: no pictures: ValueError: no font" in caplog.messages
    assert (tmp_path / "a/best.pt").is_file()


# A loss that is no number


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    flags = ["--name=a", "--epochs=3", "--learning-rate=1e20"]
    assert runs.train(tmp_path, *flags) == 3
    message = error(capsys)
    found = re.fullmatch(
        r"loss: got a number that is not finite in epoch (\d+), step (\d+) of the samples ([\d, ]+); (.*/last.pt) is "
        r"good and stands in epoch (\d+) after (\d+) steps; a lower --learning-rate may help",
        message,
    )
    assert found, message
    epoch, step, samples, good, *stands = found.groups()
    assert (int(epoch), int(step)) == (1, 1)  # the second step sees the weights of the first
    saved = checkpoint.read(tmp_path / "a/last.pt")
    images, batch_size, seed = sum(saved["identity"]["counts"]["train"]), 8, 4
    assert samples == ", ".join(map(str, order(images, batch_size, seed, 0, least=2)[1].tolist()))
    assert good == str(tmp_path / "a/last.pt") and [saved["epoch"] + 1, saved["step"]] == list(map(int, stands))
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines():
        strict(line)
    assert not (tmp_path / "a/cam.png").exists() and not (tmp_path / "a/best.pt").exists()
    # A lower rate is another run; the same one diverges again, from the same place.
    assert runs.train(tmp_path, *flags, "--resume") == 3
    assert error(capsys) == message


def test_a_loss_that_becomes_infinite_in_a_later_epoch_keeps_the_earlier_ones(copy, capsys, monkeypatch):
    """The weights of the saved state are pushed to where float32 ends."""

    def overflowing(saved):
        saved["model"]["head.weight"] *= 1e38

    rows = runs.rows(copy / "one")
    edit(copy / "one/last.pt", overflowing)
    assert runs.train(copy, "--name=one", "--epochs=3", "--resume") == 3
    assert "in epoch 3, step 0 of the samples " in error(capsys)
    assert runs.rows(copy / "one") == rows and runs.state(copy / "one")["epoch"] == 2


def test_logits_that_are_not_finite_at_the_evaluation_end_the_run_too(tmp_path, capsys, monkeypatch):
    """After the last step of an epoch no loss shows what it did to the weights."""
    assert runs.train(tmp_path, "--name=a", "--learning-rate=1e20", "--batch-size=64") == 3  # one step
    assert "not finite in the evaluation on test after epoch 1; " in error(capsys)
    assert runs.state(tmp_path / "a")["epoch"] == 0 and (tmp_path / "a/metrics.jsonl").read_text() == ""


def test_the_log_is_json_where_a_class_has_no_images(tmp_path, faces_copy):
    shutil.rmtree(faces_copy / "data/val/sad")
    assert folder_run(faces_copy, "--name=b") == 0
    (line,) = (faces_copy / "runs/b/metrics.jsonl").read_text().splitlines()
    row = strict(line)
    assert row["val"]["per_class"][1] is None and row["val"]["mean"] is not None


def test_the_numbers_of_a_confusion_matrix_counted_by_hand():
    matrix = metrics.confusion(torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 2, 3]), 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    scores = metrics.accuracies(matrix)
    assert scores["overall"] == pytest.approx(100 * 4 / 6)
    assert scores["per_class"] == pytest.approx([200 / 3, 50, None, 100])
    assert scores["mean"] == pytest.approx((200 / 3 + 50 + 100) / 3)
    # F1 = 2 right / (true + predicted): 4/5, 2/4, 0/1, 1
    assert scores["f1"] == pytest.approx(100 * (0.8 + 0.5 + 0 + 1) / 4)
