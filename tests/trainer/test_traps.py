"""What people's folders hold, through the command line: odd images become the right pixels, bad ones one clear error.

Nothing is written into the folder of a data set, whatever happens.
"""

import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import runs, trees

from trainer import checkpoint
from trainer.__main__ import main, parse
from trainer.data import cache, fer2013, prepare, raf_db
from trainer.data.ferplus import COLUMNS
from trainer.data.labels import EXPRESSIONS

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as in decode.py

SIZE = 32  # of the images here and of what is kept of them: no pixel is resized

#: Four quarters of different colours: no rotation or mirror image of them is the same.
COLOURS = np.array([[[250, 10, 20], [30, 240, 40]], [[50, 60, 230], [200, 190, 60]]], np.uint8)
PICTURE = COLOURS.repeat(SIZE // 2, 0).repeat(SIZE // 2, 1)
GREY = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) % 256


def run(command, root, folder, *options):
    """The exit status of ``command`` on the folders below ``root``, which must not change."""
    before = contents(root)
    flags = [f"--data.path={root}", f"--output.cache={folder}/cache", f"--image-size={SIZE}"]
    if command == "train":
        flags += ["--preset=baseline", f"--output.root={folder}/runs", "--name=a", "--backbone=resnet10t"]
        flags += [f"--backbone.options={json.dumps(runs.TINY)}", "--batch-size=8", "--epochs=1"]
        flags += [
            "--split.choose-on=test",
            "--no-output.pictures",
            "--compute.device=cpu",
            "--compute.backend=reference",
        ]
    status = main([command, *flags, *options])
    assert contents(root) == before
    return status


def evaluate(folder):
    """What the best checkpoint of that run has to say."""
    out = folder / "scores.json"
    assert main(["evaluate", f"{folder}/runs/a", f"--out={out}", "--device=cpu", "--overwrite"]) == 0
    return json.loads(out.read_text())


def contents(root):
    return {f: f.is_dir() or (f.stat().st_mtime_ns, f.read_bytes()) for f in root.rglob("*") if f.exists()}


def kept(folder, part="train"):
    """Path below the data's folder -> its pixels, as the runs read them."""
    (place,) = (f for f in cache.parts(folder / "cache") if f"-{part}-" in f.name)
    pixels, index = np.load(place / "pixels.npy"), json.loads((place / "index.json").read_text())
    return {name.partition(f"/{part}/")[2]: row for name, row in zip(index["images"], pixels, strict=True)}


# Odd images


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(number):
    """PICTURE as a camera stores it that was held so that EXIF's orientation is ``number``."""
    stored = {
        1: PICTURE, 2: PICTURE[:, ::-1], 3: PICTURE[::-1, ::-1], 4: PICTURE[::-1], 5: PICTURE.swapaxes(0, 1),
        6: np.rot90(PICTURE), 7: np.rot90(PICTURE, 2).swapaxes(0, 1), 8: np.rot90(PICTURE, -1),
    }[number]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = number
    return Image.fromarray(np.ascontiguousarray(stored)), exif


