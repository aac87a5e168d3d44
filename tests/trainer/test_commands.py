"""evaluate, predict, cams and demo on a run of folders: their numbers against those of the run and of plain PyTorch."""

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support import runs
from support.machine import ROOT

from trainer import checkpoint, figures
from trainer.__main__ import main
from trainer.commands import demo

CLASSES = ("fear", "sadness", "anger")
FOLDERS = ("fear", "sad", "angry")
SIDE = 32


def face(random, tone):
    """Noise whose brightness hints at the class."""
    noise = torch.randint(0, 120, (SIDE, SIDE, 3), generator=random, dtype=torch.uint8)
    return Image.fromarray((noise + 60 * tone).numpy())


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """PATH/data with train, val and test, and a run on it that chose its best epoch on val."""
    top, random = tmp_path_factory.mktemp("folders"), torch.Generator().manual_seed(1)
    for split, each in (("train", 8), ("val", 5), ("test", 7)):
        for tone, name in enumerate(FOLDERS):
            folder = top / f"data/{split}/{name}"
            folder.mkdir(parents=True)
            for i in range(each):
                face(random, tone).save(folder / f"{split}{i}.png")
    flags = [flag for flag in runs.FLAGS if not flag.startswith("--data")]
    flags += [f"--data.path={top}/data", "--data=imagefolder", "--split.choose-on=held-out", "--name=a", "--epochs=3"]
    assert main(["train", *flags, f"--output.root={top}/runs"]) == 0
    return top


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("REBALFER_BACKEND", "reference")


def call(command, *arguments):
    return main([command, *map(str, arguments), "--device=cpu"])


def independent(run, files, name="best.pt"):
    """(2, K, L) float64 logits of image files and of their mirror images, by Pillow, NumPy and timm only."""
    saved = checkpoint.read(run / name)
    weights = {k: v.double() for k, v in saved["model"].items()}
    backbone = timm.create_model("resnet10t", num_classes=0, **runs.TINY)
    prefix = "backbone.model."
    inside = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    assert not [k for k in backbone.load_state_dict(inside, strict=False).missing_keys]
    backbone.double().eval()
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]).transpose(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        features = [backbone.forward_features(torch.from_numpy(x.copy())) for x in (images, images[..., ::-1])]
    return torch.stack([f.mean((2, 3)) @ weights["head.weight"].T + weights["head.bias"] for f in features])


def files_of(top, split):
    """Its files in the order of the classes, and their classes."""
    found = [(file, i) for i, name in enumerate(FOLDERS) for file in sorted((top / f"data/{split}/{name}").iterdir())]
    return zip(*found, strict=True)


# evaluate


def test_each_split_is_evaluated_under_its_own_name_as_in_the_run(top, tmp_path, capsys):
    rows = runs.rows(top / "runs/a")
    best = max(rows, key=lambda row: row["val"]["mean"])
    assert set(rows[0]) - {"epoch", "loss", "classification", "consistency"} == {"val", "test"}
    for path, row in ((top / "runs/a", best), (top / "runs/a/best.pt", best), (top / "runs/a/last.pt", rows[-1])):
        out = tmp_path / f"{path.name}.json"
        assert call("evaluate", path, f"--out={out}") == 0
        said = json.loads(out.read_text())
        assert said["scores"] == {"val": row["val"], "test": row["test"]}
        assert said["images"] == {"val": [5, 5, 5], "test": [7, 7, 7]} and said["classes"] == list(CLASSES)
        assert f"a, epoch {row['epoch']}" in said["checkpoint"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"a, epoch {best['epoch']}, the best on val\n")
    head, *lines = (line.split() for line in printed.split("\n\n")[0].splitlines()[1:])
    assert head[-2:] == ["val", "test"]
    table = {line[0]: line[1:] for line in lines if len(line) == 3}
    for name, key in (("mean", "mean"), ("overall", "overall"), ("macro-F1", "f1")):
        assert table[name] == [f"{best[split][key]:.2f}" for split in ("val", "test")]


def test_the_accuracy_is_that_of_an_independent_network(top, tmp_path):
    out = tmp_path / "a.json"
    for flags, pick in (([], lambda z: z[0]), (["--flip"], lambda z: z.mean(0))):
        assert call("evaluate", top / "runs/a", f"--out={out}", "--overwrite", *flags) == 0
        for split in ("val", "test"):
            files, labels = files_of(top, split)
            right = pick(independent(top / "runs/a", files)).argmax(1) == torch.tensor(labels)
            assert json.loads(out.read_text())["scores"][split]["overall"] == pytest.approx(100 * right.double().mean())


def test_another_folder_is_evaluated_and_said_to_be_another(top, tmp_path, capsys):
    shutil.copytree(top / "data", tmp_path / "other")
    shutil.rmtree(tmp_path / "other/val")
    (tmp_path / "other/test/fear/test0.png").unlink()
    assert call("evaluate", top / "runs/a", f"--path={tmp_path}/other") == 0
    printed = capsys.readouterr().out
    assert "note: not the data of the run: images of val [5, 5, 5] -> none" in printed
    assert "note: not the data of the run: images of test [7, 7, 7] -> [6, 7, 7]" in printed
    assert "held-out" in printed and " val" not in printed.partition("accuracy in %")[2]
    assert call("evaluate", top / "runs/a", f"--path={top}/data") == 0
    assert "note" not in capsys.readouterr().out


def test_a_folder_without_train_is_evaluated_under_the_checkpoints_classes(top, tmp_path, capsys):
    """PATH/test/CLASS, and PATH/CLASS: the same images, the same scores; what is no class is refused."""
    out = tmp_path / "a.json"
    assert call("evaluate", top / "runs/a", f"--out={out}") == 0
    scores = json.loads(out.read_text())["scores"]["test"]
    shutil.copytree(top / "data/test", tmp_path / "mine/test")
    shutil.copytree(top / "data/test", tmp_path / "flat")
    for path, split in (("mine", "test"), ("flat", "flat")):
        assert call("evaluate", top / "runs/a", f"--path={tmp_path / path}", f"--out={out}", "--overwrite") == 0
        assert json.loads(out.read_text())["scores"] == {split: scores}
    assert "images of train [" in capsys.readouterr().out
    (tmp_path / "flat/sad").rename(tmp_path / "flat/scared")
    assert call("evaluate", top / "runs/a", f"--path={tmp_path}/flat") == 2
    assert "flat/scared, expected one of the classes fear, sadness, anger" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "flat/scared")  # a class may be missing
    assert call("evaluate", top / "runs/a", f"--path={tmp_path}/flat") == 0


