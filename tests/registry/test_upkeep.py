"""What can be taken out of a registry, what is kept and why, and that a kill on the way loses nothing."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from posttrain.cli.app import main
from posttrain.errors import RegistryError
from posttrain.files import digest_tree, reading
from posttrain.registry import Manifest, Registry, upkeep


@pytest.fixture
def words(registry, model, lineage, passing, base):
    """words@1 champion, words@2 and 3 free, words@4 trained from words@3."""
    for weights in "abc":
        registry.register("words", model(weights), lineage(model(weights)))
    registry.promote("words", 1, "champion", passing(registry.show("words", 1).digest, base))
    three = registry.show("words", 3)
    inputs = {"model": three.digest, "parent": three.manifest}
    registry.register("words", model("d"), Manifest("dpo", inputs, {"model": digest_tree(model("d"))}))
    return registry


def test_what_something_needs_is_kept_and_said(words):
    with pytest.raises(RegistryError, match="words@1 is kept: it has the alias champion"):
        upkeep.remove_version(words, "words", 1, "old")
    with pytest.raises(RegistryError, match="words@3 is kept: the lineage of words@4 starts from it"):
        upkeep.remove_version(words, "words", 3, "old")
    with upkeep.using(words, "words", 2), pytest.raises(RegistryError, match="a running pipeline or reproduction"):
        upkeep.remove_version(words, "words", 2, "old")
    assert [entry.version for entry in words.entries()] == [1, 2, 3, 4]
    upkeep.remove_version(words, "words", 4, "old")
    upkeep.remove_version(words, "words", 3, "old")
    assert [entry.version for entry in words.entries()] == [1, 2]


def test_the_previous_champion_is_kept_for_a_rollback(words, passing):
    one, two = words.show("words", 1).digest, words.show("words", 2).digest
    words.promote("words", 2, "champion", passing(two, one))
    with pytest.raises(RegistryError, match="it has the alias previous"):
        upkeep.remove_version(words, "words", 1, "old")


def test_a_number_is_not_given_twice_and_what_was_removed_says_so(words, model, lineage):
    upkeep.remove_version(words, "words", 4, "a bad idea", actor="Ada")
    with pytest.raises(RegistryError, match=r"no words@4 in .*: it was removed at .* by Ada: a bad idea"):
        words.show("words", 4)
    assert words.register("words", model("e"), lineage(model("e"))).version == 5
    assert words.rows.check_log().num_entries == 7


def test_gc_deletes_what_no_version_needs_and_nothing_else(words):
    gone = words.resolve("words@2")
    untouched = upkeep.collect(words)
    assert (untouched.num_deleted, untouched.folders) == (0, ())
    upkeep.remove_version(words, "words", 2, "old")
    told = upkeep.collect(words, dry_run=True)
    assert gone.path.exists() and told.num_deleted == 3  # its weights, its list of files, its manifest
    assert upkeep.collect(words) == told
    assert not gone.path.exists() and not words.store.has(gone.digest)
    for version in (1, 3, 4):
        words.verify("words", version)


def test_gc_keeps_a_folder_that_somebody_reads_until_he_is_done(words, capsys):
    gone = words.resolve("words@2")
    upkeep.remove_version(words, "words", 2, "old")
    before = digest_tree(gone.path)
    with reading(gone.path):
        found = upkeep.collect(words)
        assert found.folders == () and found.num_deleted == 3
        assert found.read == (f"{gone.path} is read by process {os.getpid()}; stop that first, or wait for its end",)
        assert digest_tree(gone.path) == before
        with pytest.raises(SystemExit, match="0"):
            main(["registry", "gc", "--registry", str(words.folder)])
        assert f"kept: {found.read[0]}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["registry", "gc", "--registry", str(words.folder), "--json"])
    assert json.loads(capsys.readouterr().out)["folders"] == [gone.path.relative_to(words.folder).as_posix()]


def test_a_dry_run_keeps_nobody_from_adding_reading_or_using(words, monkeypatch):
    gone, looked = words.resolve("words@2"), []
    for owner, name in ((upkeep, "_reachable"), (upkeep, "_needed_by"), (type(words.store), "tree")):
        before = getattr(owner, name)

        def meanwhile(*args, before=before):
            with words.store.nobody_adding() as idle, upkeep.version_lock(words.folder, "words", 2, alone=True):
                looked.append(idle)
            return before(*args)

        monkeypatch.setattr(owner, name, meanwhile)
    upkeep.remove_version(words, "words", 2, "old", dry_run=True)
    upkeep.collect(words, dry_run=True)
    assert len(looked) >= 2 and all(looked)
    assert gone.path.exists()


def test_gc_waits_for_who_adds(words, tmp_path):
    upkeep.remove_version(words, "words", 2, "old")
    with words.store.adding(), pytest.raises(RegistryError, match="a process adds to it; nothing was deleted"):
        upkeep.collect(words)


def test_a_removal_and_a_collection_killed_anywhere_lose_nothing(words, tmp_path):
    """Killed at the n-th statement, rename, unlink or rmdir: what is there verifies, and a second try ends it."""
    words.close()
    for step in range(1, 100):
        folder = shutil.copytree(words.folder, tmp_path / f"copy{step}")
        child = os.fork()
        if child == 0:
            registry = Registry(folder)
            _die_at(registry, step)
            remove_and_collect(registry)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        registry = Registry(folder)
        for entry in registry.entries():
            registry.verify(entry.name, entry.version)
        registry.rows.check_log()
        remove_and_collect(registry)
        assert [entry.version for entry in registry.entries()] == [1, 3, 4]
        left = upkeep.collect(registry)
        assert (left.num_deleted, left.folders) == (0, ())
        registry.close()
        if status == 0:
            assert step > 10
            return
        assert status == -signal.SIGKILL
    raise AssertionError("it never finished")


def remove_and_collect(registry):
    if any(entry.version == 2 for entry in registry.entries()):
        upkeep.remove_version(registry, "words", 2, "old")
    upkeep.collect(registry)


def _die_at(registry, step: int) -> None:
    counter = 0

    def count(*_) -> None:
        nonlocal counter
        counter += 1
        if counter == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(original):
        def call(*arguments, **keywords):
            count()
            return original(*arguments, **keywords)

        return call

    registry._db.set_trace_callback(lambda sql: count() if not sql.startswith("SELECT") else None)
    os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
    Path.replace, Path.unlink = counted(Path.replace), counted(Path.unlink)