def png(colour_type, rows, bits=16):
    """A PNG file written by hand: rows of big-endian samples."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    width = rows.shape[1] // {0: 1, 2: 3, 4: 2}[colour_type]
    header = struct.pack(">IIBBBBB", width, rows.shape[0], bits, colour_type, 0, 0, 0)
    data = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def rgb(grey):
    return np.asarray(grey).astype(np.uint8)[..., None].repeat(3, 2)


def half_seen(alpha):
    """PICTURE with that opacity in its left half, and what one sees of it on mid-grey, to rounding."""
    opacity = np.full((SIZE, SIZE), 255, np.uint8)
    opacity[:, : SIZE // 2] = alpha
    share = opacity[..., None] / 255
    return np.dstack([PICTURE, opacity]), share * PICTURE + (1 - share) * 128


def palette(**options):
    """Four colours by number, one of them perhaps transparent."""
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8).repeat(16, 0).repeat(16, 1), "P")
    image.putpalette(COLOURS.tobytes())
    return encoded(image, "PNG", **options)


def without_quarter():
    expected = PICTURE.copy()
    expected[:16, 16:] = 128
    return expected


def ink(kind, **options):
    """Cyan, magenta, yellow and black, and what is left of white light."""
    inks = np.array([[[0, 200, 100, 0], [255, 0, 0, 0]], [[0, 0, 0, 128], [50, 50, 50, 51]]], np.uint8)
    inks = inks.repeat(16, 0).repeat(16, 1)
    light = 1 - inks / 255.0
    return encoded(Image.fromarray(inks, "CMYK"), kind, **options), 255 * light[..., :3] * light[..., 3:]


def animation():
    first, second = (Image.fromarray(a).quantize(4) for a in (PICTURE, PICTURE[::-1].copy()))
    return encoded(first, "GIF", save_all=True, append_images=[second])


SOLID = Image.fromarray(PICTURE)
DEEP = GREY.astype(np.uint32) * 256 + 77  # of 16 bits, the upper 8 count
SEEN, EXPECTED_SEEN = half_seen(100)
CMYK, LIGHT = ink("TIFF")
CMYK_JPEG, _ = ink("JPEG", quality=100)

#: Name of the file -> its content, the pixels expected, and how far from them a pixel may be.
ODD = {
    "capital.PNG": (encoded(SOLID, "PNG"), PICTURE, 0),
    "really a png.jpg": (encoded(SOLID, "PNG"), PICTURE, 0),
    "no suffix": (encoded(SOLID, "BMP"), PICTURE, 0),
    "notes.txt": (encoded(SOLID, "PNG"), PICTURE, 0),
    "deep/er/nested.bmp": (encoded(SOLID, "BMP"), PICTURE, 0),
    "a.tif": (encoded(SOLID, "TIFF"), PICTURE, 0),
    "a.webp": (encoded(SOLID, "WEBP", lossless=True), PICTURE, 0),
    "a.jfif": (encoded(SOLID, "JPEG", quality=100, subsampling=0), PICTURE, 3),
    "a.jpe": (encoded(Image.fromarray(rgb(GREY)).convert("L"), "JPEG", quality=100), rgb(GREY), 3),
    "moves.gif": (animation(), PICTURE, 0),
    "grey.png": (encoded(Image.fromarray(GREY.astype(np.uint8)), "PNG"), rgb(GREY), 0),
    "bilevel.png": (encoded(Image.fromarray(GREY > 99), "PNG"), rgb(255 * (GREY > 99)), 0),
    "16 bits.png": (png(0, DEEP), rgb(GREY), 0),
    "16 bits.tif": (encoded(Image.fromarray(DEEP.astype(np.uint16)), "TIFF"), rgb(GREY), 0),
    "16 bits, other end.tif": (encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"), rgb(GREY), 0),
    "16 bits, colours.png": (png(2, PICTURE.reshape(SIZE, -1) * np.uint32(256) + 77), PICTURE, 0),
    "16 bits, unseen.png": (png(4, np.dstack([DEEP, 0 * DEEP]).reshape(SIZE, -1)), rgb(0 * GREY + 128), 0),
    "cmyk.tif": (CMYK, LIGHT, 1),
    "cmyk.jpg": (CMYK_JPEG, LIGHT, 4),
    "palette.png": (palette(), PICTURE, 0),
    "palette with a hole.png": (palette(transparency=1), without_quarter(), 0),
    "palette, by opacity.png": (palette(transparency=b"\xff\0\xff\xff"), without_quarter(), 0),
    "colour key.png": (encoded(SOLID, "PNG", transparency=(30, 240, 40)), without_quarter(), 0),
    "alpha.png": (encoded(Image.fromarray(SEEN), "PNG"), EXPECTED_SEEN, 1),
    "alpha, grey.png": (
        encoded(Image.fromarray(np.dstack([GREY, 0 * GREY]).astype(np.uint8), "LA"), "PNG"), rgb(0 * GREY + 128), 0
    ),
    **{
        f"orientation {n}.{kind}": (encoded(image, kind, exif=exif, **options), PICTURE, error)
        for n in range(1, 9)
        for image, exif in [oriented(n)]
        for kind, options, error in (("png", {}, 0), ("jpeg", {"quality": 100, "subsampling": 0}, 3))
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder in which a run of the odd images has finished; its classes are light or dark all over in val."""
    folder = tmp_path_factory.mktemp("odd")
    for name, (content, _, _) in ODD.items():
        path = folder / "data/train/fear" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    trees.copies(folder / "data/train/fear")
    trees.copies(folder / "data/train/@eaDir")
    trees.save(folder / "data/train/anger/a.png", 9)
    for name in ("fear", "anger"):
        trees.save(folder / f"data/val/{name}/a.png", 90 + len(name))
    assert run("train", folder / "data", folder, "--data=imagefolder") == 0
    assert evaluate(folder)["images"] == {"val": [1, 1]}
    return kept(folder)


