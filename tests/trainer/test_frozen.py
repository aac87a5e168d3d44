"""A backbone whose first parts are frozen, the activations that are kept of them, and folds by group."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from support import runs, trees

import rebalfer_kernels as rk
from trainer import backbones, presets
from trainer.config import UserError, from_dict
from trainer.data import folds, frozen, prepare
from trainer.data.batches import Source, augmentation
from trainer.data.views import views
from trainer.loop import build

FREEZE = ["--backbone.train-from=layer4", "--augment.versions=3", "--method=rac", "--split.choose-on=test"]


def config(tmp_path, **options):
    chosen = {
        "backbone": {"options": runs.TINY, "train_from": "layer3", **options.pop("backbone", {})},
        "augment": {"versions": 3, "crop": 0.5, "erase": 0.5, **options.pop("augment", {})},
        "data": {"train_size": 20, "test_size": 9},
        "output": {"cache": str(tmp_path / "cache")},
        "image_size": 32,
    }
    return from_dict({**chosen, **options}, presets.demo())


@pytest.mark.parametrize(
    ("name", "options", "first"),
    [
        ("resnet10t", runs.TINY, "layer4"),
        ("mobilenetv2_100", {}, "blocks.6.0"),
        ("mobilenetv1_100", {}, "blocks.4.1"),
        ("efficientnet_b0", {}, "conv_head"),
        ("regnety_008", {}, "s4"),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "patch_size": 2, "depths": (1, 1, 1, 1)}, "layers.3"),
    ],
)
def test_the_parts_before_the_first_that_trains_are_frozen(tmp_path, name, options, first):
    size = options.get("img_size", 32)
    frozen_one = config(tmp_path, backbone={"name": name, "options": options, "train_from": first}, image_size=size)
    whole = config(tmp_path, backbone={"name": name, "options": options, "train_from": ""}, image_size=size)
    ours, theirs = backbones.create(frozen_one), backbones.create(whole)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)
    trains = [n for n, p in ours.model.named_parameters() if p.requires_grad]
    position = [n for n, _ in ours.model.named_parameters()].index(trains[0])
    assert trains[0].startswith(first) and len(trains) == len(list(ours.model.parameters())) - position
    ours.train()
    before = {n: b.clone() for n, b in ours.model.named_buffers()}
    ours(images).square().sum().backward()
    moved = {n for n, b in ours.model.named_buffers() if not torch.equal(b, before[n]) and "num_batches" not in n}
    assert all(n.startswith(first) or n in trains or n.startswith(("bn2", "norm")) for n in moved)
    assert all((p.grad is not None) == p.requires_grad for p in ours.model.parameters())


def test_what_cannot_be_frozen_is_refused(tmp_path):
    for first in ("layer9", "conv1"):  # conv1 is the first part: nothing would be frozen
        with pytest.raises(
            UserError, match=f"backbone.train_from: got '{first}', expected one of .*layer3.0, layer4.0"
        ):
            backbones.create(config(tmp_path, backbone={"train_from": first}))
    with pytest.raises(UserError, match="output.cache: got 'off', expected a folder"):
        off = config(tmp_path, output={"cache": "off"})
        frozen.kept(off, backbones.create(off), prepare(off))
    for changes, message in (
        ({"method": {"name": "rac_transform"}}, "augment.versions: got 3, but rac_transform changes images itself"),
        ({"backbone": {"train_from": ""}}, "augment.versions: got 3, expected backbone.train_from too"),
    ):
        chosen = config(tmp_path, **changes)
        with pytest.raises(UserError, match=message):
            build(chosen, (3, 4), torch.device("cpu")).expect_able(chosen, 1)


def test_kept_activations_are_those_of_the_images(tmp_path):
    """Version v of a training image is what the frozen parts make of it, augmented by (seed 0, epoch v, its pixels)."""
    chosen = config(tmp_path)
    backbone, data = backbones.create(chosen), prepare(chosen)
    kept = frozen.kept(chosen, backbone, data)
    source = Source(kept.train, chosen, backbone, torch.device("cpu"))
    backbone.eval()
    rows = torch.tensor([4, 0, 11])
    for epoch in range(5):
        pixels = data.train.images[rows]
        digests = [frozen._digest(image) for image in pixels]
        augment = augmentation(chosen) if epoch % 3 else rk.Augment()
        pair = rk.paired_views(
            pixels, torch.arange(3), samples=torch.tensor([int(d[:15], 16) for d in digests]), out_size=32,
            mean=backbone.mean, std=backbone.std, seed=0, epoch=epoch % 3, augment=augment, backend="reference",
        )  # fmt: skip
        model = backbone.model
        x = model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(pair.expand(-1, 3, -1, -1)))))))
        got = source.views(rows, epoch, both=True)
        torch.testing.assert_close(got, x, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(source.views(rows, epoch, both=False), got[:3], rtol=0, atol=0)
        torch.testing.assert_close(backbone(got), model.layer4(model.layer3(got)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(source.views(rows, 0, both=True), source.views(rows, 1, both=True))
    test = kept.splits["test"]
    assert len(test.images) == len(data.splits["test"].labels)
    plain = torch.cat([part.views(None, 0, both=False) for part in test.images[torch.arange(5)].split(2)])
    direct = backbone.activations(views(data.splits["test"].images[:5], backbone, both=False))
    torch.testing.assert_close(plain, direct, rtol=2e-3, atol=2e-3)


def test_a_store_is_computed_once_and_survives_a_kill(tmp_path, monkeypatch):
    chosen = config(tmp_path)
    backbone, data = backbones.create(chosen), prepare(chosen)
    asked, whole = [], frozen._Store._rows

    def stop_at_the_second(self, images, digests):
        asked.append(len(images))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(self, images, digests)

    monkeypatch.setattr(frozen, "CHUNK", 8)
    monkeypatch.setattr(frozen._Store, "_rows", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        frozen.kept(chosen, backbone, data)
    folder = next((tmp_path / "cache" / "activations").iterdir())
    with open(folder / frozen.ROWS, "ab") as file:
        file.write(b"half of a row")
    first = frozen.kept(chosen, backbone, data)
    number = len(data.train.labels) + len(data.splits["test"].labels)
    assert sum(asked) - 8 == number == len(json.loads((folder / frozen.INDEX).read_text()))
    again = frozen.kept(chosen, backbone, data)
    assert sum(asked) - 8 == number
    both = [k.train.images.views(None, 1, both=True) for k in (first, again)]
    assert torch.equal(*both)
    other = config(tmp_path, augment={"versions": 3, "crop": 0.9})
    frozen.kept(other, backbones.create(other), data)
    assert len(list((tmp_path / "cache" / "activations").iterdir())) == 2  # other augmentation, another store
    seed = config(tmp_path, seed=1)
    monkeypatch.setattr(frozen._Store, "_rows", None)
    weights = backbones.create(chosen)
    assert len(frozen.kept(seed, weights, data).train.images) == len(data.train.labels)  # another seed, the same store


def test_a_run_on_kept_activations_trains_as_one_on_images(tmp_path):
    """With one version, the images as they are, both runs see the same but for rounding to float16."""
    common = ["--backbone.train-from=layer4", "--method=rac", "--epochs=2", "--augment.flip=0", "--augment.shift=0"]
    assert runs.train(tmp_path, "--name=pixels", *common) == 0
    cache = f"--output.cache={tmp_path}/c"
    assert runs.train(tmp_path, "--name=kept", "--augment.versions=1", cache, *common) == 0
    for a, b in zip(runs.rows(tmp_path / "pixels"), runs.rows(tmp_path / "kept"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3) and a["test"] == b["test"]
    pixels, kept = (runs.state(tmp_path / name)["model"] for name in ("pixels", "kept"))
    for name, tensor in pixels.items():
        assert (tensor - kept[name]).float().norm() <= 0.03 * tensor.float().norm() + 1e-3, name


@pytest.mark.parametrize("again", [False, True], ids=["kept", "made again"])
def test_a_run_on_kept_activations_resumes_bit_for_bit(again, tmp_path, capsys):
    """From weights of their own, which the frozen parts must have again when activations are asked for."""
    assert runs.train(tmp_path, "--name=start", "--epochs=1", "--seed=7") == 0
    start = f"--backbone.weights={tmp_path}/start/best.pt"
    options = [*FREEZE, start, f"--output.cache={tmp_path}/c"]
    assert runs.train(tmp_path, "--name=whole", "--epochs=3", *options) == 0
    assert runs.train(tmp_path, "--name=parts", "--epochs=1", *options) == 0
    if again:
        shutil.rmtree(tmp_path / "c" / "activations")
    assert runs.train(tmp_path, "--name=parts", "--epochs=3", "--resume", *options) == 0
    assert runs.differ(runs.state(tmp_path / "whole"), runs.state(tmp_path / "parts")) == []
    assert len(list((tmp_path / "c" / "activations").iterdir())) == 1
    from trainer.__main__ import main

    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "whole")]) == 0  # of images: best.pt holds the whole backbone
    assert "overall" in capsys.readouterr().out


def test_parts_keep_groups_together_and_the_mix_of_classes():
    random = np.random.default_rng(0)
    groups = random.integers(0, 300, 2000).tolist()
    labels = torch.tensor(random.choice(4, 2000, p=[0.7, 0.2, 0.08, 0.02]))
    part = folds.parts(labels, groups, 5)
    assert set(part.tolist()) == set(range(5))
    assert all(len({int(part[i]) for i in range(2000) if groups[i] == g}) == 1 for g in set(groups))
    for label in range(4):
        sizes = part[labels == label].bincount(minlength=5)
        assert sizes.max() - sizes.min() <= 0.1 * sizes.sum() / 5 + 2
    assert torch.equal(part, folds.parts(labels, groups, 5))


def photographs(root, people):
    """Two classes in train and val; each file's person is given."""
    rows = [("file", "person")]
    for i, person in enumerate(people):
        split, name = ("train", "val")[i % 4 == 3], ("happiness", "fear")[i % 3 == 0]
        file = f"{split}/{name}/{i:03d}.png"
        trees.save(root / file, 10 + i)
        rows.append((file, person))
    trees.write_csv(root / "people.csv", *rows)
    return from_dict(
        {
            "data": {"name": "imagefolder", "path": str(root)},
            "split": {"folds": 3, "fold": 1, "groups": str(root / "people.csv")},
            "image_size": 20,
        },
        presets.demo(),
    )


