"""Folders of images, the names of classes, what is held out or left out, and the synthetic faces."""

import dataclasses
import re

import pytest
import torch
from PIL import Image

from trainer import backbones, presets
from trainer.__main__ import parse
from trainer.config import SplitOptions, UserError
from trainer.data import Split, describe, duplicates, imagefolder, imbalance, labels, prepare, synthetic

SIZE = 8


def save(path, tone=50):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (10, 10), tone).save(path)


def read(root, **options):
    return imagefolder.Options(str(root), **options).read(SIZE, 0)


# Names


@pytest.mark.parametrize(
    "folders, names",
    [
        (["happy", "Angry", "fear"], {"fear": "fear", "happy": "happiness", "Angry": "anger"}),
        (["0_angry", "10-sad", "2 Neutral"], {"10-sad": "sadness", "0_angry": "anger", "2 Neutral": "neutral"}),
        (list("7654321"), dict(zip("1234567", labels.EXPRESSIONS, strict=True))),
        (["10", "9", "1"], {"1": "1", "9": "9", "10": "10"}),  # no set of 7: their own names, in the order of numbers
        (["fear", "unknown", "suprise", "anger"], {
            "fear": "fear", "anger": "anger", "suprise": "suprise", "unknown": "unknown",
        }),
        (["contempt", "neutral"], {"neutral": "neutral", "contempt": "contempt"}),
    ],
)  # fmt: skip
def test_each_folder_is_named_for_itself_in_the_canonical_order(folders, names):
    assert list(labels.name_folders(folders)[0].items()) == list(names.items())


def test_what_is_assumed_and_what_is_not_understood_is_said():
    (note,) = labels.name_folders(list("1234567"))[1]
    assert "RAF-DB's: 1 surprise, 2 fear" in note
    (note,) = labels.name_folders(["fear", "suprise", "cat"])[1]
    assert "cat, suprise (did you mean surprise?)" in note
    assert labels.name_folders(["fear", "sad"])[1] == []


def test_classes_can_be_said_joined_and_left_out():
    names, notes = labels.name_folders(["a", "b", "sad", "junk"], {"a": "fear", "b": "fear", "junk": None})
    assert (names, notes) == ({"a": "fear", "b": "fear", "sad": "sadness"}, [])
    with pytest.raises(UserError, match="data: got the folders sad and sadness, expected one folder for sadness"):
        labels.name_folders(["sad", "sadness", "fear"])
    with pytest.raises(UserError, match="data.classes: got 'c', expected one of the folders a, b"):
        labels.name_folders(["a", "b"], {"c": "fear"})


def test_a_class_that_is_said_is_text_and_so_is_its_folder():
    said = parse(["train", "--data=imagefolder", "--data.classes={0: neutral, b: null}"]).config.data.classes
    assert said == {"0": "neutral", "b": None}  # YAML reads 0 as a number
    for text, got in (("3", "3"), ("[x]", r"\['x'\]"), ('""', "''")):
        with pytest.raises(UserError, match=f"data.classes.a: got {got}, expected a class, or null"):
            parse(["train", "--data=imagefolder", f"--data.classes={{a: {text}}}"])


def test_folders_called_by_numbers_can_be_named_and_left_out(tmp_path):
    for split in ("train", "test"):
        for name in "012":
            save(tmp_path / split / name / "a.png")
    assert read(tmp_path, classes={"0": "neutral", "2": None}).classes == ("neutral", "1")
    with pytest.raises(UserError, match="data.classes: got .* leaves 1 classes, expected two or more"):
        read(tmp_path, classes={"1": None, "2": None})


def test_files_beside_the_folders_of_the_classes_are_counted_and_named(tmp_path):
    for split in ("train", "test"):
        for name in ("fear", "sad"):
            save(tmp_path / split / name / "a.png")
    assert read(tmp_path).notes == ()
    save(tmp_path / "train/b.png")
    save(tmp_path / "train/c.png")
    save(tmp_path / "train/.d.png")
    assert read(tmp_path).notes == (f"2 files in {tmp_path}/train are in no class's folder: b.png, c.png",)


# Folders


def test_images_have_the_labels_of_their_folders(tmp_path):
    for split in ("train", "Val"):
        save(tmp_path / split / "sad/a.png", 50)
        save(tmp_path / split / "fear/deeper/B.JPG", 200)
        save(tmp_path / split / "@eaDir/x.png")
    (tmp_path / "train/fear/.DS_Store").write_text("")
    (tmp_path / "train/fear/notes.txt").write_text("text")
    data = read(tmp_path)
    assert data.classes == ("fear", "sadness") and data.folders == ("fear", "sad")
    assert list(data.splits) == ["train", "val"]
    for split in data.splits.values():
        assert split.images.shape == (2, SIZE, SIZE, 3)
        assert [round(x) for x in split.images.float().mean((1, 2, 3)).tolist()] == [200, 50]
        assert split.labels.tolist() == [0, 1]
    assert data.splits["train"].names == ("train/fear/deeper/B.JPG", "train/sad/a.png")
    (note,) = data.notes
    assert note.startswith(f"1 files in {tmp_path}/train are no images (1 .txt): train/fear/notes.txt")
    assert "\n    1  sadness  sad         1    1\n" in describe(data)