@pytest.mark.parametrize("name", ODD)
def test_odd_images_have_the_right_pixels(name, odd):
    _, expected, error = ODD[name]
    assert np.abs(odd[f"fear/{name}"].astype(float) - expected).max() <= error


def test_no_other_file_is_an_image(odd):
    assert set(odd) == {"anger/a.png"} | {f"fear/{name}" for name in ODD}


# Bad images


def header(width, height):
    """The begin of a PNG file of that size, the rest of which never came."""
    content = png(2, np.zeros((1, 3)), 8)
    new = struct.pack(">II", width, height)
    content = content.replace(content[16:24], new, 1)
    return content.replace(content[29:33], struct.pack(">I", zlib.crc32(content[12:29])), 1)


JPEG = encoded(Image.effect_noise((64, 64), 90), "JPEG")
#: Name of the file -> its content and what is said of it.
BAD = {
    "empty.jpg": (b"", "empty"),
    "page.jpg": (b"<html>404</html>", "no image, or of a kind that Pillow does not read"),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "image file is truncated"),
    "truncated.png": (encoded(SOLID.resize((999, 999)), "PNG")[:1500], "image file is truncated"),
    "one pixel.png": (png(0, DEEP[:1, :1]), "1 x 1 pixels, expected a side of at least 8, sides within 1 to 8"),
    "strip.png": (encoded(Image.new("L", (3000, 20)), "PNG"), "3000 x 20 pixels, expected a side of"),
    "high.png": (encoded(Image.new("L", (9, 90)), "PNG"), "9 x 90 pixels, expected a side of"),
    "enormous.png": (header(12000, 9000), "12000 x 9000 pixels, expected a side of at least 8, sides within 1 to 8 "),
    "bomb.png": (header(60000, 60000), "Image size (3600000000 pixels) exceeds limit"),
    "float.tif": (encoded(Image.fromarray(np.zeros((20, 20), np.float32)), "TIFF"), "floating-point pixels, expected"),
    "32 bits.tif": (encoded(Image.fromarray(np.full((20, 20), 70000, np.int32)), "TIFF"), "pixels of 32 bits"),
    "line\nbreak.png": (b"text", "no image"),
    "caf\udce9.png": (b"text", "no image"),
    **{f"zz{i}.png": (b"", "empty") for i in range(9)},
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What the command line says of a folder with these and of one link to nothing."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("train/fear", "train/anger", "val/fear", "val/anger"):
        trees.save(folder / f"data/{name}/good.png", 40)
    for name, (content, _) in BAD.items():
        (folder / "data/train/anger" / name).write_bytes(content)
    (folder / "data/train/anger/a link.png").symlink_to("nothing")
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr("sys.stderr", out)
        assert run("train", folder / "data", folder, "--data=imagefolder") == 2
    assert not (folder / "runs").exists() or not list((folder / "runs").iterdir())
    return out.getvalue()


