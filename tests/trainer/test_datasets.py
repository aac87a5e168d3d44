"""RAF-DB, FERPlus, AffectNet and FER2013 in their real formats, each as a tiny tree, and the traps of each."""

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.trees import (
    VOTES,
    affect_2017,
    affect_2021,
    affectnet_header,
    copies,
    faces,
    fer,
    pixels,
    plus,
    plus_folders,
    raf,
    relist,
    save,
    tone,
    train_and_evaluate,
    write_csv,
)

from trainer.__main__ import main, parse
from trainer.config import SplitOptions, UserError, found
from trainer.data import affectnet, decode, fer2013, ferplus, prepare, raf_db, rows
from trainer.data.labels import CANONICAL, EXPRESSIONS
from trainer.presets import baseline

SIZE = 16


def tones(split):
    return [round((value - 20) / 30) for value in split.images.float().mean((1, 2, 3)).tolist()]


def expect_each_class_to_have_its_pixels(data):
    for split in data.splits.values():
        assert tones(split) == split.hard.tolist()


# RAF-DB


def read_raf(root):
    return raf_db.Options(str(root)).read(SIZE, 0)


@pytest.mark.parametrize("aligned, suffix", [("_aligned", ".jpg"), ("", ".jpg"), ("_aligned", ".JPG"), ("", ".png")])
def test_raf_db_in_the_layouts_of_its_distribution(aligned, suffix, tmp_path):
    raf(tmp_path / "basic", aligned, suffix)
    copies(tmp_path / "basic/Image/aligned")
    copies(tmp_path / "__MACOSX/basic/EmoLabel")
    data = read_raf(tmp_path)
    assert data.classes == EXPRESSIONS and list(data.splits) == ["train", "test"]
    assert data.folders == tuple("1234567") and data.counts == (2,) * 7
    expect_each_class_to_have_its_pixels(data)
    assert [note.partition(":")[0] for note in data.notes] == ["train of RAF-DB", "test of RAF-DB"]
    assert "14 images, officially 12271: surprise 2 of 1290, fear 2 of 281" in data.notes[0]


@pytest.mark.parametrize("test", ["test", "valid"])
def test_raf_db_as_folders(test, tmp_path):
    for split in ("train", test):
        for number in range(1, 8 if split == "train" else 7):  # neutral is missing in test
            save(tmp_path / f"DATASET/{split}/{number}/nested/{split}_{number}.JPG", tone(number - 1))
    copies(tmp_path / "DATASET/train/1")
    data = read_raf(tmp_path)
    assert data.classes == EXPRESSIONS and list(data.splits) == ["train", test]
    expect_each_class_to_have_its_pixels(data)
    assert data.splits[test].counts(7) == (1,) * 6 + (0,)
    save(tmp_path / "DATASET/train/8/a.png", 9)
    with pytest.raises(UserError, match="DATASET/train/8, expected one of 1, 2.*; or use --data imagefolder"):
        read_raf(tmp_path)


def test_raf_db_calls_its_test_set_test(tmp_path, monkeypatch):
    monkeypatch.setattr(raf_db, "OFFICIAL", {"train": (1,) * 7, "test": (1, 1, 1, 1, 1, 1, 2)})
    for number in range(1, 8):
        save(tmp_path / f"train/{number}/a.png", 30)
        save(tmp_path / f"valid/{number}/a.png", 30)
    assert list(read_raf(tmp_path).splits) == ["train", "valid"]
    save(tmp_path / "valid/7/b.png", 30)
    data = read_raf(tmp_path)
    assert list(data.splits) == ["train", "test"]
    assert data.notes == ("valid is the set that results are published on, so it is called test",)


def test_raf_db_says_what_is_missing_and_what_is_too_much(tmp_path):
    lines = raf(tmp_path)
    aligned = tmp_path / "Image/aligned"
    (aligned / "train_00001_aligned.jpg").unlink()
    save(aligned / "train_99999_aligned.jpg", 5)
    (aligned / "readme.txt").write_text("aligned faces")
    relist(tmp_path, [*lines, "train_00002.jpg 6", "train_00003.jpg 1"])  # the first as before, the second not
    data = read_raf(tmp_path)
    expect_each_class_to_have_its_pixels(data)
    assert data.counts == (2, 2, 2, 2, 1, 2, 1)
    assert f"1 rows of list_patition_label.txt have no image in {aligned} and are left out: train_00" in data.notes[0]
    assert f"1 images in {aligned} have no row and are left out: train_99999_aligned.jpg" in data.notes[1]
    assert "1 files in" in data.notes[2] and "readme.txt" in data.notes[2]
    assert "1 images have rows in list_patition_label.txt that contradict each other" in data.notes[3]


