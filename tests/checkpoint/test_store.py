import errno
import os
import shutil

import pytest
from safetensors import SafetensorError

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
    (store.folder / ".step-00000002.abc_d3f9").mkdir()
    (store.folder / ".best.json.abc_d3f9").touch()
    (store.folder / ".hidden").touch()
    store.save(3, filler("c"))
    assert [path.name for path in store.folder.glob(".*")] == [".hidden"]


def test_room_is_asked_for_before_any_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new", needed_bytes=1000)
    with pytest.raises(
        CheckpointError, match=r"GiB free, a checkpoint needs 931322574\.6 GiB; free some space or move output_dir"
    ):
        check_writable(tmp_path, needed_bytes=10**18)

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("posttrain.checkpoint.store.tempfile.TemporaryFile", refuse)
    with pytest.raises(CheckpointError, match="the file system is read-only; move output_dir"):
        check_writable(tmp_path, needed_bytes=1)


def test_every_k_th_is_kept_for_good_besides_the_last_ones_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2, keep_every=4)
    for step in range(1, 12):
        store.save(step, filler(str(step)))
        if step == 3:
            store.mark_best(3, 0.5)
    assert steps(store) == [3, 4, 8, 10, 11]
    assert store.resumable_from() == 10
    assert CheckpointStore(tmp_path / "checkpoints", keep_last=9).resumable_from() == 0


def test_a_byte_flipped_anywhere_in_any_file_is_noticed(store, caplog):
    """Every file of a checkpoint, at many places: it is skipped by name, or means what it meant before."""
    good = store.save(1, filler("a"))
    ref = store.save(2, filler("b" * 50))
    files = sorted(path for path in ref.path.rglob("*") if path.is_file())
    assert {path.name for path in files} == {"SEAL.json", "weights", "state"}
    noticed = 0
    for path in files:
        whole = path.read_bytes()
        for place in range(0, len(whole), 3):
            for bit in (0x01, 0x10, 0x80):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
                found = store.newest_valid()
                assert found in (good, ref), (path.name, place)
                noticed += found == good
                # Only space between the values of the seal may change without a meaning.
                assert found == good or (path.name == "SEAL.json" and whole[place : place + 1].isspace())
        path.write_bytes(whole)
    assert noticed > 300
    assert "checkpoint step-00000002 is broken and is skipped" in caplog.text
    assert store.newest_valid() == ref


def test_a_file_torn_at_any_byte_is_noticed(store):
    good = store.save(1, filler("a"))
    ref = store.save(2, filler("b" * 50))
    for path in [path for path in ref.path.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for length in range(0, len(whole) - 1, 3):
            path.write_bytes(whole[:length])
            assert store.newest_valid() == good, (path.name, length)
        path.write_bytes(whole)
    assert store.newest_valid() == ref


def test_a_seal_of_another_step_is_no_seal(store):
    ref = store.save(1, filler("a"))
    ref.path.rename(store.folder / "step-00000009")
    assert store.newest_valid() is None
    with pytest.raises(CheckpointError, match=r"not usable: SEAL\.json is that of step 1"):
        store.at(9)


def test_a_broken_note_of_the_best_is_named(store):
    store.save(1, filler("a"))
    store.mark_best(1, 0.5)
    (store.folder / "best.json").write_text('{"step": 1')
    with pytest.raises(CheckpointError, match=r"best\.json is broken .*; delete it to go on without"):
        store.best()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_safetensors_says_of_the_disk_is_understood(number, store):
    """It has an error of its own, which is no OSError."""
    good = store.save(1, filler("a"))

    def full(folder):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    with pytest.raises(CheckpointError, match="The last good checkpoint is intact"):
        store.save(2, full)
    assert store.newest_valid() == good

    def wrong(folder):
        raise SafetensorError("Error while serializing: InvalidTensorView")

    with pytest.raises(SafetensorError):
        store.save(2, wrong)


def test_a_device_that_is_always_full_is_said_to_be_full(store):
    """A real ENOSPC from the system, without a file system of our own."""

    def fill(folder):
        with open("/dev/full", "w") as device:
            device.write("x" * 1_000_000)

    with pytest.raises(CheckpointError, match="the disk is full"):
        store.save(1, fill)
    assert list(store.folder.iterdir()) == []