def test_bad_images_are_counted_and_the_first_20_named(refused):
    first, *rest = refused[refused.index("error: ") :].splitlines()
    assert first == f"error: data: got {len(BAD) + 1} files that can't be read as images:"
    assert len(rest) == 21 and rest[-1] == f"  and {len(BAD) + 1 - 20} more"
    assert "Traceback" not in refused


@pytest.mark.parametrize("name", [name for name in BAD if not name.startswith("zz")])
def test_bad_images_are_named_with_what_is_wrong(name, refused):
    spelt = name.replace("\n", r"\n").replace("\udce9", r"\udce9")
    assert f"/data/train/anger/{spelt}: {BAD[name][1]}" in refused


def test_a_link_to_nothing_is_a_bad_image(refused):
    assert "/data/train/anger/a link.png: No such file or directory\n" in refused


# Untidy copies of each data set


def untidy_raf(root):
    """A row without its image, images that have no row, other suffixes, a nested folder; no fear in test."""
    rows = trees.raf(root / "basic", each=3)
    trees.relist(root / "basic", [row for row in rows if not (row.startswith("test") and row.endswith(" 2"))])
    trees.copies(root / "basic/Image/aligned")
    trees.copies(root / "__MACOSX/basic/EmoLabel")
    aligned = root / "basic/Image/aligned"
    (aligned / "train_00001_aligned.jpg").rename(aligned / "train_00001_aligned.JPG")
    (aligned / "part 2").mkdir()
    (aligned / "train_00002_aligned.jpg").rename(aligned / "part 2/train_00002_aligned.jpeg")
    (aligned / "train_00003_aligned.jpg").unlink()
    trees.save(aligned / "train_00099_aligned.jpg", 1)
    (aligned / "read me.txt").write_text("faces")
    notes = ["1 rows of list_patition_label.txt have no image in ", "1 files in ", "4 images in "]
    return "raf_db", {"test": [3, 0, 3, 3, 3, 3, 3]}, [3, 3, 3, 3, 2, 3, 3], notes


def untidy_ferplus(root):
    """A contradiction, a missing image, another suffix, an image without a row; no fear in FER2013Test."""
    trees.plus_folders(root / "data")
    test = root / "data/FER2013Test"
    (test / "fer0000001.png").unlink()
    (test / "fer0000000.png").rename(test / "fer0000000.PNG")
    trees.save(test / "more/fer0000077.png", 3)
    notes = ["1 images have rows in label.csv that contradict each other", "1 rows of label.csv have no image in "]
    return "ferplus", {"val": [1] * 7, "test": [1, 0, 1, 1, 1, 1, 1]}, [1] * 7, notes


def untidy_affectnet(root):
    """Another suffix, a missing image, an image without a row; no fear in validation."""
    trees.affect_2017(root, val=[n for n in range(11) if n != 4])
    trees.copies(root / "Manually_Annotated_Images/3")
    images = root / "Manually_Annotated_Images"
    (images / "1/training0.jpg").rename(images / "1/training0.JPEG")
    (images / "4/validation3.JPG").unlink()
    trees.save(images / "12/other.png", 3)
    notes = ["1 rows of Manually_Annotated_file_lists have no image in ", "1 images in ", "8 of 20 rows of "]
    return "affectnet", {"test": [0, 0, 1, 1, 1, 1, 1]}, [1] * 7, notes


def untidy_fer2013(root):
    """The folders in another case, with nested and stray files; no fear in test."""
    for split in ("Train", "test"):
        for i, name in enumerate(("Surprise", "fear", "disgust", "happy", "sad", "0_angry", "neutral")):
            if split == "Train" or name != "fear":
                trees.save(root / split / name / "deeper" / f"PrivateTest_{i}.JPG", trees.tone(i))
        trees.copies(root / split / "sad")
    (root / "test/sad/list.csv").write_text("nothing")
    trees.copies(root)
    return "fer2013", {"test": [1, 0, 1, 1, 1, 1, 1]}, [1] * 7, ["1 files in ", "test of FER2013: 6 images, officially"]


