import errno
import os
import shutil

import pytest

from posttrain import files
from posttrain.checkpoint.store import CheckpointStore, check_writable
from posttrain.errors import CheckpointError


def filler(text):
    def fill(folder):
        (folder / "weights").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub/state").write_text(text * 2)

    return fill


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def steps(store):
    return sorted(int(path.name[5:]) for path in store.folder.glob("step-*"))


def test_what_is_saved_is_found(store):
    assert store.newest_valid() is None
    ref = store.save(3, filler("a"))
    assert store.newest_valid() == ref
    assert (ref.path / "sub/state").read_text() == "aa"
    assert store.at(3) == ref


def test_the_last_ones_and_the_best_are_kept(store):
    for step in range(1, 7):
        store.save(step, filler(str(step)))
        if step == 2:
            store.mark_best(2, 0.5)
    assert steps(store) == [2, 5, 6]
    assert store.best() == (2, 0.5)


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)


BREAK = {
    "a flipped byte": lambda folder: _flip(folder / "weights"),
    "a torn file": lambda folder: (folder / "sub/state").write_text("b"),
    "a missing file": lambda folder: (folder / "weights").unlink(),
    "a missing seal": lambda folder: (folder / "SEAL.json").unlink(),
    "a torn seal": lambda folder: (folder / "SEAL.json").write_text('{"step":'),
    "a seal of something else": lambda folder: (folder / "SEAL.json").write_text("{}"),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", BREAK)
def test_a_broken_one_is_named_and_skipped(damage, store, caplog):
    good = store.save(1, filler("a"))
    BREAK[damage](store.save(2, filler("b")).path)
    assert store.newest_valid() == good
    assert "checkpoint step-00000002 is broken and is skipped" in caplog.text
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 .* is not usable"):
        store.at(2)
    store.save(2, filler("c"))
    assert store.newest_valid().step == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EIO, "I/O error"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_last_good_one(call, code, message, store, monkeypatch):
    good = store.save(1, filler("a"))

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(CheckpointError, match=f"{message}.*The last good checkpoint is intact"):
        store.save(2, filler("b"))
    monkeypatch.undo()
    assert store.newest_valid() == good
    assert steps(store) == [1]
    assert store.save(2, filler("b")).step == 2
    assert not list(store.folder.glob(".step-*"))


def test_an_error_of_the_caller_is_its_own_and_leaves_nothing(store):
    def broken(folder):
        (folder / "half").write_text("x")
        raise KeyError("no such tensor")

    with pytest.raises(KeyError):
        store.save(1, broken)
    assert list(store.folder.iterdir()) == []


def test_saving_a_step_again_replaces_it(store):
    store.save(1, filler("a"))
    ref = store.save(1, filler("b"))
    assert (store.newest_valid().path / "weights").read_text() == "b"
    assert store.newest_valid() == ref


def test_leftovers_of_a_crash_are_swept(store):
    store.save(1, filler("a"))
    (store.folder / ".step-00000002.abc").mkdir()
    store.save(3, filler("c"))
    assert not list(store.folder.glob(".step-*"))


def test_room_is_asked_for_before_any_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new", needed_bytes=1000)
    with pytest.raises(
        CheckpointError, match=r"GB free, a checkpoint needs 1000000000\.0 GB; free some space or move output_dir"
    ):
        check_writable(tmp_path, needed_bytes=10**18)

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("posttrain.checkpoint.store.tempfile.TemporaryFile", refuse)
    with pytest.raises(CheckpointError, match="the file system is read-only; move output_dir"):
        check_writable(tmp_path, needed_bytes=1)