@pytest.mark.parametrize("choose_on, chooser", [("held-out", "valid"), ("test", "test")])
def test_splits_keep_their_names_and_the_chooser_is_named(choose_on, chooser, tmp_path):
    for split in ("training", "test", "valid"):
        for name in ("fear", "sad"):
            save(tmp_path / split / name / "a.png")
    config = dataclasses.replace(
        presets.baseline(), data=imagefolder.Options(str(tmp_path)), image_size=SIZE, split=SplitOptions(choose_on)
    )
    data = prepare(config)
    assert list(data.evaluated) == ["valid", "test"] and data.chooser == chooser
    assert describe(data).endswith(f"the best epoch is chosen on {chooser}")


def test_a_class_may_be_missing_in_an_evaluated_split_but_none_may_be_new(tmp_path):
    for name in ("fear", "sad", "happy"):
        save(tmp_path / "train" / name / "a.png")
    for name in ("sadness", "happy"):
        save(tmp_path / "test" / name / "a.png")
    data = read(tmp_path)
    assert data.classes == ("fear", "happiness", "sadness") and data.splits["test"].counts(3) == (0, 1, 1)
    save(tmp_path / "test/angry/a.png")
    with pytest.raises(UserError, match="got the folder .*/test/angry, expected one of the classes fear, happiness"):
        read(tmp_path)
    assert read(tmp_path, classes={"angry": None}).splits["test"].counts(3) == (0, 1, 1)


def test_what_is_no_data_set_is_named(tmp_path):
    with pytest.raises(UserError, match="data.path: got '.*none', which is no folder"):
        read(tmp_path / "none")
    with pytest.raises(UserError, match="which holds no folder; expected the folders train and val or test"):
        read(tmp_path)
    save(tmp_path / "train/fear/a.png")
    with pytest.raises(UserError, match="which holds train; expected the folders train and val or test"):
        read(tmp_path)
    save(tmp_path / "test/fear/a.png")
    with pytest.raises(UserError, match="data: got 1 class folders in .*/train, expected at least two"):
        read(tmp_path)
    (tmp_path / "train/sad").mkdir()
    save(tmp_path / "test/sad/a.png")
    with pytest.raises(UserError, match="data: got no image of sadness in .*/train"):
        read(tmp_path)
    save(tmp_path / "train/sad/a.png")
    for i in range(25):
        (tmp_path / f"train/sad/bad{i}.png").write_text("text")
    with pytest.raises(
        UserError, match=r"data: got 25 files that can't be read as images:(\n  .*bad\d+.png: .*){20}"
    ) as e:
        read(tmp_path)
    assert "and 5 more" in str(e.value)
    with pytest.raises(UserError, match="data.classes: got 'x', expected one of the folders fear, sad"):
        read(tmp_path, classes={"x": "anger"})


# What is held out, left out, there twice


def test_a_share_of_every_class_is_held_out_by_the_seed():
    sizes = {"train_size": 400, "test_size": 30}
    config = dataclasses.replace(
        presets.baseline(), data=synthetic.Options(**sizes), image_size=SIZE, split=SplitOptions("held-out", 0.2)
    )
    whole = config.data.read(SIZE, config.seed).train
    data, again, other = (prepare(dataclasses.replace(config, split=s)) for s in (
        config.split, config.split, SplitOptions("held-out", 0.4)
    ))  # fmt: skip
    held, kept = data.splits["held-out"], data.train
    assert data.chooser == "held-out" and len(held.labels) + len(kept.labels) == len(whole.labels)
    expected = [max(1, round(0.2 * n)) for n in whole.counts(7)]
    assert list(held.counts(7)) == expected and min(kept.counts(7)) >= 1

    def rows(split):
        return {row.numpy().tobytes() for row in split.images}

    assert rows(held) | rows(kept) == rows(whole) and not rows(held) & rows(kept)
    assert torch.equal(held.images, again.splits["held-out"].images)
    assert len(other.splits["held-out"].labels) > 1.8 * len(held.labels)


def test_images_that_are_in_two_splits_are_counted_and_named(tmp_path):
    splits = {
        "train": Split(torch.zeros(3, 1, 1, 1), torch.zeros(3).long(), ("a", "b", "c"), ("1", "2", "3")),
        "val": Split(torch.zeros(2, 1, 1, 1), torch.zeros(2).long(), ("d", "e"), ("3", "4")),
        "test": Split(torch.zeros(2, 1, 1, 1), torch.zeros(2).long(), ("f", "g"), ("1", "4")),
    }
    assert duplicates(splits) == [
        "1 images of val are in train too: d = c",
        "1 images of test are in train too: f = a",
        "1 images of test are in val too: g = e",
    ]