@pytest.mark.parametrize("untidy", [untidy_raf, untidy_ferplus, untidy_affectnet, untidy_fer2013])
def test_untidy_copies_train_and_say_what_was_left_out(untidy, tmp_path, caplog):
    name, evaluated, counts, notes = untidy(tmp_path / "data")
    assert run("train", tmp_path / "data", tmp_path, f"--data={name}") == 0
    for note in notes:
        assert f"note: {note}" in caplog.text
    saved = checkpoint.read(tmp_path / "runs/a/best.pt")
    assert saved["identity"]["classes"] == list(EXPRESSIONS) and saved["identity"]["counts"]["train"] == counts
    scores = evaluate(tmp_path)
    assert scores["images"] == evaluated
    for split, images in evaluated.items():
        found = scores["scores"][split]
        assert [value is None for value in found["per_class"]] == [n == 0 for n in images]
        there = [value for value in found["per_class"] if value is not None]
        assert found["mean"] == pytest.approx(sum(there) / len(there))


# Labels


def order(names, counts):
    """Labels by counts: name -> how many images; that of the first class of ``names`` is 0."""
    return [label for label, name in enumerate(names) for _ in range(counts[name])]


SIZES = dict(zip(EXPRESSIONS, (7, 2, 3, 8, 6, 4, 5), strict=True))
ALPHABETICAL = sorted(EXPRESSIONS)


def misordered_raf(root):
    labels = order(ALPHABETICAL, SIZES)  # as if they were numbered alphabetically
    for i in range(len(labels)):
        trees.save(root / f"Image/aligned/train_{i:05}_aligned.jpg", 10 + i)
    trees.relist(root, [f"train_{i:05}.jpg {label + 1}" for i, label in enumerate(labels)])
    return "raf_db"


def misordered_fer2013(root):
    trees.fer(root, [[label, trees.pixels(i), "Training"] for i, label in enumerate(order(ALPHABETICAL, SIZES))])
    return "fer2013"


@pytest.mark.parametrize("misordered", [misordered_raf, misordered_fer2013])
def test_labels_in_another_order_are_refused(misordered, tmp_path, monkeypatch, capsys):
    official = {"train": tuple(SIZES.values())}
    monkeypatch.setattr(raf_db, "OFFICIAL", official | {"test": ()})
    monkeypatch.setattr(fer2013, "OFFICIAL", official)
    name = misordered(tmp_path / "data")
    assert run("train", tmp_path / "data", tmp_path, f"--data={name}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data: got the official counts of train of ") and error.count("\n") == 1
    assert " in another order (" in error and "expected labels in the order of the data set" in error


def unknown_raf(root):
    trees.relist(root, [*trees.raf(root), "train_00001.jpg 0"])
    return "raf_db", "list_patition_label.txt", "line 29: label '0', expected a number from 1 to 7"


def unknown_ferplus(root):
    voted, _ = trees.plus(root)
    trees.write_csv(root / "fer2013new.csv", ["Usage", "Image name", *COLUMNS], [*voted[0][:-1], "many"])
    return "ferplus", "fer2013new.csv", "line 2: NF 'many', expected a number from 0 to 10"


def unknown_affectnet(root):
    trees.affect_2021(root)
    np.save(root / "train_set/annotations/3_exp.npy", np.array("11"))
    return "affectnet", "annotations", "3_exp.npy: expression '11', expected a number from 0 to 10"


def unknown_fer2013(root):
    trees.fer(root, [*trees.faces(), [7, trees.pixels(3), "Training"]])
    return "fer2013", "fer2013.csv", "line 44: emotion '7', expected a number from 0 to 6"


@pytest.mark.parametrize("unknown", [unknown_raf, unknown_ferplus, unknown_affectnet, unknown_fer2013])
def test_an_unknown_label_is_named_with_its_line(unknown, tmp_path, capsys):
    name, file, said = unknown(tmp_path / "data")
    assert run("train", tmp_path / "data", tmp_path, f"--data={name}") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and first.endswith(f"/{file}: got 1 rows that can't be used:")
    assert second == f"  {said}"
    assert not list((tmp_path / "runs").glob("*"))


