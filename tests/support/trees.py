"""Tiny trees in the real format of each data set, in which the tone of an image says its class; and what a run of the
command line makes of one.

trees.raf(root)    EmoLabel and Image/aligned of RAF-DB, two images of each class and split
"""

import csv
import json

import numpy as np
from PIL import Image

from trainer.__main__ import main
from trainer.data import affectnet, fer2013, ferplus
from trainer.data.labels import CANONICAL, EXPRESSIONS


def save(path, tone, size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, tone).save(path)


def tone(index):
    """A grey value that says which class an image is of."""
    return 20 + 30 * index


def write_csv(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as text:
        csv.writer(text).writerows(lines)


def copies(path, ending=".jpg"):
    """The system's own files, which belong to no data set."""
    path.mkdir(parents=True, exist_ok=True)
    for name in (".DS_Store", "Thumbs.db", f"._train_00001{ending}"):
        (path / name).write_bytes(b"no image")


def train_and_evaluate(root, tmp_path, capsys, *options):
    """One epoch through the command line, then the accuracies of its best checkpoint; returns these."""
    tiny = '{"channels": [4, 4, 8, 8], "stem_width": 4}'
    flags = ["--preset=baseline", f"--output.root={tmp_path}/runs", "--name=a", f"--data.path={root}"]
    flags += ["--split.choose-on=test"]
    flags += ["--backbone=resnet10t", f"--backbone.options={tiny}", "--image-size=32", "--batch-size=8", "--epochs=1"]
    flags += ["--no-output.pictures", "--compute.device=cpu", "--compute.backend=reference"]
    assert main(["train", *flags, *options]) == 0
    out = tmp_path / "scores.json"
    assert main(["evaluate", f"{tmp_path}/runs/a", f"--out={out}", "--device=cpu"]) == 0
    capsys.readouterr()
    return json.loads(out.read_text())


# RAF-DB


def raf(root, aligned="_aligned", suffix=".jpg", numbers=range(1, 8), each=2):
    """Labels in falling order, so that neither the order of lines nor of names is that of the classes."""
    lines = []
    for split in ("test", "train"):
        for i, number in enumerate(sorted(numbers, reverse=True) * each, 1):
            lines.append(f"{split}_{i:05d}.jpg {number}")
            save(root / f"Image/aligned/{split}_{i:05d}{aligned}{suffix}", tone(number - 1))
    relist(root, lines)
    return lines


def relist(root, lines):
    (root / "EmoLabel").mkdir(exist_ok=True)
    (root / "EmoLabel/list_patition_label.txt").write_text("\r\n".join(lines) + "\r\n\r\n")


# FER2013


def pixels(value):
    return " ".join([str(value)] * 2304)


def faces(each=2):
    """emotion, pixels and Usage of FER2013, of which the tone is that of the class in our order."""
    order = [(usage, emotion) for usage in fer2013.SPLITS for _ in range(each) for emotion in range(7)]
    return [[e, pixels(tone(EXPRESSIONS.index(fer2013.NUMBERS[e]))), usage] for usage, e in order]


def fer(root, lines, header=("emotion", "pixels", "Usage"), name="fer2013.csv"):
    write_csv(root / name, header, *lines)


# FERPlus

VOTES = {name: [8 if c == name else 2 if c == "unknown" else 0 for c in ferplus.COLUMNS] for name in CANONICAL}
USAGES = {split: usage for usage, split in fer2013.SPLITS.items()}


def plus(root, classes=CANONICAL, more=(), order=ferplus.COLUMNS):
    """Rows of both files, class by class in each split, and ``more`` in train: (name, votes)."""
    voted, pixel_rows = [], []
    for split in fer2013.SPLITS.values():
        named = [(f"fer{split}{name}.png", VOTES[name], CANONICAL.index(name)) for name in reversed(classes)]
        named += [(name, votes, 7) for name, votes in more] if split == "train" else []
        for name, votes, index in named:
            by_column = dict(zip(ferplus.COLUMNS, votes, strict=True))
            voted.append([USAGES[split], name, *(by_column[c] for c in order)])
            pixel_rows.append([0, pixels(tone(index)), USAGES[split]])
    write_csv(root / "fer2013new.csv", ["Usage", "Image name", *order], *voted)
    fer(root, pixel_rows)
    return voted, pixel_rows


def plus_folders(root, box=True):
    for split, folder in ferplus.FOLDERS.items():
        lines = []
        for i, name in enumerate(CANONICAL):
            lines.append([f"fer{i:07d}.png", *(["(0, 0, 48, 48)"] if box else []), *VOTES[name]])
            save(root / folder / f"fer{i:07d}.png", tone(i), (48, 48))
        if split == "train":
            lines += [lines[0], [lines[1][0], *lines[2][1:]]]  # the same again; and a contradiction
            save(root / folder / "fer0000001.png", tone(1), (48, 48))
            save(root / folder / "fer0000011.png", tone(1), (48, 48))
            lines.append(["fer0000011.png", *lines[1][1:]])
        copies(root / folder, ".png")
        write_csv(root / folder / "label.csv", *lines)


# AffectNet

BOX = {"face_x": 20, "face_y": 10, "face_width": 30, "face_height": 40}


def affect_2017(root, train=range(11), val=range(11)):
    """Each image is white around the face box, which has the tone of its class; most columns as in the release."""
    header = ["subDirectory_filePath", *BOX, "facial_landmarks", "expression", "valence", "arousal"]
    for name, numbers in (("training", train), ("validation", val)):
        lines = []
        for number in numbers:
            face = CANONICAL.index(affectnet.NUMBERS[number]) if number < 8 else 0
            path = f"{number + 1}/{name}{number}.{'JPG' if number % 2 else 'jpg'}"
            image = Image.new("L", (80, 60), 255)
            image.paste(tone(face), (20, 10, 50, 50))
            (root / f"Manually_Annotated_Images/{number + 1}").mkdir(parents=True, exist_ok=True)
            image.save(root / "Manually_Annotated_Images" / path, "JPEG")
            box = list(BOX.values()) if number != 10 else ["NULL"] * 4
            lines.append([path, *box, "1.0;2.0", number, "-2", "-2"])
        write_csv(root / f"Manually_Annotated_file_lists/{name}.csv", header, *lines)


def affectnet_header():
    return ["subDirectory_filePath", *BOX, "expression"]


def affect_2021(root, numbers=range(8)):
    for split in ("train_set", "val_set"):
        (root / split / "annotations").mkdir(parents=True)
        for number in numbers:
            save(root / split / f"images/{number}.jpg", tone(CANONICAL.index(affectnet.NUMBERS[number])))
            np.save(root / split / f"annotations/{number}_exp.npy", np.array(str(number)))
            np.save(root / split / f"annotations/{number}_val.npy", np.array("0.5"))
        copies(root / split / "images")
        copies(root / split / "annotations", "_exp.npy")
