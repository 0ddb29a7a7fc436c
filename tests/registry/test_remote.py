"""Push and pull through fsspec: by digest, resumable, nothing overwritten."""

import json
import os
import shutil
import signal
from pathlib import Path

import fsspec
import pytest

from posttrain.errors import ConfigError, RegistryError
from posttrain.evidence import Decision
from posttrain.files import canonical_json, digest_bytes, digest_json, digest_tree
from posttrain.gate import verdict_from_json
from posttrain.registry import Registry
from posttrain.registry.card import model_card
from posttrain.registry.remote import Remote, pull_version, push_version


@pytest.fixture
def words(registry, model, lineage, passing, base):
    """words@1 champion, words@2 against it."""
    for weights in "ab":
        registry.register("words", model(weights), lineage(model(weights)))
    registry.promote("words", 1, "champion", passing(registry.show("words", 1).digest, base))
    return registry


@pytest.fixture
def other(tmp_path):
    book = Registry(tmp_path / "other")
    yield book
    book.close()


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    yield f"file://{tmp_path}/remote" if request.param == "file" else "memory://remote"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def test_a_version_arrives_whole_and_a_second_time_nothing_is_copied(words, other, url):
    entry = words.show("words", 2)
    first = push_version(words, entry, Remote(url))
    assert (first.num_copied, first.num_present) == (5, 0)  # three files, their list, the manifest
    assert push_version(words, entry, Remote(url)).num_copied == 0
    pulled, moved = pull_version(other, "words@2", Remote(url))
    assert (pulled.name, pulled.version, pulled.digest, pulled.manifest) == ("words", 1, entry.digest, entry.manifest)
    assert moved.num_copied == 5 and other.verify("words", 1).num_manifests == 1
    again, moved = pull_version(other, "words@2", Remote(url))
    assert again.version == 1 and moved.num_copied == 0
    other.rows.check_log()


def test_an_alias_moves_there_only_from_what_held_it_here(words, other, url, passing, base, model, lineage):
    one = words.show("words", 1)
    push_version(words, one, Remote(url), "champion")
    push_version(words, one, Remote(url), "champion")
    assert len(Remote(url).history("aliases", "words", "champion")) == 1
    with pytest.raises(RegistryError, match="does not hold champion here"):
        push_version(words, words.show("words", 2), Remote(url), "champion")
    words.tag("words", 1, "hold", "wrong units")
    with pytest.raises(RegistryError, match=r"words@1 is on hold \(wrong units\), so it takes no alias there"):
        push_version(words, words.show("words", 1), Remote(url), "champion")
    words.untag("words", 1, "hold")
    assert pull_version(other, "words@champion", Remote(url))[0].digest == one.digest
    stranger = other.register("words", model("c"), lineage(model("c")))
    other.promote("words", stranger.version, "champion", passing(stranger.digest, base))
    other.register("words", model("d"), lineage(model("d")))
    with pytest.raises(RegistryError, match="which never held it here: pull that version and gate against it"):
        push_version(other, other.show("words", stranger.version), Remote(url), "champion")
    words.promote("words", 2, "champion", passing(words.show("words", 2).digest, one.digest))
    with pytest.raises(RegistryError, match="has another words@2"):
        push_version(words, words.show("words", 2), Remote(url), "champion")


def test_a_hold_goes_with_its_version_and_is_taken_off_where_it_was_set_or_here(words, other, url, passing):
    one, two = (words.show("words", n) for n in (1, 2))
    words.promote("words", 2, "champion", passing(two.digest, one.digest))
    words.rollback("words", "champion", "wrong units")
    push_version(words, words.show("words", 2), Remote(url))
    pulled, _ = pull_version(other, "words@2", Remote(url))
    assert pulled.tags["hold"] == "wrong units"
    with pytest.raises(RegistryError, match="on hold: wrong units"):
        other.promote("words", pulled.version, "champion", passing(two.digest, two.digest))
    other.untag("words", pulled.version, "hold")
    assert "hold" not in pull_version(other, "words@2", Remote(url))[0].tags, "what was released here stays so"
    words.untag("words", 2, "hold")
    push_version(words, words.show("words", 2), Remote(url))
    third = Registry(other.folder.with_name("third"))
    assert "hold" not in pull_version(third, "words@2", Remote(url))[0].tags, "it was taken off where it was set"
    words.tag("words", 2, "hold", "again")
    push_version(words, words.show("words", 2), Remote(url))
    assert pull_version(third, "words@2", Remote(url))[0].tags["hold"] == "again"
    words.untag("words", 2, "hold")
    push_version(words, words.show("words", 2), Remote(url))
    assert "hold" not in pull_version(third, "words@2", Remote(url))[0].tags, "and here too, as it came from there"
    for book in (words, other, third):
        book.rows.check_log()
    third.close()


