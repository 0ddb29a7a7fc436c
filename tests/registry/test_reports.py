"""Eval reports that are kept with versions."""

import pytest

from posttrain.errors import RegistryError
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import digest_tree
from posttrain.registry.reports import stored_reports


def report(digest, right, split="gate"):
    items = tuple(ItemRecord(f"q{row}", f"p{row}", (float(row < right),)) for row in range(10))
    return EvalReport("heldout", split, "sha256:suite", digest, "exact", items)


@pytest.fixture
def words(registry, model, lineage, tmp_path, base):
    """words@1 whose run evaluated it and the base, on two splits."""
    digest = digest_tree(model("a"))
    report(digest, 7).save(tmp_path / "evals" / "candidate" / "heldout")
    report(digest, 9, "dev").save(tmp_path / "evals" / "candidate" / "heldout.dev")
    report(base, 5).save(tmp_path / "evals" / "baseline" / "heldout")
    registry.register("words", model("a"), lineage(model("a")), evidence={"evals": tmp_path / "evals"})
    return registry


def test_reports_come_back_by_model_whichever_version_keeps_them(words, base):
    digest = words.show("words", 1).digest
    found = stored_reports(words, {digest, base, "sha256:nobody"}, "gate")
    assert {model: [kept.mean for kept in reports] for model, reports in found.items()} == {
        digest: [0.7],
        base: [0.5],
        "sha256:nobody": [],
    }
    assert found[digest] == [report(digest, 7)]


def test_a_changed_item_is_named(words, tmp_path):
    digest = words.show("words", 1).digest
    tree = words.store.tree(words.evidence("words", 1)["evals"][1])
    path = words.store.object_path(tree["candidate/heldout/items.jsonl"])
    path.chmod(0o600)
    path.write_text(path.read_text().replace("[0.0]", "[1.0]", 1))
    with pytest.raises(RegistryError, match=r"candidate/heldout/items\.jsonl"):
        stored_reports(words, {digest}, "gate")