def test_raf_db_refuses_by_line_what_it_cannot_use(tmp_path):
    lines = raf(tmp_path)
    relist(tmp_path, [*lines, "train_00001.jpg 8", "face.jpg 1", "train_00002.jpg", *["test_1.jpg surprise"] * 20])
    with pytest.raises(UserError) as error:
        read_raf(tmp_path)
    assert "list_patition_label.txt: got 23 rows that can't be used:\n" in str(error.value)
    assert "line 29: label '8', expected a number from 1 to 7\n" in str(error.value)
    assert "line 30: 'face.jpg 1', expected an image and its label, such as 'train_00001.jpg 5'" in str(error.value)
    assert str(error.value).endswith("and 3 more") and len(str(error.value).splitlines()) == 22


def test_raf_db_refuses_what_it_would_have_to_guess(tmp_path):
    with pytest.raises(UserError, match="data.path: got '', which is no folder"):
        read_raf("")
    with pytest.raises(UserError, match="which holds nothing; expected EmoLabel/list_patition_label.txt and Image"):
        read_raf(tmp_path)
    lines = raf(tmp_path)
    save(tmp_path / "Image/aligned/more/train_00001_aligned.jpg", 5)
    with pytest.raises(UserError, match="train_00001_aligned.jpg could be .* or .*expected one image of that name"):
        read_raf(tmp_path)
    (tmp_path / "Image/aligned/more/train_00001_aligned.jpg").unlink()
    relist(tmp_path, [line for line in lines if not (line.startswith("train") and line.endswith("2"))])
    with pytest.raises(UserError, match="got no training image of fear"):
        read_raf(tmp_path)
    relist(tmp_path, ["train_77777.jpg 1"])
    with pytest.raises(UserError, match="none with an image in .*expected train_77777_aligned.jpg or train_77777.jpg"):
        read_raf(tmp_path)


def test_the_official_counts_in_another_order_are_refused():
    alphabetical = [705, 717, 281, 4772, 2524, 1982, 1290]
    with pytest.raises(UserError, match="official counts of train in another order .surprise 705 of 1290"):
        rows.differences("train", EXPRESSIONS, alphabetical, raf_db.OFFICIAL["train"])
    assert rows.differences("train", EXPRESSIONS, raf_db.OFFICIAL["train"], raf_db.OFFICIAL["train"]) == []


def test_raf_db_trains_through_the_command_line(tmp_path, capsys):
    raf(tmp_path / "basic", each=3)
    scores = train_and_evaluate(tmp_path / "basic", tmp_path, capsys, "--data=raf_db")
    assert scores["classes"] == list(EXPRESSIONS) and scores["images"] == {"test": [3] * 7}


# FER2013


def read_fer(root):
    return fer2013.Options(str(root)).read(SIZE, 0)


def test_fer2013_as_csv(tmp_path):
    fer(tmp_path / "fer2013", faces())
    data = read_fer(tmp_path)
    assert data.classes == EXPRESSIONS and data.folders == ("5", "2", "1", "3", "4", "0", "6")
    assert list(data.splits) == ["train", "val", "test"] and data.counts == (2,) * 7
    assert data.train.images.shape == (14, SIZE, SIZE, 1) and data.train.names[-1] == "fer2013.csv:14"
    expect_each_class_to_have_its_pixels(data)
    assert data.train.digests[0] == decode.digest(bytes([tone(5)] * 2304))
    assert data.notes[0].startswith("train of FER2013: 14 images, officially 28709: surprise 2 of 3171")

    other = [[e, usage, p] for e, p, usage in faces()]
    fer(tmp_path / "other", other, ("emotion", " Usage", " pixels"), "icml_face_data.csv")
    again = read_fer(tmp_path / "other")
    for name, split in data.splits.items():
        assert torch.equal(split.images, again.splits[name].images)
        assert torch.equal(split.labels, again.splits[name].labels)


