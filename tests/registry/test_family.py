"""Families of versions, told by their manifests."""

import pytest

from posttrain.files import digest_tree
from posttrain.registry import Manifest
from posttrain.registry.family import family_of_versions


@pytest.fixture
def words(registry, model, base):
    """words@1 (sft), words@2 on it by the same run's dpo, words@3 by a later run, mixed@1 merged of two, plain@1 of nobody."""

    def register(name, weights, stage, start, parent=None, chain=(), **inputs):
        folder = model(weights)
        manifest = Manifest(
            stage, {"model": start, **inputs}, {"model": digest_tree(folder)}, parent, {"base_model": "tiny"}
        )
        return registry.register(name, folder, [*chain, manifest]), manifest

    one, sft = register("words", "a", "sft", base)
    two, dpo = register("words", "b", "dpo", one.digest, sft.digest, [sft])
    register("words", "c", "grpo", two.digest, parent=None, run=dpo.digest)
    register("mixed", "d", "merge", base, **{"parent.0": one.digest, "parent.1": two.digest})
    register(
        "mixed",
        "e",
        "merge",
        base,
        **{"parent.0": one.digest, "parent.1": register("other", "f", "sft", base)[0].digest},
    )
    register("plain", "g", "sft", base)
    return registry


def test_each_version_stands_below_those_that_its_lineage_took(words):
    family = {member.ref: member for member in family_of_versions(words, "words")}
    assert {ref: member.parents for ref, member in family.items()} == {
        "words@1": (),
        "words@2": ("words@1",),
        "words@3": ("words@2",),
        "mixed@1": ("words@2",),  # words@1 stands above words@2 already
        "mixed@2": ("other@1", "words@1"),
    }
    assert family["words@2"].stages == ("dpo",) and family["words@1"].base == "tiny"


def test_a_version_of_another_registry_that_is_not_here_is_named_by_its_digest(words, model, base):
    """`words@1` was one version where this was trained, and is another one here."""
    folder, start = model("h"), digest_tree(model("elsewhere"))
    said = {"base_model": "words@1", "parent_version": "words@1"}
    words.register("pulled", folder, Manifest("sft", {"model": start}, {"model": digest_tree(folder)}, details=said))
    [member] = family_of_versions(words, "pulled")
    assert (member.base, member.parents) == (start, ())


def test_a_family_is_what_a_model_came_from_and_what_came_from_it(words):
    refs = [member.ref for member in family_of_versions(words, "mixed")]
    assert sorted(refs) == ["mixed@1", "mixed@2", "other@1", "words@1", "words@2"]
    assert refs.index("words@2") < refs.index("mixed@1")  # parents before children
    assert {member.ref for member in family_of_versions(words, "other")} == {"other@1", "mixed@2"}
    assert {member.ref for member in family_of_versions(words, "plain")} == {"plain@1"}
    assert family_of_versions(words, "absent") == []
