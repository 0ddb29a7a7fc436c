"""A registry whose database or objects are damaged or gone: named in one line, and nothing is made anew over it."""

import shutil

import pytest

from posttrain.cli.app import main
from posttrain.errors import RegistryError
from posttrain.files import file_digests
from posttrain.registry import Registry

WAYS = {
    "empty": lambda body: b"",
    "cut": lambda body: body[: len(body) // 2],
    "text": lambda body: b"not a database\n" * 400,
    "a page": lambda body: body[:4096] + bytes(4096) + body[8192:],
}
VERBS = (
    ("registry", "list"),
    ("registry", "show", "words@1"),
    ("registry", "verify", "words@1"),
    ("registry", "promote", "words@1"),
    ("registry", "rollback", "words", "--reason", "x"),
    ("registry", "hold", "words@1", "--reason", "x"),
    ("registry", "release", "words@1"),
    ("reproduce", "words@1"),
)


@pytest.fixture
def folder(tmp_path, model, lineage):
    book = Registry(tmp_path / "registry")
    book.register("words", model("a"), lineage(model("a")))
    book._db.execute("PRAGMA journal_mode = DELETE")  # all of it in one file, as after a clean end
    book.close()
    return tmp_path / "registry"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_damaged_database_is_named_by_every_verb_and_left_as_it_is(folder, capsys, way, verb):
    path = folder / "registry.sqlite"
    path.write_bytes(WAYS[way](path.read_bytes()))
    before = file_digests(folder)
    with pytest.raises(SystemExit) as caught:
        main([*verb, "--registry", str(folder)])
    error = capsys.readouterr().err
    assert (caught.value.code, len(error.splitlines())) == (64, 1)
    assert str(path) in error and "put a copy of" in error
    assert file_digests(folder) == before


def test_a_registry_with_objects_and_no_database_is_not_new(folder, model, lineage):
    (folder / "registry.sqlite").unlink()
    with pytest.raises(RegistryError, match=r"registry\.sqlite is gone, and there are objects beside it; put a copy"):
        Registry(folder)
    assert not (folder / "registry.sqlite").exists()


def test_a_version_whose_objects_are_gone_is_not_loaded(folder):
    book = Registry(folder)
    shutil.rmtree(folder / "models")
    files = book.store.tree(book.find("words@1").digest)
    book.store.object_path(files["model.safetensors"]).unlink()
    with pytest.raises(RegistryError, match=r"words@1 cannot be loaded: model\.safetensors is gone from"):
        book.resolve("words@1")
    assert book.find("words@1").version == 1, "it can still be held and looked at"
    book.close()