def test_fer2013_totals_are_the_published_ones():
    """Those of the whole set in its own order, and of the folders' test set, which is both test parts."""
    by_class = {name: [fer2013.OFFICIAL[s][i] for s in fer2013.OFFICIAL] for i, name in enumerate(EXPRESSIONS)}
    assert [sum(by_class[name]) for name in fer2013.NUMBERS] == [4953, 547, 5121, 8989, 6077, 4002, 6198]
    assert [sum(by_class[name][1:]) for name in EXPRESSIONS] == list(fer2013.FOLDERS_TEST)
    assert [sum(counts) for counts in fer2013.OFFICIAL.values()] == [28709, 3589, 3589]
    assert sum(fer2013.FOLDERS_TEST) == 7178


def test_fer2013_refuses_bad_rows_and_leaves_out_what_follows_the_last(tmp_path, monkeypatch):
    junk = [["6", "1 2 3", "PrivateTest"], ["x" * 30]]
    fer(tmp_path, faces() + junk)
    with pytest.raises(UserError) as error:
        read_fer(tmp_path)
    assert "fer2013.csv: got 2 rows that can't be used" in str(error.value)
    assert "line 44: 3 pixels, expected 48 x 48" in str(error.value)
    assert "line 45: Usage ''" in str(error.value)
    monkeypatch.setattr(fer2013, "ROWS", 42)
    data = read_fer(tmp_path)
    assert data.notes[0].startswith("2 rows of ") and "after the 42 of FER2013 are no images" in data.notes[0]
    assert data.splits["test"].counts(7) == (2,) * 7

    fer(tmp_path, [[7, pixels(1), "Training"], [0, pixels(256), "Training"], [0, pixels(1), "Test"]])
    with pytest.raises(UserError) as error:
        read_fer(tmp_path)
    assert "line 2: emotion '7', expected a number from 0 to 6" in str(error.value)
    assert "line 3: pixels '256 256 256 256 256 '..., expected numbers from 0 to 255" in str(error.value)
    assert "line 4: Usage 'Test', expected one of Training, PublicTest, PrivateTest" in str(error.value)


def test_fer2013_of_the_competition_has_no_labels(tmp_path):
    fer(tmp_path, [[pixels(1)]], ("pixels",), "test.csv")
    with pytest.raises(UserError, match="which holds test.csv; expected fer2013.csv or icml_face_data.csv, or train"):
        read_fer(tmp_path)
    fer(tmp_path, [[0, pixels(1)]], ("emotion", "pixels"))
    with pytest.raises(UserError, match="got the columns emotion, pixels, expected Usage too"):
        read_fer(tmp_path)


def test_fer2013_as_folders_in_any_order_of_names(tmp_path):
    names = ("surprise", "fear", "disgust", "happy", "sad", "angry", "neutral")
    for split in ("train", "test"):
        for i, name in enumerate(names):
            save(tmp_path / split / name / "a.png", tone(i), (48, 48))
    data = read_fer(tmp_path)
    assert data.classes == EXPRESSIONS and data.folders == names
    expect_each_class_to_have_its_pixels(data)
    assert data.notes[1].startswith("test of FER2013: 7 images, officially 7178: surprise 1 of 831")
    (tmp_path / "train/fear/a.png").unlink()
    (tmp_path / "train/fear").rmdir()
    (tmp_path / "test/fear/a.png").unlink()
    (tmp_path / "test/fear").rmdir()
    with pytest.raises(UserError, match="got no folder of fear in .*train, expected every class"):
        read_fer(tmp_path)


def test_fer2013_trains_through_the_command_line(tmp_path, capsys):
    fer(tmp_path, faces())
    scores = train_and_evaluate(tmp_path, tmp_path, capsys, "--data=fer2013")
    assert scores["images"] == {"val": [2] * 7, "test": [2] * 7}


# FERPlus


def read_plus(root, *options):
    return ferplus.Options(str(root), *options).read(SIZE, 0)


