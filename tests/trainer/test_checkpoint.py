"""Checkpoint files: whole or refused by name, replaced at once or not at all, and never run as code."""

import contextlib
import errno
import os
import pickle
import random
import resource
import signal
import time

import pytest
import torch
from support import runs

from trainer import checkpoint
from trainer.__main__ import main
from trainer.config import UserError

STATE = {"epoch": 3, "model": {"weight": torch.arange(300.0).view(30, 10)}, "names": ["a", "ä"], "none": None}


def equal(a, b):
    return runs.differ(a, b) == []


def test_the_comparison_of_these_tests_sees_a_bit():
    other = STATE | {"model": {"weight": STATE["model"]["weight"].clone()}}
    assert equal(STATE, other)
    other["model"]["weight"][3, 4] = 34.000004
    assert runs.differ(STATE, other) == [".model.weight"]
    assert not equal(STATE, STATE | {"epoch": 4}) and not equal(STATE, STATE | {"epoch": 3.0})
    assert not equal(STATE, STATE | {"names": ["a"]}) and not equal({}, {"a": None})


@pytest.fixture
def file(tmp_path):
    checkpoint.save(tmp_path / "last.pt", STATE)
    return tmp_path / "last.pt"


def test_what_is_saved_is_read(file):
    assert equal(checkpoint.read(file), STATE)
    assert equal(torch.load(file, weights_only=True), STATE)  # by PyTorch too, which ignores the checksum
    os.umask(mask := os.umask(0))
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    assert os.listdir(file.parent) == ["last.pt"]


def refused(file):
    with pytest.raises(UserError) as error:
        checkpoint.read(file)
    message = str(error.value)
    assert message.startswith(f"{file}: not a whole checkpoint of this program: ") and "\n" not in message
    return message


def test_a_file_that_was_cut_off_anywhere_is_refused(file):
    content = file.read_bytes()
    for length in [0, 1, 7, 71, 72, 73, 200, *range(300, len(content), 97), len(content) - 1]:
        file.write_bytes(content[:length])
        assert "it does not end with a checksum" in refused(file)


def test_a_flipped_bit_anywhere_is_refused(file):
    content = file.read_bytes()
    for position in [0, 1, *range(2, len(content) - 80, 53), *range(len(content) - 80, len(content))]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        assert "checksum" in refused(file)
    file.write_bytes(content)
    assert equal(checkpoint.read(file), STATE)


def test_bytes_that_were_added_or_swapped_are_refused(file):
    content = file.read_bytes()
    for damaged in (content + b"\n", b"\0" + content, content[:-200] + content[-100:], content + content):
        file.write_bytes(damaged)
        assert "checksum" in refused(file)


@pytest.mark.parametrize("content", [b"", b"weights", "kein Checkpoint, ä".encode(), b"\x80\x02}q\x00.", b"\0" * 4096])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt")