def test_a_hold_that_was_set_there_by_another_keeps_the_alias_and_is_not_taken_off_by_a_push(words, other, url):
    push_version(words, words.show("words", 1), Remote(url))
    pulled, _ = pull_version(other, "words@1", Remote(url))
    other.tag("words", pulled.version, "hold", "it swears")
    push_version(other, other.show("words", pulled.version), Remote(url))
    with pytest.raises(RegistryError, match=r"words@1 is on hold at .* \(it swears\): pull it, and release it here"):
        push_version(words, words.show("words", 1), Remote(url), "champion")
    assert pull_version(words, "words@1", Remote(url))[0].tags["hold"] == "it swears"
    words.untag("words", 1, "hold")
    push_version(words, words.show("words", 1), Remote(url), "champion")
    assert "hold" not in pull_version(other, "words@champion", Remote(url))[0].tags


def test_what_people_decided_is_in_the_log_of_each_registry_that_promotes_by_it(words, other, url, passing, base):
    one, two = words.show("words", 1), words.show("words", 2)
    verdict = passing(two.digest, one.digest)
    said = [
        Decision(verdict.digest, True, by, "read it", f"2026-01-0{n}T00:00:00+00:00")
        for n, by in enumerate(["Ada", "Bob"], 1)
    ]
    words.promote("words", 2, "champion", verdict, decisions=said)
    for ref in ("words@1", "words@2"):
        push_version(words, words.show("words", int(ref[-1])), Remote(url))
        pull_version(other, ref, Remote(url))
    other.promote("words", 1, "champion", passing(one.digest, base))
    for _ in range(2):
        other.promote("words", 2, "champion", verdict, decisions=said)
        assert [event.actor for event in other.rows.events("words", action="decide")] == ["Ada", "Bob"]
    other.rows.check_log()


def test_a_version_that_was_pushed_before_it_was_promoted_is_pushed_again_with_its_verdict(words, other, url, passing):
    two = words.show("words", 2)
    push_version(words, two, Remote(url))
    words.promote("words", 2, "champion", passing(two.digest, words.show("words", 1).digest))
    assert push_version(words, words.show("words", 2), Remote(url), "champion").num_copied == 1
    pulled, _ = pull_version(other, "words@champion", Remote(url))
    assert len(other.records("words", pulled.version, "verdict")) == 1


def test_a_pulled_version_has_the_verdict_that_it_was_registered_with(
    registry, other, url, model, lineage, passing, base
):
    entry = registry.register("words", model("a"), lineage(model("a")), passing(digest_tree(model("a")), base))
    push_version(registry, entry, Remote(url))
    pulled, _ = pull_version(other, "words@1", Remote(url))
    said = other.verdict_record("words", pulled.version)
    assert said == registry.verdict_record("words", 1)
    assert "as measured" in model_card(other, "words", pulled.version)
    other.promote("words", pulled.version, "champion", verdict_from_json(said))
    other.rows.check_log()


def test_a_pull_leaves_the_verdict_that_a_version_has_here(registry, other, url, model, lineage, passing, base):
    digest = digest_tree(model("a"))
    push_version(
        registry, registry.register("words", model("a"), lineage(model("a")), passing(digest, base)), Remote(url)
    )
    mine = passing(digest, digest_bytes(b"another baseline"))
    other.register("words", model("a"), lineage(model("a")), mine)
    pull_version(other, "words@1", Remote(url))
    assert other.verdict_record("words", 1) == mine.to_json()


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_verdict_of_another_model_is_not_taken_from_a_remote(words, other, tmp_path, passing, base, is_kept):
    """`words` has a verdict on words@1 among its objects; the record of words@2 claims it."""
    entry, foreign = words.show("words", 2), passing(words.show("words", 1).digest, base).digest
    push_version(words, entry, Remote(str(tmp_path / "remote")))
    push_version(words, words.show("words", 1), Remote(str(tmp_path / "remote")))
    path = tmp_path / "remote" / "versions" / "words" / "2" / "1.json"
    record = json.loads(path.read_text())
    del record["seal"]
    record["verdict"] = foreign
    record["objects"] += [["verdict", "file", foreign]] if is_kept else []
    path.write_text(canonical_json(record | {"seal": digest_json(record)}))
    with pytest.raises(RegistryError, match="its verdict is about" if is_kept else "is not among its objects"):
        pull_version(other, "words@2", Remote(str(tmp_path / "remote")))
    assert other.entries() == []