def test_ferplus_votes_by_hand():
    """neutral happiness surprise sadness anger disgust fear contempt unknown NF"""
    assert ferplus.majority((4, 0, 0, 4, 1, 0, 0, 0, 1, 0)) is None
    assert ferplus.majority((4, 1, 1, 3, 1, 0, 0, 0, 0, 0)) == "neutral"  # 4 of 7
    assert ferplus.majority((5, 0, 0, 5, 0, 0, 0, 0, 0, 0)) is None  # half is no majority
    assert ferplus.majority((2, 0, 0, 0, 0, 0, 0, 0, 8, 0)) == "unknown"
    assert ferplus.majority((1,) * 10) is None and ferplus.most((1,) * 10) is None
    assert ferplus.most((4, 0, 0, 4, 1, 0, 0, 0, 1, 0)) == "neutral"
    shares = dict(zip(CANONICAL, ferplus.distribution((4, 0, 0, 2, 1, 0, 0, 2, 1, 0), CANONICAL), strict=True))
    assert shares == {name: {"neutral": 0.5, "sadness": 0.25, "contempt": 0.25}.get(name, 0) for name in CANONICAL}


def test_ferplus_official_counts_are_the_paper_s():
    assert [sum(counts[:7]) for counts in ferplus.OFFICIAL.values()] == [24941, 3186, 3137]
    assert [sum(counts) for counts in ferplus.OFFICIAL.values()] == [25060, 3199, 3153]
    assert [sum(counts) for counts in ferplus.OLDER.values()] == [25045, 3191, 3137]
    assert max(ferplus.OFFICIAL["train"][:7]) / min(ferplus.OFFICIAL["train"][:7]) == pytest.approx(73.4, abs=0.05)


@pytest.mark.parametrize("order", [ferplus.COLUMNS, sorted(ferplus.COLUMNS)])
def test_ferplus_from_both_tables(order, tmp_path):
    odd = [
        ("", [0] * 9 + [10]),  # no face, and no name
        ("fer1.png", [0] * 8 + [9, 1]),
        ("fer2.png", [4, 0, 0, 4, 1, 0, 0, 0, 1, 0]),
        ("fer3.png", [1, 0, 0, 1, 0, 0, 0, 8, 0, 0]),
        ("fer3.png", [0, 0, 0, 1, 0, 0, 0, 8, 0, 0]),  # nine votes, and a name that is there twice
    ]
    plus(tmp_path, more=odd, order=order)
    data = read_plus(tmp_path)
    assert data.classes == EXPRESSIONS and list(data.splits) == ["train", "val", "test"]
    expect_each_class_to_have_its_pixels(data)
    assert data.counts == (1,) * 7
    assert data.notes[0].startswith("8 of 29 rows of ")
    assert data.notes[0].endswith("fer2013.csv are left out: 5 contempt, 1 NF, 1 unknown, 1 without a majority")
    assert "majorities in train of FERPlus: 10 images, officially 25060" in data.notes[1]
    with_contempt = read_plus(tmp_path, "majority", True)
    assert with_contempt.classes == CANONICAL and with_contempt.counts == (1,) * 7 + (3,)
    assert read_plus(tmp_path, "argmax").counts == (1, 1, 1, 1, 1, 1, 2)


def test_ferplus_soft_votes_are_distributions_to_train_on(tmp_path):
    plus(tmp_path, more=[("fer2.png", [4, 0, 0, 4, 1, 0, 0, 0, 1, 0]), ("fer3.png", [3, 0, 0, 0, 2, 0, 0, 2, 3, 0])])
    data = read_plus(tmp_path, "soft")
    assert data.train.labels.dtype == torch.float32 and data.train.labels.shape == (9, 7)
    assert torch.equal(data.train.labels[:7], torch.eye(7).flip(0))
    neutral, sadness, anger = (EXPRESSIONS.index(name) for name in ("neutral", "sadness", "anger"))
    assert data.train.labels[7, [neutral, sadness, anger]].tolist() == [0.5, 0.5, 0]
    assert data.train.labels[8, [neutral, sadness, anger]].tolist() == pytest.approx([0.6, 0, 0.4])
    assert torch.allclose(data.train.labels.sum(1), torch.ones(9))
    assert data.splits["val"].labels.dtype == torch.int64 and data.splits["test"].counts(7) == (1,) * 7