def test_a_file_of_another_program_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    assert "another program wrote it" in refused(tmp_path / "a.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "b.pt")
    refused(tmp_path / "b.pt")


def test_no_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=f"{path}: no such file, expected a checkpoint of a run"):
            checkpoint.read(path)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_of_a_file_is_run(tmp_path):
    """Neither of one with a right checksum, nor of a bare pickle."""
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.is_dir()  # so the trap works
    trap.rmdir()
    checkpoint.save(tmp_path / "a.pt", {"model": Touch(trap)})
    assert "UnpicklingError" in refused(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Touch(trap)))
    refused(tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        assert main(["evaluate", str(tmp_path / name), "--device=cpu"]) == 2
    assert not trap.exists()


# Replacing


def test_what_is_replaced_is_kept_under_another_name(file):
    keep = file.with_name("previous.pt")
    for epoch in (4, 5, 6):
        checkpoint.save(file, STATE | {"epoch": epoch}, keep)
        assert (checkpoint.read(file)["epoch"], checkpoint.read(keep)["epoch"]) == (epoch, epoch - 1)
    assert sorted(os.listdir(file.parent)) == ["last.pt", "previous.pt"]


def test_a_file_system_without_hard_links_keeps_it_too(file, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    test_what_is_replaced_is_kept_under_another_name(file)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def full_disk(fails, file):
    """Every save fails in one of the ways in which a full disk shows; what the save must say.

    Only within the block: pytest itself writes between a test and the end of its fixtures.
    """
    with pytest.MonkeyPatch.context() as patch:
        if fails.startswith("write"):
            # The kernel itself refuses the bytes beyond a size, wherever torch.save may be then.
            limit = 1000 if fails == "write" else file.stat().st_size - 10
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                yield "File too large"
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            return
        if fails == "keep":
            patch.setattr(os, "link", no_space)
            patch.setattr(checkpoint.shutil, "copyfile", no_space)
        elif fails == "fsync":
            patch.setattr(os, "fsync", no_space)
        else:
            replace = os.replace
            patch.setattr(os, "replace", lambda a, b: no_space() if b == file else replace(a, b))
        yield "No space left on device"


@pytest.mark.parametrize("fails", ["write", "write the last block", "fsync", "keep", "rename"])
def test_a_full_disk_loses_nothing(file, fails):
    keep = file.with_name("previous.pt")
    keep.write_bytes(b"older")
    with full_disk(fails, file) as reason, pytest.raises(UserError, match=f"{file}: can't be written: {reason}"):
        checkpoint.save(file, STATE | {"epoch": 4}, keep)
    assert equal(checkpoint.read(file), STATE)
    assert keep.read_bytes() in (b"older", file.read_bytes())
    assert sorted(os.listdir(file.parent)) == ["last.pt", "previous.pt"]


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/a/last.pt: can't be written: No such file or directory"):
        checkpoint.save(tmp_path / "a/last.pt", STATE)


def test_an_error_of_the_program_stays_one(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(tmp_path / "last.pt", {"model": lambda: None})
    assert os.listdir(tmp_path) == []


def test_a_reader_finds_a_whole_file_whenever_the_writer_is_killed(tmp_path):
    """A child saves again and again and is killed at random moments; both files are whole each time."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    checkpoint.save(last, STATE)
    checkpoint.save(last, STATE | {"epoch": 4}, previous)
    moments, epoch = random.Random(0), 4
    for _ in range(25):
        done, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                for later in range(epoch + 1, epoch + 10_000):
                    checkpoint.save(last, STATE | {"epoch": later}, previous)
                    os.write(tell, b".")
            finally:
                os._exit(1)
        assert os.read(done, 1)  # one is saved; it is killed in one of the next
        time.sleep(moments.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(done), os.close(tell)
        now, before = checkpoint.read(last)["epoch"], checkpoint.read(previous)["epoch"]
        assert now > epoch and now - before in (0, 1)
        epoch = now


# A damaged checkpoint of a run


def test_a_damaged_last_pt_is_refused_by_name_and_previous_pt_offered(copy, capsys):
    last, previous = copy / "one/last.pt", copy / "one/previous.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    before = {path.name: path.read_bytes() for path in (copy / "one").iterdir()}
    assert runs.train(copy, "--name=one", "--epochs=2", "--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: resume: {last}: not a whole checkpoint of this program: ")
    assert error.endswith(f"; {previous} is whole and stands in epoch 2 after 0 steps: rename it to last.pt to resume "
                          "from there")  # fmt: skip
    assert {path.name: path.read_bytes() for path in (copy / "one").iterdir()} == before
    # As it says.
    whole = runs.state(copy / "one", "best.pt"), runs.rows(copy / "one")
    previous.rename(last)
    assert runs.train(copy, "--name=one", "--epochs=2", "--resume") == 0
    assert equal(runs.state(copy / "one", "best.pt"), whole[0]) and runs.rows(copy / "one") == whole[1]


def test_a_missing_last_pt_is_named_and_previous_pt_offered(copy, capsys):
    (copy / "one/last.pt").unlink()
    assert runs.train(copy, "--name=one", "--epochs=2", "--resume") == 2
    error = capsys.readouterr().err
    assert (
        f"resume: {copy}/one/last.pt: no such file" in error and "previous.pt is whole and stands in epoch 2" in error
    )


def test_only_whole_files_are_offered(copy, capsys):
    for name in ("last.pt", "previous.pt"):
        (copy / "one" / name).write_bytes(b"text")
    assert runs.train(copy, "--name=one", "--epochs=2", "--resume") == 2
    assert "previous.pt" not in capsys.readouterr().err


def test_best_pt_is_no_state_to_resume_from(copy, capsys):
    (copy / "one/best.pt").rename(copy / "one/last.pt")
    assert runs.train(copy, "--name=one", "--epochs=2", "--resume") == 2
    assert "last.pt', expected the whole state of a run, not weights only as in best.pt" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "a.png"], ["cams", "a.png"]])
def test_other_commands_refuse_a_damaged_checkpoint_by_name(command, copy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = copy / "one/best.pt"
    best.write_bytes(best.read_bytes()[:-1])
    (tmp_path / "a.png").write_bytes(b"") if command[0] == "predict" else None
    assert main([command[0], str(copy / "one"), *command[1:], "--device=cpu"]) == 2
    assert f"error: {best}: not a whole checkpoint" in capsys.readouterr().err
