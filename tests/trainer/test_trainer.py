"""The first trainer: data, metrics, refusals, and a run that stops and goes on as if nothing had happened."""

import json
import os
import signal

import pytest
import torch
from PIL import Image

import trainer.loop
from trainer import backbones, metrics
from trainer.__main__ import main
from trainer.config import Config
from trainer.data import imagefolder, load, synthetic


def test_metrics_against_a_matrix_counted_by_hand():
    matrix = metrics.confusion(torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 2, 3]), 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    result = metrics.accuracies(matrix)
    assert result["overall"] == pytest.approx(100 * 4 / 6)
    assert result["per_class"] == pytest.approx([200 / 3, 50, None, 100])
    assert result["mean"] == pytest.approx((200 / 3 + 50 + 100) / 3)


def test_synthetic_faces_are_deterministic_and_in_proportion():
    small = {"image_size": 32, "train_size": 500, "test_size": 30}
    one, again, other = (load(Config(seed=seed, **small)) for seed in (3, 3, 4))
    assert torch.equal(one.train.images, again.train.images)
    assert torch.equal(one.train.labels, again.train.labels)
    assert not torch.equal(one.train.images, other.train.images)
    counts = torch.bincount(one.train.labels)
    expected = torch.tensor(synthetic.TRAIN_COUNTS) * 500 / 12271
    assert (counts - expected).abs().max() <= 1
    # An open mouth is dark: surprise against sadness, at the mouth.
    mouth = one.train.images[:, 0, 22:26, 13:19].float().mean((1, 2))
    assert mouth[one.train.labels == 0].mean() + 20 < mouth[one.train.labels == 4].mean()


def test_the_mirror_image_of_a_synthetic_face_keeps_its_expression(monkeypatch):
    """Without noise, light, pose and the other random parts a face is its own mirror image."""
    monkeypatch.setattr(torch, "randn", lambda *a, **k: torch.zeros(*a))
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full(a, 0.5))
    faces = synthetic._faces(torch.arange(7), 64, torch.Generator())
    assert (faces.int() - faces.flip(-1).int()).abs().max() <= 1
    distinct = (faces[:, None].float() - faces[None].float()).abs().mean((2, 3, 4))
    assert distinct[~torch.eye(7, dtype=torch.bool)].min() > 0.5


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_backbones_without_a_linear_cam_are_refused(name):
    with pytest.raises(ValueError, match=f"backbone: got '{name}'"):
        backbones.create(name, 224 if name.startswith("vit") else 64)