def test_soft_votes_arrive_as_distributions_also_of_a_part_of_the_images(tmp_path):
    """The tone of each image says which votes are its own."""
    votes = [[n, 0, 2, 10 - n - 2, 0, 0, 0, 0, 0, 0] for n in range(2, 7)]
    voted, rows = trees.plus(tmp_path, EXPRESSIONS)
    for i, row in enumerate(votes):
        voted.append(["Training", f"more{i}.png", *row])
        rows.append([6, trees.pixels(240 + i), "Training"])
    trees.write_csv(tmp_path / "fer2013new.csv", ["Usage", "Image name", *COLUMNS], *voted)
    trees.fer(tmp_path, rows)
    flags = ["--data=ferplus", "--data.votes=soft", f"--data.path={tmp_path}", f"--image-size={SIZE}"]
    flags += ["--split.choose-on=test", "--split.imbalance=2"]
    train = prepare(parse(["train", "--preset=paper", *flags]).config).train
    assert train.labels.dtype == torch.float32 and 7 < len(train.labels) < 12
    column = dict(zip(COLUMNS, range(10), strict=True))
    for image, label in zip(train.images, train.labels, strict=True):
        tone = int(image[0, 0, 0])
        expected = [votes[tone - 240][column[name]] / 10 for name in EXPRESSIONS] if tone >= 240 else None
        expected = expected or [float(trees.tone(i) == tone) for i in range(7)]
        assert label.tolist() == pytest.approx(expected)


def test_an_imbalance_factor_leaves_out_by_the_paper_s_rule_and_the_run_says_so(tmp_path, caplog):
    """n_l mu^l over the classes by size: 12, 16 and 8 images at a factor of 8 have mu = 1/2, so 6, 16 and 2 stay."""
    for name, count in (("fear", 12), ("sad", 16), ("anger", 8)):
        for i in range(count):
            trees.save(tmp_path / f"data/train/{name}/{i}.png", 3 * i + count)
        trees.save(tmp_path / f"data/test/{name}/a.png", 200 + count)
    assert run("train", tmp_path / "data", tmp_path, "--data=imagefolder", "--split.imbalance=8") == 0
    rule = "imbalance 8: n_k * 0.5^k by descending size; train keeps 24 of 36 images"
    assert f"note: {rule}\n" in caplog.text
    saved = checkpoint.read(tmp_path / "runs/a/best.pt")
    assert saved["identity"]["classes"] == ["fear", "sadness", "anger"]
    assert saved["identity"]["counts"] == {"train": [6, 16, 2], "test": [1, 1, 1]} and rule in saved["notes"]


def test_an_image_that_is_in_train_and_val_is_counted_by_its_content(tmp_path, caplog):
    for split in ("train", "val"):
        for i, name in enumerate(("fear", "anger")):
            trees.save(tmp_path / f"data/{split}/{name}/a.png", 10 * i + len(split))
    shutil.copy(tmp_path / "data/train/fear/a.png", tmp_path / "data/val/anger/other name.png")
    assert run("train", tmp_path / "data", tmp_path, "--data=imagefolder") == 0
    assert "note: 1 images of val are in train too: val/anger/other name.png = train/fear/a.png\n" in caplog.text
    assert checkpoint.read(tmp_path / "runs/a/best.pt")["notes"][-1].startswith("1 images of val are in train too")


# Places


@pytest.fixture
def few(tmp_path):
    """Two images of two classes in two splits."""
    for split in ("train", "val"):
        for i in range(4):
            trees.save(tmp_path / f"data/{split}/{('fear', 'anger')[i % 2]}/{i}.png", 20 * i + len(split))
    return tmp_path / "data"