def test_ferplus_refuses_tables_of_different_order(tmp_path):
    voted, pixel_rows = plus(tmp_path)
    fer(tmp_path, pixel_rows[:-1])
    with pytest.raises(UserError, match="got 23 rows, expected the 24 of .*fer2013new.csv"):
        read_plus(tmp_path)
    fer(tmp_path, pixel_rows[::-1])
    with pytest.raises(UserError, match="got row 1 of test, expected train, as row 1 of fer2013new.csv"):
        read_plus(tmp_path)
    header = ["Usage", "Image name", *ferplus.COLUMNS]
    write_csv(tmp_path / "fer2013new.csv", header, *voted * 5)
    fer(tmp_path, pixel_rows * 5)  # all are labelled anger
    with pytest.raises(UserError, match="14 % agree with the votes.*in another order"):
        read_plus(tmp_path)
    write_csv(tmp_path / "fer2013new.csv", header, *voted[:-1], ["Public", "a.png", *[0] * 10], ["Training", "", "x"])
    with pytest.raises(UserError, match="(?s)got 2 rows.*line 25: Usage 'Public'.*line 26: neutral 'x'"):
        read_plus(tmp_path)


@pytest.mark.parametrize("box", [True, False])
def test_ferplus_from_folders(box, tmp_path):
    plus_folders(tmp_path / "data", box)
    (tmp_path / "fer2013new.csv").write_text("only the votes\n")
    (tmp_path / "data/FER2013Valid/fer0000003.png").unlink()
    data = read_plus(tmp_path)
    assert data.counts == (1,) * 7 and data.splits["val"].counts(7) == (1, 1, 1, 0, 1, 1, 1)
    expect_each_class_to_have_its_pixels(data)
    assert "1 images have rows in label.csv that contradict each other and are left out: fer0000001.png" in data.notes
    assert any(note.startswith("1 rows of label.csv have no image in ") for note in data.notes)
    write_csv(tmp_path / "data/FER2013Test/label.csv", ["fer0000000.png", 1, 2, 3])
    with pytest.raises(UserError, match="label.csv: got 1 rows .*\n  line 1: 3 votes, expected 10: neutral"):
        read_plus(tmp_path)
    (tmp_path / "data/FER2013Test/label.csv").unlink()
    with pytest.raises(UserError, match="got no .*FER2013Test/label.csv"):
        read_plus(tmp_path)


def test_ferplus_folders_and_tables_have_the_same_pixels(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (48, 48), np.uint8)
    save(tmp_path / "a.png", 0)
    Image.fromarray(picture).save(tmp_path / "a.png")
    label = torch.zeros(1, dtype=torch.int64)
    file = decode.read(tmp_path, "a", [tmp_path / "a.png"], label, 64)
    row = decode.read_grey(tmp_path / "a.csv", "a", ["a"], [picture.tobytes()], 48, label, 64)
    assert torch.equal(file.images, row.images.expand(-1, -1, -1, 3))


def test_older_votes_of_ferplus_are_named(monkeypatch):
    monkeypatch.setattr(ferplus, "OFFICIAL", {"train": (2,) * 8})
    monkeypatch.setattr(ferplus, "OLDER", {"train": (1,) * 8})
    voted = [ferplus.Voted("train", "", tuple(votes)) for votes in VOTES.values()]
    assert ferplus._against_official(voted) == [
        "train has the older votes of FERPlus: 8 images have a majority, not 16"
    ]
    assert ferplus._against_official(voted * 2) == []


def test_ferplus_trains_on_soft_votes_through_the_command_line(tmp_path, capsys):
    plus(tmp_path, more=[("fer2.png", [4, 0, 0, 4, 1, 0, 0, 0, 1, 0])])
    options = ["--data=ferplus", "--data.votes=soft", "--data.contempt", "--preset=paper", "--split.choose-on=test"]
    scores = train_and_evaluate(tmp_path, tmp_path, capsys, *options)
    assert scores["classes"] == list(CANONICAL) and scores["images"] == {"val": [1] * 8, "test": [1] * 8}


# AffectNet


def read_affect(root, *options):
    return affectnet.Options(str(root), *options).read(SIZE, 0)


