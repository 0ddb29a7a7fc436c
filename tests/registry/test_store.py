import os
import signal
import time
from pathlib import Path

import pytest

from posttrain.errors import RegistryError
from posttrain.files import digest_bytes, digest_file, digest_json, digest_tree, file_digests
from posttrain.registry import ContentStore


@pytest.fixture
def store(tmp_path) -> ContentStore:
    return ContentStore(tmp_path / "store")


def flip(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_tree_comes_back_as_it_was(store, model, tmp_path):
    folder = model("a")
    digest = store.put_tree(folder)
    assert digest == digest_tree(folder)
    target = store.materialize(digest, tmp_path / "out" / "model")
    assert file_digests(target) == file_digests(folder)
    assert store.verify(digest) == 3


def test_records_and_files_have_the_digests_of_the_rest_of_the_package(store, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n")
    assert store.put_file(path) == digest_file(path)
    record = {"b": [1, 2.5, None], "a": "ü"}
    assert store.put_json(record) == digest_json(record)
    assert store.get_json(digest_json(record)) == record


def test_the_same_content_is_stored_once_and_read_only(store, model):
    store.put_tree(model("a"))
    before = sorted((store.folder / "objects").rglob("*"))
    store.put_tree(model("a"))
    assert sorted((store.folder / "objects").rglob("*")) == before
    assert not any(path.stat().st_mode & 0o222 for path in before if path.is_file())


def test_the_source_can_change_afterwards(store, model):
    folder = model("a")
    digest = store.put_tree(folder)
    (folder / "model.safetensors").write_text("overwritten in place")
    assert store.verify(digest) == 3


def test_a_flipped_byte_is_found_and_named(store, model):
    digest = store.put_tree(model("a"))
    flip(store.object_path(store.tree(digest)["model.safetensors"]))
    with pytest.raises(RegistryError, match=r"model\.safetensors: content has changed"):
        store.verify(digest)


def test_a_missing_file_is_found_and_named(store, model):
    digest = store.put_tree(model("a"))
    store.object_path(store.tree(digest)["tokenizer/vocab.json"]).unlink()
    with pytest.raises(RegistryError, match=r"tokenizer/vocab\.json: its content .* is missing"):
        store.verify(digest)
    with pytest.raises(RegistryError, match=r"vocab\.json: its content .* is missing"):
        store.materialize(digest, store.folder / "out")


def test_a_damaged_list_of_files_is_found(store, model):
    digest = store.put_tree(model("a"))
    flip(store.object_path(digest))
    with pytest.raises(RegistryError, match="list of files: content has changed"):
        store.verify(digest)


def test_a_damaged_object_is_not_handed_out_and_is_healed_by_storing_again(store, model, tmp_path):
    digest = store.put_tree(model("a"))
    flip(store.object_path(store.tree(digest)["model.safetensors"]))
    with pytest.raises(RegistryError, match="damaged"):
        store.materialize(digest, tmp_path / "out")
    store.put_tree(model("a"))
    assert store.verify(digest) == 3


def test_an_empty_folder_is_refused(store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RegistryError, match="got no files"):
        store.put_tree(tmp_path / "empty")


def test_materialize_copies_where_links_are_not_possible(store, model, tmp_path):
    """/dev/shm is another file system than the temporary folder on Linux; where it is not, links are made."""
    digest = store.put_tree(model("a"))
    elsewhere = Path("/dev/shm") / f"posttrain-test-{os.getpid()}"
    target = store.materialize(digest, elsewhere if Path("/dev/shm").is_dir() else tmp_path / "out")
    try:
        assert digest_tree(target) == digest
    finally:
        for path in sorted(target.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        target.rmdir()


def test_a_kill_at_any_step_leaves_whole_objects_only(model, tmp_path):
    """A child is killed at its n-th rename or fsync; whatever has a name in the store has that content."""
    folder, step, finished = model("a"), 0, False
    while not finished:
        step += 1
        store = ContentStore(tmp_path / f"store{step}")
        child = os.fork()
        if child == 0:
            _die_at(step)
            store.put_tree(folder)
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        for path in (store.folder / "objects").glob("??/*"):
            assert digest_file(path) == f"sha256:{path.name}"
        store.put_tree(folder)
        assert store.verify(digest_tree(folder)) == 3
    assert step > 4 * 3  # four objects, each fsync, rename, fsync of the folder


def test_what_a_killed_process_left_behind_is_swept_a_day_later(tmp_path):
    store = ContentStore(tmp_path / "store")
    old, new = (store.folder / "objects" / name for name in (".tmp.old", ".tmp.new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    ContentStore(tmp_path / "store")
    assert (old.exists(), new.exists()) == (False, True)


def _die_at(step: int) -> None:
    counter = 0

    def counted(original):
        def call(*arguments, **keywords):
            nonlocal counter
            counter += 1
            if counter == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return call

    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)


def test_what_a_killed_process_left_is_swept_once_it_is_old(store, model, tmp_path):
    """Half-written objects and half-written folders to load from; what may still be written stays."""
    digest = store.put_tree(model("a"))
    whole = store.materialize(digest, store.folder / "models" / "whole")
    old, new = store.folder / "models" / ".whole.abandond", store.folder / "adapters" / ".other.abcdefgh"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "half").write_text("")
    half = store.folder / "objects" / ".tmp.abandond"
    half.write_text("")
    for path in (old, half):
        os.utime(path, (1, 1))
    ContentStore(store.folder)
    assert not old.exists() and not half.exists()
    assert new.exists() and whole.exists()
    assert store.verify(digest) == 3


def test_a_leap_of_the_clock_sweeps_nothing_that_is_being_written(store, tmp_path):
    """A file is half copied, its times are of long ago, and another process opens the registry."""
    source = tmp_path / "pipe"
    os.mkfifo(source)
    child = os.fork()
    if child == 0:
        store.put_file(source)
        os._exit(0)
    with source.open("wb") as pipe:
        pipe.write(b"half")
        pipe.flush()
        (half,) = wait_for(lambda: list((store.folder / "objects").glob(".tmp.*")))
        os.utime(half, (0, 0))
        ContentStore(store.folder)
        assert half.exists()
        pipe.write(b" and whole")
    assert os.waitpid(child, 0)[1] == 0
    assert store.has(digest_bytes(b"half and whole"))


def wait_for(found):
    deadline = time.monotonic() + 10
    while not (seen := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return seen