def test_swin_comes_out_as_channels_last_maps():
    backbone = backbones.create("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "depths": (1, 1, 1, 1)})
    features = backbone(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, 768, 2, 2)
    assert features.stride()[1] == 1


def write_faces(root, part, folder, tone, name="a.png"):
    (root / part / folder).mkdir(parents=True, exist_ok=True)
    Image.new("L", (10, 10), tone).save(root / part / folder / name)


def test_folders_come_in_the_canonical_order(tmp_path):
    assert list(imagefolder.class_names(["happy", "Angry", "fear"])) == ["fear", "happy", "Angry"]
    assert list(imagefolder.class_names(list("7654321")).items())[0] == ("1", "surprise")
    assert list(imagefolder.class_names(["cat", "ant"])) == ["ant", "cat"]
    for part in ("train", "val"):
        write_faces(tmp_path, part, "sad", 50)
        write_faces(tmp_path, part, "fear", 200)
    data = load(Config(data=f"imagefolder:{tmp_path}", image_size=8))
    assert data.classes == ("fear", "sadness")
    assert [int(x.float().mean()) for x in data.train.images] == [200, 50]


def test_bad_folders_say_what_is_wrong(tmp_path):
    config = Config(data=f"imagefolder:{tmp_path}", image_size=8)
    with pytest.raises(ValueError, match="expected the folders train and val"):
        load(config)
    for part in ("train", "val"):
        write_faces(tmp_path, part, "sad", 50)
        write_faces(tmp_path, part, "fear", 50)
    write_faces(tmp_path, "val", "anger", 50)
    with pytest.raises(ValueError, match="got the classes.*anger"):
        load(config)
    write_faces(tmp_path, "train", "anger", 50)
    (tmp_path / "val/anger/b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="b.png, which can't be read"):
        load(config)
    with pytest.raises(ValueError, match="sad and sadness"):
        imagefolder.class_names(["sad", "sadness", "fear"])
    with pytest.raises(ValueError, match="data: got 'mnist'"):
        load(Config(data="mnist"))


def run(root, name, *options):
    sizes = {"image-size": 32, "train-size": 60, "test-size": 20, "batch-size": 20, "learning-rate": 0.001}
    flags = [f"--{k}={v}" for k, v in sizes.items()]
    return main(["train", f"--root={root}", f"--name={name}", "--backbone=resnet10t", *flags, *options])


def test_a_run_writes_everything_and_goes_on_exactly(tmp_path, monkeypatch, capsys):
    """Whole; by epochs; and stopped by Ctrl-C in the middle of an epoch: all three end with the same weights."""
    assert run(tmp_path, "whole", "--epochs=2") == 0
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {
        "metrics.jsonl", "last.pt", "best.pt", "confusion.png", "cam.png"
    }  # fmt: skip
    assert f"{tmp_path}/whole/cam.png" in capsys.readouterr().out

    assert run(tmp_path, "epochs", "--epochs=1") == 0
    assert run(tmp_path, "epochs", "--epochs=2", "--resume") == 0

    augment, calls = trainer.loop.augment, []

    def augment_then_stop(*arguments):
        calls.append(1)
        if len(calls) == 5:  # the second step of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return augment(*arguments)

    monkeypatch.setattr(trainer.loop, "augment", augment_then_stop)
    assert run(tmp_path, "stopped", "--epochs=2") == 130
    saved = torch.load(tmp_path / "stopped/last.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (1, 2)
    assert run(tmp_path, "stopped", "--epochs=2", "--resume") == 0

    names = ("whole", "epochs", "stopped")
    whole, *others = (torch.load(tmp_path / n / "last.pt", weights_only=True)["model"] for n in names)
    for other in others:
        assert all(torch.equal(whole[k], other[k]) for k in whole)
    rows = [[json.loads(line) for line in open(tmp_path / n / "metrics.jsonl")] for n in names]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]] == [r["loss"] for r in rows[2]]
    assert rows[0][0]["consistency"] > 0
    assert rows[0][0]["loss"] == pytest.approx(rows[0][0]["classification"] + 2 * rows[0][0]["consistency"], rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method=magic"], "method: got 'magic'"),
        (["--epochs=0"], "epochs: got 0"),
        (["--data=mnist"], "data: got 'mnist'"),
        (["--name=a/b"], "name: got 'a/b'"),
        (["--resume"], "resume: got no file"),
    ],
)
def test_bad_input_is_named(options, message, tmp_path, capsys):
    assert run(tmp_path, "bad", *options) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    assert run(root, "one", "--epochs=1") == 0
    return root


def test_other_options_on_resume_are_refused(finished, capsys):
    assert run(finished, "one", "--epochs=2", "--alpha=0.2", "--resume") == 2
    assert "alpha 0.1 -> 0.2" in capsys.readouterr().err


def test_the_maps_of_a_finished_run_are_drawn_again(finished, capsys):
    """All of them are the run's own picture; of two classes, two rows in place of seven."""
    picture = finished / "again.png"
    assert main(["cams", f"{finished}/one", str(picture)]) == 0
    assert picture.read_bytes() == (finished / "one/cam.png").read_bytes()
    whole = Image.open(picture).size
    assert main(["cams", f"{finished}/one", str(picture), "--classes", "fear", "anger"]) == 0
    assert Image.open(picture).height < 0.4 * whole[1]
    assert main(["cams", f"{finished}/one", str(picture), "--classes", "joy"]) == 2
    assert "classes: got joy" in capsys.readouterr().err
    assert main(["cams", f"{finished}/none", str(picture)]) == 2
    assert "run: got no file" in capsys.readouterr().err
