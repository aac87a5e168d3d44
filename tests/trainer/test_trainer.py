"""The first trainer: data, metrics, refusals, and a run that resumes exactly."""

import json

import pytest
import torch
from PIL import Image

from trainer import backbones, metrics
from trainer.__main__ import main
from trainer.data import EXPRESSIONS, imagefolder, synthetic


def test_metrics_against_a_matrix_counted_by_hand():
    matrix = metrics.confusion(torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 2, 3]), 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    result = metrics.accuracies(matrix)
    assert result["overall"] == pytest.approx(100 * 4 / 6)
    assert result["per_class"] == pytest.approx([200 / 3, 50, None, 100])
    assert result["mean"] == pytest.approx((200 / 3 + 50 + 100) / 3)


def test_synthetic_faces_are_deterministic_and_in_proportion():
    one = synthetic.load(image_size=32, seed=3, train_size=500)
    again = synthetic.load(image_size=32, seed=3, train_size=500)
    other = synthetic.load(image_size=32, seed=4, train_size=500)
    assert torch.equal(one.train.images, again.train.images)
    assert not torch.equal(one.train.images, other.train.images)
    counts = torch.bincount(one.train.labels)
    expected = torch.tensor(synthetic.TRAIN_COUNTS) * 500 / 12271
    assert (counts - expected).abs().max() <= 1
    # An open mouth is dark: surprise against sadness, at the mouth.
    mouth = one.train.images[:, 0, 22:26, 13:19].float().mean((1, 2))
    assert mouth[one.train.labels == 0].mean() + 20 < mouth[one.train.labels == 4].mean()


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_backbones_without_a_linear_cam_are_refused(name):
    size = 224 if name.startswith("vit") else 64
    with pytest.raises(ValueError, match=f"backbone: got '{name}'"):
        backbones.create(name, size, {})


def test_swin_comes_out_as_channels_last_maps():
    backbone = backbones.create("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "depths": (1, 1, 1, 1)})
    features = backbone(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, 768, 2, 2)
    assert features.stride()[1] == 1


def test_folder_names_map_to_the_canonical_order(tmp_path):
    assert imagefolder.class_order(["happy", "angry", "fear"]) == ["fear", "happy", "angry"]
    assert imagefolder.class_order([str(i) for i in range(7, 0, -1)]) == list("1234567")
    assert imagefolder.class_order(["cat", "ant"]) == ["ant", "cat"]
    with pytest.raises(ValueError, match="expected the folders train"):
        imagefolder.load(str(tmp_path), image_size=8)
    for part in ("train", "val"):
        for folder, tone in (("sad", 50), ("fear", 200)):
            (tmp_path / part / folder).mkdir(parents=True)
            Image.new("L", (10, 10), tone).save(tmp_path / part / folder / "a.png")
    data = imagefolder.load(str(tmp_path), image_size=8)
    assert data.classes == ("fear", "sadness")
    assert [int(x.float().mean()) for x in data.train.images] == [200, 50]
    assert set(data.classes) < set(EXPRESSIONS)


def run(name, *options):
    return main(
        ["train", "--name", name, "--backbone", "resnet10t", "--image-size", "32", "--train-size", "60", "--batch-size",
         "20", "--learning-rate", "0.001", *options]
    )  # fmt: skip


def test_a_run_writes_everything_and_resumes_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("whole", "--epochs", "2") == 0
    assert {p.name for p in (tmp_path / "runs/whole").iterdir()} == {
        "metrics.jsonl", "last.pt", "best.pt", "confusion.png", "cam.png"
    }  # fmt: skip
    assert "pictures:" in capsys.readouterr().out
    assert run("parts", "--epochs", "1") == 0
    assert run("parts", "--epochs", "2", "--resume") == 0
    models = [torch.load(tmp_path / f"runs/{n}/last.pt", weights_only=True)["model"] for n in ("whole", "parts")]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    rows = [[json.loads(line) for line in open(tmp_path / f"runs/{n}/metrics.jsonl")] for n in ("whole", "parts")]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    assert rows[0][0]["consistency"] > 0


def test_interrupt_saves_and_bad_input_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("stopped", "--epochs", "1") == 130
    assert torch.load(tmp_path / "runs/stopped/last.pt", weights_only=True)["epoch"] == 0
    assert run("bad", "--method", "magic") == 2
    assert "method: got 'magic'" in capsys.readouterr().err
    assert run("bad", "--data", "mnist") == 2
    assert run("bad", "--resume") == 2