@pytest.mark.parametrize("factor", [20, 50, 100, 150])
def test_an_artificial_imbalance_has_the_factor_and_keeps_the_order(factor):
    raf = synthetic.TRAIN_COUNTS
    keep, rule = imbalance.sizes(raf, factor)
    assert max(keep) / min(keep) == pytest.approx(factor, rel=0.02) and max(keep) == max(raf)
    assert sorted(range(7), key=lambda i: keep[i]) == sorted(range(7), key=lambda i: raf[i])
    shares = sorted((n, k / n) for n, k in zip(raf, keep, strict=True))[::-1]
    mu = (max(raf) / min(raf) / factor) ** (1 / 6)
    assert [share for _, share in shares] == pytest.approx([mu**k for k in range(7)], rel=0.02)
    assert f"{mu:.4g}" in rule
    labels_ = torch.repeat_interleave(torch.arange(7), torch.tensor(raf))
    rows, note = imbalance.thin(labels_, raf, factor, seed=0)
    assert torch.bincount(labels_[rows]).tolist() == keep and rows.equal(rows.sort().values)
    assert f"train keeps {sum(keep)} of {sum(raf)} images" in note


def test_an_imbalance_that_the_images_do_not_allow_is_said():
    labels_ = torch.repeat_interleave(torch.arange(3), torch.tensor([50, 10, 4]))
    _, note = imbalance.thin(labels_, (50, 10, 4), 1e5, seed=0)
    assert note.endswith("train keeps 52 of 64 images, whose largest class has 50 times the images of the smallest")


# Synthetic faces


def test_synthetic_faces_are_deterministic_and_in_proportion():
    options = synthetic.Options(train_size=500, test_size=30)
    one, again, other = (options.read(32, seed) for seed in (3, 3, 4))
    assert torch.equal(one.train.images, again.train.images) and torch.equal(one.train.labels, again.train.labels)
    assert not torch.equal(one.train.images, other.train.images)
    assert not torch.equal(one.train.images[:30], one.splits["test"].images[:30])
    expected = torch.tensor(synthetic.TRAIN_COUNTS) * 500 / sum(synthetic.TRAIN_COUNTS)
    assert (torch.tensor(one.counts) - expected).abs().max() <= 1
    # An open mouth is dark: surprise against sadness, at the mouth.
    mouth = one.train.images[:, 22:26, 13:19, 0].float().mean((1, 2))
    assert mouth[one.train.labels == 0].mean() + 20 < mouth[one.train.labels == 4].mean()


def test_the_mirror_image_of_a_synthetic_face_keeps_its_expression(monkeypatch):
    """Without noise, light, pose and the other random parts a face is its own mirror image."""
    monkeypatch.setattr(torch, "randn", lambda *a, **k: torch.zeros(*a))
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full(a, 0.5))
    faces = synthetic._faces(torch.arange(7), 64, torch.Generator()).view(7, 64, 64)
    assert (faces.int() - faces.flip(-1).int()).abs().max() <= 1
    distinct = (faces[:, None].float() - faces[None].float()).abs().mean((2, 3))
    assert distinct[~torch.eye(7, dtype=torch.bool)].min() > 0.5


@pytest.mark.parametrize("seed", [0, 2**62, 2**63 - 1])
def test_every_seed_that_is_accepted_works(seed):
    assert len(synthetic.Options(20, 8).read(SIZE, seed).train.labels) >= 7
    backbones.create(dataclasses.replace(presets.demo(), seed=seed, image_size=32))


# Backbones


@pytest.mark.parametrize(
    "name, reason",
    [
        ("mobilenetv3_small_050", "its features are (2, 288, 2, 2), not maps (M, 1024, H, W)"),
        ("convnext_atto", "its logits differ from W . GAP(features) + b by 75%"),
        ("vit_tiny_patch16_224", "its features are (2, 197, 192), not maps (M, 192, H, W)"),
    ],
)
def test_backbones_without_an_exact_map_are_refused(name, reason):
    size = 224 if name.startswith("vit") else 64
    config = dataclasses.replace(presets.paper(), image_size=size, backbone=backbones_options(name))
    with pytest.raises(
        UserError, match=f"backbone: got '{name}', expected a model with exact .*: {re.escape(reason)}$"
    ):
        backbones.create(config)


def backbones_options(name, **options):
    return dataclasses.replace(presets.paper().backbone, name=name, options=options)


def test_swin_comes_out_as_maps():
    options = backbones_options("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1))
    backbone = backbones.create(dataclasses.replace(presets.paper(), image_size=64, backbone=options)).eval()
    images = torch.randn(2, 3, 64, 64)
    features = backbone(images)
    assert features.shape == (2, 768, 2, 2) and features.stride()[1] == 1
    assert torch.equal(features, backbone.model.forward_features(images).permute(0, 3, 1, 2))