def test_every_image_is_in_the_test_of_one_fold_and_no_person_in_both(tmp_path):
    people = [f"p{i // 3}" for i in range(36)]
    chosen = photographs(tmp_path, people)
    with open(tmp_path / "people.csv", newline="") as file:
        of = dict(list(csv.reader(file))[1:])
    tests = []
    for fold in range(3):
        data = prepare(from_dict({"split": {"fold": fold}}, chosen))
        assert set(data.splits) == {"train", "test"} and data.chooser == "test"
        names = {split: set(data.splits[split].names) for split in data.splits}
        assert names["train"] | names["test"] == set(of) and not names["train"] & names["test"]
        assert not {of[n] for n in names["train"]} & {of[n] for n in names["test"]}
        for split in data.splits.values():  # pixels and labels stay with their names
            for name, image, label in zip(split.names, split.images, split.labels.tolist(), strict=True):
                assert data.classes[label] in name and int(image[0, 0, 0]) == 10 + int(name[-7:-4])
        tests += data.splits["test"].names
        assert any(f"part {fold} of 3 parts of all 36 images is the test" in note for note in data.notes)
    assert sorted(tests) == sorted(of)


def test_groups_that_do_not_fit_are_refused(tmp_path):
    chosen = photographs(tmp_path, ["a", "b", "c", "d"] * 6)
    lines = (tmp_path / "people.csv").read_text().splitlines()
    cases = {
        "\n".join(lines[:-1]): "which lacks 1 images, such as val/happiness/",
        "\n".join([lines[0], "train/fear/000.png"]): r"got the row \['train/fear/000.png'\]",
    }
    for text, message in cases.items():
        (tmp_path / "people.csv").write_text(text)
        with pytest.raises(UserError, match=f"split.groups: .*{message}" if "lacks" in message else message):
            prepare(chosen)
    with pytest.raises(UserError, match="split.groups: got .*nowhere.csv, which can't be read"):
        prepare(from_dict({"split": {"groups": str(tmp_path / "nowhere.csv")}}, chosen))
    with pytest.raises(UserError, match="split.fold: got 3, expected a finite number >= 0 and <= 2"):
        from_dict({"split": {"fold": 3}}, chosen)
    (tmp_path / "people.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="for data whose images come from no files"):
        prepare(from_dict({"data": {"name": "synthetic", "train_size": 30}}, chosen))


def test_folds_of_one_person_a_class_are_refused(tmp_path):
    chosen = photographs(tmp_path, ["rare" if i % 3 == 0 else f"p{i}" for i in range(24)])
    messages = []
    for fold in range(3):
        try:
            prepare(from_dict({"split": {"fold": fold}}, chosen))
        except UserError as error:
            messages.append(str(error))
    assert messages == ["split.folds: got 3, with no image of fear in train"]