def test_nothing_there_is_overwritten(words, other, url, model, lineage):
    push_version(words, words.show("words", 1), Remote(url))
    mine = other.register("words", model("z"), lineage(model("z")))
    with pytest.raises(RegistryError, match=r"has another words@1; nothing there was changed"):
        push_version(other, mine, Remote(url))
    assert Remote(url).record("versions", "words", "1", "1.json")["digest"] == words.show("words", 1).digest


def test_a_damaged_or_missing_object_is_named_and_nothing_is_registered(words, other, tmp_path):
    remote = Remote(str(tmp_path / "remote"))
    entry = words.show("words", 1)
    push_version(words, entry, remote)
    weights = Path(remote.object_path(words.store.tree(entry.digest)["model.safetensors"]))
    weights.chmod(0o644)
    weights.write_bytes(b"other")
    with pytest.raises(RegistryError, match="the object is damaged there"):
        pull_version(other, "words@1", remote)
    weights.unlink()
    with pytest.raises(RegistryError, match="is missing there"):
        pull_version(other, "words@1", remote)
    assert other.entries() == []
    assert push_version(words, entry, remote).num_copied == 1
    pull_version(other, "words@1", remote)


HOSTILE = {
    "../../outside": "expected one below its folder",
    "/etc/outside": "expected one below its folder",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_remote_cannot_write_outside_of_the_registry(words, other, tmp_path, name):
    remote = Remote(str(tmp_path / "remote"))
    entry = words.show("words", 1)
    push_version(words, entry, remote)
    tree = canonical_json({name: digest_bytes(b"x")}).encode()
    _plant(remote, tree)
    _plant(remote, b"x")
    record = remote.record("versions", "words", "1", "1.json")
    record["digest"] = digest_bytes(tree)
    record["objects"] = [["model", "tree", digest_bytes(tree)], *record["objects"][1:]]
    _replace(tmp_path, record)
    with pytest.raises(RegistryError, match=HOSTILE[name]):
        pull_version(other, "words@1", remote)
    _replace(tmp_path, record | {"digest": "sha256:../../x"})
    with pytest.raises(RegistryError, match="the record there was not written by us"):
        pull_version(other, "words@1", remote)


def _plant(remote, data):
    path = Path(remote.object_path(digest_bytes(data)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _replace(tmp_path, record):
    path = tmp_path / "remote/versions/words/1/1.json"
    path.write_text(json.dumps(record | {"seal": digest_json(record)}))


def test_a_push_or_a_pull_killed_anywhere_is_ended_by_the_next(words, tmp_path):
    """Killed at the n-th file opened for writing or renamed at either end."""
    words.close()
    for step in range(1, 60):
        folder = tmp_path / f"try{step}"
        shutil.copytree(words.folder, folder / "here")
        child = os.fork()
        if child == 0:
            _die_at(step)
            _push_and_pull(folder)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        _push_and_pull(folder)
        if status == 0:
            assert step > 10
            return
        assert status == -signal.SIGKILL
    raise AssertionError("it never finished")


def _push_and_pull(folder):
    here, there, remote = Registry(folder / "here"), Registry(folder / "there"), Remote(str(folder / "remote"))
    push_version(here, here.show("words", 1), remote, "champion")
    entry, _ = pull_version(there, "words@champion", remote)
    assert (entry.version, entry.digest) == (1, here.show("words", 1).digest)
    assert [e.version for e in there.entries()] == [1]
    here.close()
    there.close()


def _die_at(step: int) -> None:
    counter = 0

    def counted(original):
        def call(*arguments, **keywords):
            nonlocal counter
            result = original(*arguments, **keywords)
            counter += 1
            if counter == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    shutil.copyfileobj = counted(shutil.copyfileobj)
    Path.replace = counted(Path.replace)
    local = fsspec.implementations.local.LocalFileSystem
    local.put_file, local.pipe_file, local.makedirs = map(counted, (local.put_file, local.pipe_file, local.makedirs))


def test_a_password_in_the_url_and_a_place_of_no_kind_are_refused(words):
    with pytest.raises(ConfigError, match="password or token"):
        Remote("https://ada:secret@example.org/models")
    with pytest.raises(RegistryError, match="expected a folder, or a URL of fsspec"):
        Remote("nothing://x")