def test_other_classes_are_refused(top, tmp_path, capsys):
    shutil.copytree(top / "data", tmp_path / "other")
    for split in ("train", "val", "test"):
        (tmp_path / f"other/{split}/sad").rename(tmp_path / f"other/{split}/happy")
    assert call("evaluate", top / "runs/a", f"--path={tmp_path}/other") == 2
    assert (
        "data: got ('fear', 'happiness', 'anger'), expected the checkpoint's classes ('fear', 'sadness', 'anger')"
        in capsys.readouterr().err
    )


def test_a_path_is_refused_where_the_data_has_none(finished, capsys):
    assert call("evaluate", finished, "--path=/faces") == 2
    assert "path: got '/faces', expected none: the run's data is synthetic" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_or_closed_standard_output_is_one_line(finished):
    command = [sys.executable, "-m", "trainer", "evaluate", str(finished), "--device=cpu"]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (2, "error: standard output: No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (2, "error: standard output: Broken pipe\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing_is_named_as_it_was_asked_for(finished, capsys):
    assert main(["evaluate", str(finished), "--device=cuda"]) == 2
    assert "error: device: got 'cuda', expected 'cpu' or 'auto': PyTorch sees no CUDA" in capsys.readouterr().err


def test_a_checkpoint_that_is_missing_or_foreign_is_named(tmp_path, capsys):
    assert call("evaluate", tmp_path / "none") == 2
    assert f"error: {tmp_path}/none: no such file, expected a checkpoint of a run" in capsys.readouterr().err
    assert call("evaluate", tmp_path) == 2
    assert f"error: {tmp_path}/best.pt: no such file" in capsys.readouterr().err
    checkpoint.save(tmp_path / "a.pt", {"model": {}})
    assert call("evaluate", tmp_path / "a.pt") == 2
    assert "not a checkpoint of this program: it has no config, epoch, identity" in capsys.readouterr().err


# predict


def predicted(text):
    """Of the CSV: file -> class, and the probabilities (K, L)."""
    head, *rows = csv.reader(io.StringIO(text))
    assert head == ["file", "class", *CLASSES]
    return [row[:2] for row in rows], torch.tensor([[float(x) for x in row[2:]] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("flags, pick", [([], lambda z: z.mean(0)), (["--no-flip"], lambda z: z[0])])
def test_probabilities_are_those_of_an_independent_network(flags, pick, top, capsys):
    """By default the two logits are averaged; neither their probabilities nor one of them alone."""
    files = list(files_of(top, "test"))[0]
    assert call("predict", top / "runs/a", *files, *flags) == 0
    rows, got = predicted(capsys.readouterr().out)
    both = independent(top / "runs/a", files)
    expected = pick(both).softmax(1)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert (both[0].softmax(1) - both[1].softmax(1)).abs().max() > 1e-3  # the mirror image does matter
    assert (both.softmax(2).mean(0) - both.mean(0).softmax(1)).abs().max() > 4e-5
    assert rows == [[str(file), CLASSES[i]] for file, i in zip(files, expected.argmax(1).tolist(), strict=True)]


def test_files_folders_csv_and_json_agree(top, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(top)
    run = top / "runs/a"
    assert call("predict", run, "data/test") == 0
    rows, p = predicted(capsys.readouterr().out)
    names = [row[0] for row in rows]
    assert names == sorted(names) and len(names) == 21 and names[0] == "data/test/angry/test0.png"
    assert call("predict", run, *names, f"--out={tmp_path}/a.csv") == 0
    assert predicted((tmp_path / "a.csv").read_text())[0] == rows
    assert call("predict", run, "data/test/fear", "data/test/sad/test3.png", f"--out={tmp_path}/a.JSON") == 0
    found = json.loads((tmp_path / "a.JSON").read_text())
    assert [row["file"] for row in found] == [
        *(f"data/test/fear/test{i}.png" for i in range(7)),
        "data/test/sad/test3.png",
    ]
    for row in found:
        i = names.index(row["file"])
        assert row["class"] == rows[i][1]
        assert list(row["probabilities"].values()) == pytest.approx(p[i].tolist(), abs=1e-6)
        assert list(row["probabilities"]) == list(CLASSES)
    assert capsys.readouterr().out == ""


def test_an_image_is_read_as_in_training(top, tmp_path, capsys):
    """Turned by its EXIF tag, of another size, with an odd suffix: the same decoder."""
    (file, *_), _ = files_of(top, "val")
    with Image.open(file) as image:
        turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by 90 degrees
        turned.save(tmp_path / "turned.PNG", exif=exif)
        image.resize((96, 96), Image.Resampling.NEAREST).save(tmp_path / "large.tif")
    assert call("predict", top / "runs/a", file, tmp_path / "turned.PNG", tmp_path / "large.tif") == 0
    _, p = predicted(capsys.readouterr().out)
    assert p[0].tolist() == p[1].tolist()
    torch.testing.assert_close(p[0], p[2], rtol=0, atol=0.02)


def test_every_map_is_drawn_into_a_new_folder(top, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "activation_maps", lambda *a: drawn.append(a))
    files = list(files_of(top, "val"))[0][3:6]
    assert call("predict", top / "runs/a", *files, f"--out={tmp_path}/a.csv", f"--maps={tmp_path}/maps") == 0
    assert [a[0].name for a in drawn] == [f"{i:05d}-{file.stem}.png" for i, file in enumerate(files)]
    for file, (_, _, image, labels, classes, about) in zip(files, drawn, strict=True):
        assert np.array_equal(image[0].numpy(), np.asarray(Image.open(file))) and labels is None
        assert classes == CLASSES and about.startswith("a, epoch ")


def test_maps_are_pictures(top, tmp_path):
    file = next(iter(files_of(top, "val")))[0]
    assert call("predict", top / "runs/a", file, f"--maps={tmp_path}/maps") == 0
    (picture,) = os.listdir(tmp_path / "maps")
    with Image.open(tmp_path / "maps" / picture) as image:
        assert image.format == "PNG" and image.width > 300


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.png"], "images: got none.png, expected a file or folder that exists"),
        (["empty"], "images: got the folder empty, which has no images"),
        (["bad.png", "bad.jpg"], "data: got 2 files that can't be read as images"),
        (["good.png", "--out=there.csv"], "out: got there.csv, which exists: --overwrite replaces it"),
        (["good.png", "--out=none/a.csv"], "out: got 'none/a.csv', expected a path in a folder that exists"),
        (["good.png", "--maps=empty"], "maps: got empty, which exists: --overwrite replaces it"),
        (["good.png", "--maps=there.csv", "--overwrite"], "maps: got there.csv, which can't be a folder: File exists"),
    ],
)
def test_what_cannot_be_predicted_is_named(arguments, message, top, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    for name in ("bad.png", "bad.jpg", "there.csv"):
        (tmp_path / name).write_text("text")
    face(torch.Generator(), 0).save("good.png")
    assert call("predict", top / "runs/a", *arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert (tmp_path / "there.csv").read_text() == "text" and os.listdir("empty") == []


def test_what_exists_is_replaced_if_asked(top, tmp_path):
    (tmp_path / "a.csv").write_text("text")
    file = next(iter(files_of(top, "val")))[0]
    assert call("predict", top / "runs/a", file, f"--out={tmp_path}/a.csv", "--overwrite") == 0
    assert len(predicted((tmp_path / "a.csv").read_text())[0]) == 1


# cams


def test_the_rows_of_the_picture_can_be_chosen(top, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "activation_maps", lambda *a: drawn.append(a))
    run, out = top / "runs/a", tmp_path / "a.png"
    assert call("cams", run, out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert call("cams", run, out, "--classes=[anger, fear]", "--split=test") == 0
    assert [a[3] for a in drawn] == [[0, 1, 2], [0, 2]]
    assert ["val" in drawn[0][5], "test" in drawn[1][5]] == [True, True]  # val chose the best epoch
    for i, name in enumerate(("fear", "angry")):
        assert np.array_equal(drawn[1][2][i].numpy(), np.asarray(Image.open(top / f"data/test/{name}/test0.png")))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--classes=[joy, fear]"], "classes: got joy, expected some of fear, sadness, anger"),
        (["--split=validation"], "split: got 'validation', expected one of train, val, test"),
    ],
)
def test_rows_that_are_none_are_named(flags, message, top, tmp_path, capsys):
    assert call("cams", top / "runs/a", tmp_path / "a.png", *flags) == 2
    assert f"error: {message}" in capsys.readouterr().err
    (tmp_path / "b.png").touch()
    assert call("cams", top / "runs/a", tmp_path / "b.png") == 2
    assert "b.png, which exists" in capsys.readouterr().err
    assert call("cams", top / "runs/a", tmp_path / "b.txt") == 2
    assert "b.txt', expected a name that ends with .png" in capsys.readouterr().err


def test_a_finished_runs_own_picture_is_drawn_again(finished, tmp_path):
    """From last.pt: cam.png itself but for its title."""
    assert call("cams", finished / "last.pt", tmp_path / "a.png") == 0
    with Image.open(tmp_path / "a.png") as again, Image.open(finished / "cam.png") as own:
        assert np.array_equal(*(np.asarray(image.convert("RGB"))[80:] for image in (again, own)))


# demo


def test_the_demo_trains_both_methods_and_says_when_it_is_too_short(tmp_path, capsys, caplog, monkeypatch):
    small = demo.DEFAULT
    small = dataclasses.replace(
        small, image_size=SIDE, batch_size=16, backbone=dataclasses.replace(small.backbone, options=runs.TINY),
        data=dataclasses.replace(small.data, train_size=60, test_size=20),
        output=dataclasses.replace(small.output, pictures=False),
    )  # fmt: skip
    monkeypatch.setattr(demo, "DEFAULT", small)
    assert main(["demo", "--epochs=1", f"--root={tmp_path}"]) == 0
    assert "note: so few epochs show little: got 1 of 12" in caplog.messages
    printed = capsys.readouterr().out
    assert "one run of each" in printed and "baseline, last" in printed and "rebalanced, best" in printed
    for name, method in (("demo-baseline", "baseline"), ("demo-rebalanced", "rebalanced")):
        saved = checkpoint.read(tmp_path / name / "last.pt")
        assert saved["config"]["method"]["name"] == method and saved["epoch"] == 1
    # The same faces, order and first weights for both: only the method differs.
    a, b = (checkpoint.read(tmp_path / name / "last.pt")["config"] for name in ("demo-baseline", "demo-rebalanced"))
    assert {key for key in a if a[key] != b[key]} == {"method", "name"}
    assert main(["demo", "--epochs=1", f"--root={tmp_path}"]) == 2
    assert "demo-baseline has a run already" in capsys.readouterr().err
