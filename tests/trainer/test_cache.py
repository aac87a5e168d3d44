"""Decoded images are kept on the disk: what is read again, what is not, and what a kill, a change or damage leaves."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import checkpoint, presets
from trainer.__main__ import main
from trainer.config import SplitOptions, UserError
from trainer.data import cache, decode, imagefolder, prepare

SIZE = 16


@pytest.fixture
def faces(tmp_path):
    """Two classes, six and two images, each of one tone."""
    root = tmp_path / "faces"
    for split, count in (("train", 6), ("test", 2)):
        for i in range(count):
            write(root / split / ("fear" if i % 2 else "anger") / f"{i}.png", 10 + 20 * i)
    return root


def write(path, tone):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (tone, tone, tone)).save(path)


def tones(split):
    return split.images[:, 0, 0, 0].tolist()


@pytest.fixture
def load(faces, tmp_path, monkeypatch):
    """Reads the data set; a list of the files that were decoded is its attribute."""
    real = decode.decode

    def counted(content, size, box=None):
        load.decoded += 1
        return real(content, size, box)

    def load(place=tmp_path / "cache"):
        load.decoded = 0
        config = presets.paper()
        config = dataclasses.replace(
            config,
            data=imagefolder.Options(str(faces)),
            image_size=SIZE,
            split=SplitOptions("test"),
            output=dataclasses.replace(config.output, cache=str(place)),
        )
        return prepare(config)

    load.decoded = 0
    monkeypatch.setattr(decode, "decode", counted)
    return load


def test_each_image_is_decoded_once(load, tmp_path):
    first, first_decoded = load(), load.decoded
    again, again_decoded = load(), load.decoded
    plain, plain_decoded = load("off"), load.decoded
    assert (first_decoded, again_decoded, plain_decoded) == (8, 0, 8)
    for data in (first, again):
        for name, split in data.splits.items():
            assert torch.equal(split.images, plain.splits[name].images)
            assert torch.equal(split.labels, plain.splits[name].labels)
            assert split.names == plain.splits[name].names and split.digests == plain.splits[name].digests
    (train, *_) = [folder for folder in cache.parts(tmp_path / "cache") if "-train-" in folder.name]
    assert np.load(train / "pixels.npy").shape == (6, SIZE, SIZE, 3)


def test_a_changed_new_or_missing_image_alone_is_decoded(load, faces):
    load()
    write(faces / "train/fear/1.png", 200)
    assert 200 in tones(load().train) and load.decoded == 1
    write(faces / "train/fear/9.png", 90)
    assert len(load().train.labels) == 7 and load.decoded == 1
    (faces / "train/fear/9.png").unlink()
    data = load()
    assert load.decoded == 0 and sorted(tones(data.train)) == [10, 50, 70, 90, 110, 200]
    os.utime(faces / "train/fear/3.png", (1, 1))  # touched, the content is the same
    load()
    assert load.decoded == 0
    load()
    assert load.decoded == 0


def test_another_size_or_folder_is_another_part(load, faces, tmp_path):
    load()
    faces.rename(tmp_path / "moved")
    faces.mkdir()
    for part in ("train", "test"):
        (tmp_path / "moved" / part).rename(faces / part)
    load()
    assert load.decoded == 0  # the same place again
    assert len(cache.parts(tmp_path / "cache")) == 2


def test_a_folder_is_the_same_however_it_is_spelt(load, faces, monkeypatch):
    load()
    monkeypatch.chdir(faces.parent)
    (faces.parent / "link").symlink_to(faces)
    for path in ("faces", "./faces/", "link"):
        with cache.kept_in(str(faces.parent / "cache")):
            imagefolder.Options(path).read(SIZE, 0)
    assert load.decoded == 8


def test_cropped_and_whole_images_of_the_same_files_are_kept_apart(tmp_path):
    picture = np.arange(40 * 40, dtype=np.uint32).reshape(40, 40) % 251
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "a.png")

    def read(*boxes):
        return decode.read(tmp_path, "a", [tmp_path / "a.png"], torch.zeros(1), SIZE, boxes).images[0, :, :, 0].numpy()

    with cache.kept_in(str(tmp_path / "cache")):
        for left in (0, 5, 24):  # a crop of the stored size is a part of the image
            assert np.array_equal(read((left, 8, SIZE, SIZE)), picture[8 : 8 + SIZE, left : left + SIZE])
        whole = Image.fromarray(picture.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        assert np.array_equal(read(), np.asarray(whole))
        assert np.array_equal(read((5, 8, SIZE, SIZE)), picture[8:24, 5:21])


def test_bad_files_are_named_and_the_good_ones_kept(load, faces):
    (faces / "train/fear/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"got 1 files that can't be read as images:\n  .*fear/1.png: "):
        load()
    write(faces / "train/fear/1.png", 30)
    assert sorted(tones(load().train)) == [10, 30, 50, 70, 90, 110]
    assert load.decoded == 1 + 2  # and the two of test, which was not reached


def slow(root, place):
    """Decodes slowly, until it is killed."""
    real = decode.decode

    def late(content, size, box=None):
        time.sleep(0.05)
        return real(content, size, box)

    decode.decode, cache.SAVE_SECONDS, cache.CHUNK = late, 0, 2
    with cache.kept_in(str(place)):
        imagefolder.Options(str(root)).read(SIZE, 0)


class Killed(BaseException):
    """As abrupt as a kill, except that the test continues."""


def test_a_build_that_is_killed_continues(load, faces, tmp_path, monkeypatch):
    for i in range(6, 40):
        write(faces / "train/anger" / f"{i}.png", i)
    child = multiprocessing.get_context("fork").Process(target=slow, args=(faces, tmp_path / "cache"))
    child.start()
    finished = 0
    while finished < 5:
        assert child.is_alive()
        time.sleep(0.02)
        for note in (tmp_path / "cache").glob("*-train-*/part.json"):
            finished = len(json.loads(note.read_text())["images"])
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    (unfinished,) = cache.parts(tmp_path / "cache")
    assert not cache.load_index(unfinished) and cache.damaged(unfinished) == []

    def only(rows, done, real=cache._Rows.note):
        real(rows, done)
        raise Killed

    with monkeypatch.context() as patch:  # killed again, after a note that comes before what was finished already
        patch.setattr(cache._Rows, "note", only)
        patch.setattr(cache, "CHUNK", 1)
        patch.setattr(cache, "SAVE_SECONDS", 0)
        with pytest.raises(Killed):
            load()
    data = load()
    assert 2 <= load.decoded <= 42 - 5  # 40 of train and 2 of test, without what was finished
    assert torch.equal(data.train.images, load("off").train.images)


@pytest.mark.parametrize("call", range(1, 8))
def test_a_kill_between_the_last_steps_of_a_build_loses_nothing(load, faces, monkeypatch, call):
    """Before: an old note goes, its last note gets its name (2), the old index goes (4), two files get their names."""
    load()
    write(faces / "train/fear/1.png", 200)
    calls = []

    def killing(real):
        def step(*arguments):
            if "-train-" in str(arguments[0]) and not str(arguments[0]).endswith(".lock"):
                calls.append(real)
                if len(calls) == call:
                    raise Killed
            return real(*arguments)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing(os.replace))
        patch.setattr(os, "unlink", killing(os.unlink))
        with pytest.raises(Killed) if call < 7 else contextlib.nullcontext():
            load()
    assert call < 7 or len(calls) == 6
    data = load()
    assert load.decoded == (call <= 2) and sorted(tones(data.train)) == [10, 50, 70, 90, 110, 200]


def test_two_that_build_at_once_both_read_the_right_pixels(load, faces, tmp_path, caplog):
    caplog.set_level("INFO", "trainer")
    child = multiprocessing.get_context("fork").Process(target=slow, args=(faces, tmp_path / "cache"))
    child.start()
    while not (tmp_path / "cache").exists() or not cache.parts(tmp_path / "cache"):
        time.sleep(0.01)
    data = load()
    child.join()
    assert child.exitcode == 0 and torch.equal(data.train.images, load("off").train.images)
    assert "another process reads the images of " in caplog.text


def test_damage_is_found_and_a_lost_index_rebuilt(load, tmp_path, capsys):
    load()
    place, (test, train) = tmp_path / "cache", cache.parts(tmp_path / "cache")
    assert main(["cache", "--verify", f"--output.cache={place}"]) == 0
    pixels = train / "pixels.npy"
    content = bytearray(pixels.read_bytes())
    content[-1] ^= 1
    pixels.write_bytes(content)
    assert main(["cache", "--verify", f"--output.cache={place}"]) == 2
    out = capsys.readouterr()
    assert "1 damaged: " in out.out and "train/anger/4.png" in out.out and "1 damaged parts" in out.err
    (train / "index.json").write_text("{")
    (test / "pixels.npy").write_bytes(content[:200])
    data = load()
    assert load.decoded == 8 and sorted(tones(data.train)) == [10, 30, 50, 70, 90, 110]


def test_the_command_builds_lists_and_deletes(faces, tmp_path, capsys):
    place = tmp_path / "here"
    options = [f"--data.path={faces}", "--image-size=16", f"--output.cache={place}"]
    assert main(["cache", "--data=imagefolder", *options]) == 0
    out = capsys.readouterr().out
    assert "anger" in out and ": 6 images" in out and ": 2 images" in out
    assert main(["cache", "--verify", "--delete", f"--output.cache={place}"]) == 2
    assert "delete: got True, expected one of --verify and --delete" in capsys.readouterr().err
    assert main(["cache", "--delete", f"--output.cache={place}"]) == 0
    assert not cache.parts(place)
    assert main(["cache", "--output.cache=off"]) == 2


@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite", "open"])
def test_where_nothing_can_be_written_images_are_decoded_in_memory(load, monkeypatch, caplog, where):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "open":
        monkeypatch.setattr(cache, "_locked", full)
    else:
        monkeypatch.setattr(os, where, full)
    assert sorted(tones(load().train)) == [10, 30, 50, 70, 90, 110]
    assert "decoded images are not kept" in caplog.text and "No space left on device" in caplog.text
    monkeypatch.undo()


def test_a_disk_that_is_full_loses_nothing(load, faces, tmp_path, monkeypatch, capsys):
    load()
    before = [(f / name).read_bytes() for f in cache.parts(tmp_path / "cache") for name in ("index.json", "pixels.npy")]
    write(faces / "train/fear/1.png", 200)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "open", full, raising=False)  # what a note is written with
        assert sorted(tones(load().train)) == [10, 50, 70, 90, 110, 200]
        options = [f"--data.path={faces}", f"--image-size={SIZE}", f"--output.cache={tmp_path}/cache"]
        capsys.readouterr()
        assert main(["cache", "--data=imagefolder", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: output.cache: {tmp_path}/cache/faces-train-16px-") and error.count("\n") == 1
    assert error.endswith(" can't be written: No space left on device\n")
    parts = cache.parts(tmp_path / "cache")
    assert before == [(f / name).read_bytes() for f in parts for name in ("index.json", "pixels.npy")]


def test_what_is_not_the_cache_s_is_not_deleted(load, tmp_path, capsys):
    load()
    place = tmp_path / "cache"
    for name in ("site/index.json", "run/.lock"):
        (place / name).parent.mkdir()
        (place / name).write_text("{}")
    mine = cache.parts(place)[0] / "mine.txt"
    mine.write_text("years of work")
    assert main(["cache", "--delete", f"--output.cache={place}"]) == 0
    assert (
        (place / "site/index.json").exists() and (place / "run/.lock").exists() and mine.read_text() == "years of work"
    )
    assert sorted(f.name for f in place.iterdir()) == [mine.parent.name, "run", "site"]
    assert [f.name for f in mine.parent.iterdir()] == ["mine.txt"]


def test_images_that_are_no_files_are_refused_by_the_command(capsys):
    assert main(["cache", "--data=synthetic"]) == 2
    assert capsys.readouterr().err == "error: data: got 'synthetic', expected a data set of files\n"


def test_predict_keeps_nothing(faces, tmp_path):
    decode.read(faces, "predict", [faces / "train/fear/1.png"], torch.zeros(1), SIZE)
    assert not list(cache.default().glob("*-predict-*"))
