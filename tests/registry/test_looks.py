import pytest

from posttrain.registry import JudgedSuite, Registry


def suite(digest, items=None, name="heldout"):
    return JudgedSuite(name, digest, frozenset([f"of {digest}"] if items is None else items))


def test_looks_count_up_per_suite_and_outlive_the_connection(registry, tmp_path):
    assert registry.record_look([suite("s1")], "c1", "b") == 1
    assert registry.record_look([suite("s1")], "c2", "b") == 2
    assert registry.record_look([suite("s2")], "c2", "b") == 1
    again = Registry(tmp_path / "registry")
    assert again.record_look([suite("s1")], "c3", "b") == 3
    assert [again.count_looks(suite(digest)) for digest in ("s1", "s2", "s3")] == [3, 1, 0]
    again.close()


def test_judging_the_same_pair_again_is_not_another_look(registry):
    assert registry.record_look([suite("s1")], "c1", "b") == 1
    assert registry.record_look([suite("s1")], "c2", "b") == 2
    assert registry.record_look([suite("s1")], "c1", "b") == 1
    assert registry.record_look([suite("s1")], "c1", "other baseline") == 3


def test_the_most_looked_at_suite_counts(registry):
    registry.record_look([suite("s1")], "c1", "b")
    assert registry.record_look([suite("s1"), suite("s2")], "c2", "b") == 2


def test_a_suite_that_asks_one_item_of_another_goes_on_counting(registry):
    """Another decoding or scorer, a line more or less, another name: the items have been seen."""
    registry.record_look([suite("s1", "abc")], "c1", "b")
    assert registry.record_look([suite("s2", "abc")], "c1", "b") == 2, "the same pair, judged otherwise"
    assert registry.record_look([suite("s3", "cde", name="other")], "c2", "b") == 3
    assert registry.record_look([suite("s2", "abc")], "c3", "b") == 4
    assert registry.record_look([suite("s4", "de")], "c3", "b") == 2, "its items were looked at once"


def test_suites_of_one_gate_that_share_items_are_one_look(registry):
    gate = [suite("exact", "ab"), suite("format", "ab", name="format")]
    assert [registry.record_look(gate, candidate, "b") for candidate in ("c1", "c2", "c1")] == [1, 2, 1]


def test_a_suite_of_new_items_renews_the_one_of_its_name_and_has_a_budget_of_its_own(registry):
    for number in range(3):
        registry.record_look([suite("s1", "abc")], f"c{number}", "b")
    assert registry.record_look([suite("s2", "def")], "c3", "b") == 1
    registry.record_look([suite("s3", "fg")], "c4", "b")
    events = [event.details.get("renews") for event in registry.rows.events(action="look")]
    assert events == [None, None, None, {"s2": "s1"}, None], "what shares an item renews nothing"
    found = [(one.name, one.digest, one.num_looks, one.renews) for one in registry.all_looks()]
    assert found == [("heldout", "s1", 3, None), ("heldout", "s2", 2, "s1"), ("heldout", "s3", 2, None)]
    assert registry.renewals([suite("s1"), suite("s2"), suite("s3")]) == [
        "suite heldout asks new items since s1, so its looks count from 1 again"
    ]
    assert registry.rows.check_log().num_entries == 5


def test_looks_of_an_older_registry_are_kept_and_know_their_items_from_the_next_look_on(registry, tmp_path):
    registry.record_look([suite("s1", "abc")], "c1", "b")
    registry.rows._db.executescript("DROP INDEX looks_by_item; DROP TABLE look_items")
    assert registry.all_looks() == []
    old = Registry(tmp_path / "registry")
    assert old.record_look([suite("s1", "abc")], "c2", "b") == 2
    assert old.record_look([suite("s2", "a")], "c2", "b") == 3
    old.close()


def test_a_ledger_of_ten_thousand_items_is_read_at_once(registry):
    big = suite("big", [f"sha256:{number:064d}" for number in range(10_000)])
    assert [registry.record_look([big], f"c{number}", "b") for number in range(3)] == [1, 2, 3]
    assert registry.count_looks(suite("other", ["sha256:" + "0" * 64])) == 3


@pytest.mark.parametrize("items", ["", "abc"])
def test_a_suite_without_items_counts_by_its_digest(registry, items):
    assert [registry.record_look([suite("s", items)], f"c{number}", "b") for number in range(2)] == [1, 2]