def test_affectnet_of_2017_crops_faces_and_leaves_out_what_is_no_class(tmp_path):
    affect_2017(tmp_path)
    copies(tmp_path / "Manually_Annotated_Images/1")
    data = read_affect(tmp_path)
    assert data.classes == EXPRESSIONS and data.folders == ("3", "4", "5", "1", "2", "6", "0")
    assert list(data.splits) == ["train", "test"] and data.counts == (1,) * 7
    expect_each_class_to_have_its_pixels(data)
    assert "left out: 2 contempt, 2 none, 2 uncertain, 2 no face" in data.notes[0]
    assert data.notes[1].startswith("train of AffectNet: 7 images, officially 283901: surprise 1 of 14090")
    eight = read_affect(tmp_path, True)
    assert eight.classes == CANONICAL and eight.counts == (1,) * 8
    assert "officially 287651" in eight.notes[1] and "officially 4000" in eight.notes[2]
    whole = read_affect(tmp_path, False, False)
    assert whole.train.images[:, 0, 0].min() > 250  # the white around the face


def test_affectnet_of_2017_refuses_boxes_of_other_images(tmp_path):
    affect_2017(tmp_path)
    save(tmp_path / "Manually_Annotated_Images/1/training0.jpg", 9, (30, 20))  # cropped by a user
    with pytest.raises(UserError, match=r"training0.jpg: the face box at \(20, 10\) of 30 x 40 pixels, expected"):
        read_affect(tmp_path)
    assert read_affect(tmp_path, False, False).counts == (1,) * 7


def test_affectnet_of_2017_names_bad_rows_and_missing_files(tmp_path):
    affect_2017(tmp_path)
    (tmp_path / "Manually_Annotated_Images/10/training9.JPG").unlink()  # uncertain: nobody misses it
    (tmp_path / "Manually_Annotated_Images/1/validation0.jpg").rename(
        tmp_path / "Manually_Annotated_Images/1/validation0.PNG"
    )
    (tmp_path / "Manually_Annotated_Images/2/validation1.JPG").unlink()
    data = read_affect(tmp_path)
    assert data.splits["test"].counts(7) == (1, 1, 1, 0, 1, 1, 1)
    assert data.notes[0].startswith("1 rows of Manually_Annotated_file_lists have no image in ")
    lists = tmp_path / "Manually_Annotated_file_lists"
    row = ["1/training0.jpg", 20, 10, 30, 40]
    write_csv(lists / "training.csv", affectnet_header(), [*row, 11], [*row, ""], ["1/a.jpg", "NULL", 1, 2, 3, 0])
    with pytest.raises(UserError) as error:
        read_affect(tmp_path)
    assert "training.csv: got 3 rows that can't be used" in str(error.value)
    assert "line 2: expression '11', expected a number from 0 to 10" in str(error.value)
    assert "line 4: the face box NULL, 1, 2, 3, expected four numbers" in str(error.value)
    write_csv(lists / "training.csv", affectnet_header()[:-1], row)
    with pytest.raises(UserError, match="expected expression too"):
        read_affect(tmp_path)
    (lists / "validation.csv").unlink()
    with pytest.raises(UserError, match="got no .*validation.csv, expected it beside training.csv"):
        read_affect(tmp_path)


def test_affectnet_of_2021(tmp_path):
    affect_2021(tmp_path / "AffectNet")
    data = read_affect(tmp_path)
    assert data.classes == EXPRESSIONS and data.counts == (1,) * 7
    expect_each_class_to_have_its_pixels(data)
    eight = read_affect(tmp_path, True)
    assert eight.splits["test"].counts(8) == (1,) * 8 and "officially 3999" in eight.notes[-1]
    train = tmp_path / "AffectNet/train_set"
    (train / "images/3.jpg").rename(train / "images/99.jpg")
    np.save(train / "annotations/9_exp.npy", np.array("3"))
    save(train / "images/9.PNG", tone(0))
    data = read_affect(tmp_path)
    assert data.notes[0].startswith("1 rows of annotations have no image in ") and data.notes[0].endswith("3.jpg")
    assert data.notes[1].endswith("have no row and are left out: 99.jpg")