def test_names_that_are_no_text_are_read_trained_on_and_continued(few, tmp_path, capsys):
    for split in ("train", "val"):
        trees.save(few / split / "caf\udce9/tab\tand\nline \udcff.png", 99)
    assert run("train", few, tmp_path, "--data=imagefolder") == 0
    assert evaluate(tmp_path)["classes"] == ["fear", "anger", r"caf\udce9"]
    capsys.readouterr().out.encode()  # a terminal of UTF-8 shows all of it
    assert run("train", few, tmp_path, "--data=imagefolder", "--resume", "--epochs=2") == 0
    (few / "train/fear/0.png").unlink()
    assert run("train", few, tmp_path, "--data=imagefolder", "--resume", "--epochs=3") == 2
    assert "1 missing files in train: train/fear/0.png" in capsys.readouterr().err


@pytest.mark.parametrize("what, error", [
    ("iterdir", "error: data: got {0}/train/fear, which can't be read: Permission denied\n"),
    ("read_bytes", "error: data: got 2 files that can't be read as images:\n"
                   "  {0}/train/fear/0.png: Permission denied\n  {0}/train/fear/2.png: Permission denied\n"),
])  # fmt: skip
def test_what_may_not_be_read_is_named(what, error, few, tmp_path, monkeypatch, capsys):
    """Simulated, since nothing is forbidden to root."""
    real = getattr(Path, what)

    def forbidden(path):
        if str(path).startswith(f"{few}/train/fear"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    before = contents(few)
    with monkeypatch.context() as patch:
        patch.setattr(Path, what, forbidden)
        flags = ["--data=imagefolder", f"--data.path={few}", f"--image-size={SIZE}", f"--output.root={tmp_path}/runs"]
        assert main(["train", "--preset=baseline", *flags, "--compute.device=cpu", "--backbone=resnet10t"]) == 2
    assert capsys.readouterr().err == error.format(few)
    assert contents(few) == before and not list((tmp_path / "runs").glob("*"))


def test_a_place_that_can_t_hold_the_cache_is_said_and_not_needed(few, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert run("train", few, tmp_path, "--data=imagefolder") == 0
    assert "note: decoded images are not kept: " in caplog.text and (tmp_path / "cache").read_text() == "a file"
    assert evaluate(tmp_path)["images"] == {"val": [2, 2]}


@contextlib.contextmanager
def full(size):
    """The kernel refuses to make any file larger than ``size`` bytes, as a disk without room does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_the_cache_and_not_the_run(few, tmp_path, caplog, capsys):
    assert run("train", few, tmp_path, "--data=imagefolder", "--image-size=256") == 0
    expected = checkpoint.read(tmp_path / "runs/a/best.pt")
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "runs")
    with full(700_000):  # the pixels of either part are 786,560 bytes
        assert run("train", few, tmp_path, "--data=imagefolder", "--image-size=256") == 0
        capsys.readouterr()
        assert run("cache", few, tmp_path, "--data=imagefolder", "--image-size=256") == 2
    error = rf"error: output.cache: {tmp_path}/cache/data-train-256px-\w+ can't be written: File too large\n"
    assert re.fullmatch(error, capsys.readouterr().err)
    assert "note: decoded images are not kept: " in caplog.text and "File too large" in caplog.text
    found = checkpoint.read(tmp_path / "runs/a/best.pt")
    assert found["identity"] == expected["identity"]
    assert all(torch.equal(value, expected["model"][key]) for key, value in found["model"].items())
    assert not list((tmp_path / "cache").rglob("pixels*"))


def test_a_disk_that_is_full_for_the_checkpoint_is_one_line(few, tmp_path, capsys):
    assert run("train", few, tmp_path, "--data=imagefolder") == 0
    before = contents(tmp_path / "runs")
    capsys.readouterr()
    with full(1000):
        assert run("train", few, tmp_path, "--data=imagefolder", "--resume", "--epochs=2") == 2
    assert re.fullmatch(rf"error: {tmp_path}/runs/a/\S+: can't be written: File too large\n", capsys.readouterr().err)
    assert contents(tmp_path / "runs") == before
