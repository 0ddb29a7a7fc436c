"""`posttrain registry tree | trend | compare`."""

import json

import pytest
from typer.testing import CliRunner

from posttrain.cli.registry import app
from posttrain.errors import RegistryError
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import digest_bytes, digest_tree
from posttrain.registry import Manifest, Registry

BASE = digest_bytes(b"base")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output

    return invoke


@pytest.fixture
def words(tmp_path):
    """words@1 … @4, each from the one before, 600, 700, 600 and 650 of 1000 right; the last on another state of the suite."""
    book = Registry(tmp_path / "registry")
    start, chain = BASE, []
    for weights, right, suite in (("a", 600, "old"), ("b", 700, "old"), ("c", 600, "old"), ("d", 650, "new")):
        folder, evals = tmp_path / f"model-{weights}", tmp_path / f"evals-{weights}"
        folder.mkdir()
        (folder / "model.safetensors").write_text(weights * 100)
        made = digest_tree(folder)
        items = tuple(ItemRecord(f"q{row}", f"p{row}", (float(row < right),)) for row in range(1000))
        EvalReport("heldout", "gate", f"sha256:{suite}", made, "exact", items).save(evals / "candidate" / "heldout")
        parent = chain[-1].digest if chain else None
        chain = [
            *chain,
            Manifest("sft" if not chain else "dpo", {"model": start}, {"model": made}, parent, {"base_model": "tiny"}),
        ]
        book.register("words", folder, chain, evidence={"evals": evals})
        start = made
    book.close()


def test_the_tree_shows_what_came_from_what(run, words):
    lines = run("tree", "words").splitlines()
    assert lines == ["tiny", "  words@1  sft", "    words@2  dpo", "      words@3  dpo", "        words@4  dpo"]
    told = json.loads(run("tree", "words", "--json"))
    assert [(row["version"], row["parents"], row["base"]) for row in told][1] == (2, ["words@1"], "tiny")
    with pytest.raises(RegistryError, match="no nothing in registry"):
        run("tree", "nothing")


def test_the_trend_has_intervals_and_paired_changes_and_says_where_the_suite_changed(run, words):
    lines = run("trend", "words", "--suite", "heldout").splitlines()
    assert lines[0] == "words@1  0.6000 [0.5693, 0.6299]  1000 items"  # Wilson, worked by hand
    assert lines[1].startswith("words@2  0.7000 [") and "change +0.1000 [+0.0" in lines[1]
    assert "change -0.1000 [-0." in lines[2]
    assert lines[3].startswith("-- another version of the suite") and "change" not in lines[4]
    told = json.loads(run("trend", "words", "--suite", "heldout", "--json"))
    assert [row["score"]["mean"] for row in told] == [0.6, 0.7, 0.6, 0.65]
    assert told[0]["change"] is None and told[1]["change"]["low"] > 0
    with pytest.raises(RegistryError, match=r"got no report on 'arc', split 'gate'.*there are heldout"):
        run("trend", "words", "--suite", "arc")


def test_two_versions_are_compared_by_the_test_of_the_gate_and_its_exit_codes(run, words):
    assert "PASS: all 1 tests cleared their line" in run("compare", "words@2", "words@1")
    assert "the whole interval lies below -0.0500" in run("compare", "words@3", "words@2", code=1)
    run("compare", "words@3", "words@2", "--margin", "0.2")
    told = json.loads(run("compare", "words@2", "words@1", "--json"))
    assert told["tests"][0]["estimate"] == 0.1 and told["tests"][0]["method"] == "exact"
    assert "suite digest differs" in run("compare", "words@4", "words@1", code=3)


def test_versions_without_a_common_suite_are_not_compared(run, words):
    with pytest.raises(
        RegistryError, match="no reports on arc that are both on split 'gate'; both are kept for heldout"
    ):
        run("compare", "words@2", "words@1", "--suite", "arc")
    with pytest.raises(RegistryError, match="both are kept for none: evaluate both"):
        run("compare", "words@2", "words@1", "--split", "dev")


def test_reading_versions_writes_nothing(run, words, tmp_path):
    book = Registry(tmp_path / "registry")
    before = len(book.rows.events())
    run("compare", "words@2", "words@1")
    assert len(book.rows.events()) == before and book.all_looks() == []
    book.close()