def test_affectnet_of_2021_names_bad_annotations(tmp_path):
    affect_2021(tmp_path)
    annotations = tmp_path / "train_set/annotations"
    np.save(annotations / "0_exp.npy", np.array("12"))
    (annotations / "1_exp.npy").write_bytes(b"")
    np.save(annotations / "2_exp.npy", np.array(["1", "2"]))
    np.save(annotations / "3_exp.npy", np.array({"expression": 1}), allow_pickle=True)
    with pytest.raises(UserError) as error:
        read_affect(tmp_path)
    assert "annotations: got 4 rows that can't be used" in str(error.value)
    assert "0_exp.npy: expression '12', expected a number from 0 to 10" in str(error.value)
    assert str(error.value).count("expected an array of one number") == 3


def test_affectnet_as_folders(tmp_path):
    for split in ("train", "val"):
        for number in range(9):
            face = CANONICAL.index(affectnet.NUMBERS[number]) if number < 8 else 0
            save(tmp_path / split / str(number) / "a.jpg", tone(face))
    data = read_affect(tmp_path)
    assert data.classes == EXPRESSIONS and list(data.splits) == ["train", "test"]
    assert data.notes[0] == "folders that are left out: 7, 8"
    expect_each_class_to_have_its_pixels(data)
    assert read_affect(tmp_path, True).classes == CANONICAL


def test_affectnet_trains_through_the_command_line(tmp_path, capsys):
    affect_2021(tmp_path / "data")
    scores = train_and_evaluate(tmp_path / "data", tmp_path, capsys, "--data=affectnet")
    assert scores["images"] == {"test": [1] * 7}


def test_an_artificial_imbalance_and_a_held_out_part_work_on_rows(tmp_path):
    raf(tmp_path, each=8)
    split = SplitOptions("held-out", hold_out=0.25, imbalance=4.0)
    data = prepare(dataclasses.replace(baseline(), data=raf_db.Options(str(tmp_path)), image_size=SIZE, split=split))
    assert list(data.splits) == ["train", "held-out", "test"] and data.chooser == "held-out"
    counts = torch.tensor(data.counts) + torch.tensor(data.splits["held-out"].counts(7))
    assert counts.max() == 8 and counts.min() == 2


def test_every_command_of_the_docs_reads_the_folder_of_its_section(tmp_path, monkeypatch):
    """Commands that train are taken as far as the images; the others run as they are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("REBALFER_DATA_CACHE", str(tmp_path / "cache"))
    raf(tmp_path / "data/basic")
    for split in ("train", "test"):
        for number in range(1, 8):
            save(tmp_path / f"data/DATASET/{split}/{number}/a.png", tone(number - 1))
            names = ("surprise", "fear", "suprise", "2_happy", "sad", "angry", "unknown")
            save(tmp_path / f"data/faces/{split}/{names[number - 1]}/a.png", tone(number - 1))
    plus(tmp_path / "data/ferplus")
    fer(tmp_path / "data/fer2013", faces())
    affect_2021(tmp_path / "data/AffectNet")

    text = (Path(__file__).parents[2] / "docs/datasets.md").read_text()
    lines = [line for line in text.replace("\\\n", "").splitlines() if line.startswith("python -m trainer ")]
    commands = [c for c in (shlex.split(line)[3:] for line in lines) if c[0] != "align"]  # which test_align.py runs
    read = set()
    for command in commands:
        options = parse(command)
        if command[0] == "cache":
            assert main(command) == 0
            continue
        config = options.config
        sizes = {"train_size": 20, "test_size": 20} if config.data.name == "synthetic" else {}
        of, split = dataclasses.replace(config.data, **sizes), dataclasses.replace(config.split, choose_on="test")
        data = prepare(dataclasses.replace(config, image_size=SIZE, data=of, split=split))
        if config.data.name not in ("imagefolder", "synthetic"):
            expect_each_class_to_have_its_pixels(data)
        assert data.classes[:2] == ("surprise", "fear") and min(data.counts) >= 1
        read.add(config.data.name)
    assert read == set(found("data"))
    assert [c[1] for c in commands if c[0] == "cache"] == ["--data", "--verify", "--delete"]
    assert not list((tmp_path / "cache").iterdir())
