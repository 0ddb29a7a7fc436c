"""The log: what it holds, and that whoever writes past it is noticed."""

import sqlite3

import pytest

from posttrain.errors import RegistryError
from posttrain.registry import JudgedSuite, Registry
from posttrain.registry.audit import LogFilter


@pytest.fixture
def busy(registry, model, lineage, passing, base):
    """A registry in which every kind of act was done."""
    for weights in "abc":
        registry.register("words", model(weights), lineage(model(weights)), actor="Ada" if weights == "a" else None)
    one, two, _ = (entry.digest for entry in registry.entries())
    registry.record_look([JudgedSuite("s", "sha256:s", ["item"])], one, base)
    registry.promote("words", 1, "champion", passing(one, base), actor="Ada")
    registry.promote("words", 2, "champion", passing(two, one))
    registry.rollback("words", "champion", "bad answers")
    registry.tag("words", 3, "hold", "not yet")
    registry.untag("words", 3, "hold")
    return registry


def write_past(registry, *statements):
    """Change the file as somebody would who has a shell: the triggers that refuse it are dropped first."""
    db = sqlite3.connect(registry.folder / "registry.sqlite")
    for trigger in ("events_stay", "events_keep", "seals_stay", "seals_keep"):
        db.execute(f"DROP TRIGGER {trigger}")
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


def test_every_act_is_in_the_log_and_the_log_adds_up(busy):
    actions = [event.action for event in busy.rows.log(LogFilter())]
    assert actions == ["register"] * 3 + ["look", "promote", "promote", "rollback", "tag", "untag"]
    assert busy.rows.check_log().num_entries == 9


def test_the_log_is_asked_by_actor_kind_model_and_time(busy):
    assert [e.action for e in busy.rows.log(LogFilter(actor="Ada"))] == ["register", "promote"]
    assert [e.version for e in busy.rows.log(LogFilter("words", action="promote"))] == [1, 2]
    assert len(busy.rows.log(LogFilter(since="2000-01-01", until="2999-12"))) == 9
    assert busy.rows.log(LogFilter(until="2000-01-01")) == busy.rows.log(LogFilter(since="2999")) == []
    today = busy.rows.events()[0].at[:10]
    assert busy.rows.log(LogFilter(since=today, until=today[:10]))


TAMPERED = {
    "UPDATE events SET actor = 'Eve' WHERE id = 5": "entry 5 was changed",
    "UPDATE events SET details = replace(details, 'not yet', 'no') WHERE id = 8": "entry 8 was changed",
    "DELETE FROM events WHERE id = 4": "entry 4 is missing",
    "DELETE FROM events WHERE id = 9": "entries after 8 are missing",
    "UPDATE seals SET digest = 'sha256:0' WHERE event = 2": "entry 2 was changed",
    "DELETE FROM seals WHERE event = 2": "entry 2 has no seal",
    "UPDATE aliases SET version = 3": r"aliases \('words', 'champion'\): the log says \(1, 3\), the registry has \(3, 3\)",
    "UPDATE versions SET digest = 'sha256:0' WHERE version = 3": r"versions \('words', 3\): the log says",
    "DELETE FROM tags": r"tags \('words', 2, 'hold'\): the log says bad answers, the registry has None",
}


@pytest.mark.parametrize("statement", TAMPERED)
def test_whoever_writes_past_the_log_is_noticed(busy, statement):
    write_past(busy, statement)
    with pytest.raises(RegistryError, match=f"the log is not as it was written: {TAMPERED[statement]}"):
        busy.rows.check_log()


def test_a_log_that_was_cut_off_and_made_consistent_lacks_a_seal_that_was_noted(busy):
    noted = busy.rows.check_log().head
    busy.rows.check_log(noted)
    write_past(
        busy,
        "DELETE FROM events WHERE id > 8",
        "DELETE FROM seals WHERE event > 8",
        "UPDATE sqlite_sequence SET seq = 8 WHERE name = 'events'",
        "INSERT INTO tags VALUES ('words', 3, 'hold', 'not yet')",
    )
    busy.rows.check_log()
    with pytest.raises(RegistryError, match="no entry has the seal"):
        busy.rows.check_log(noted)


def test_a_registry_from_before_the_seals_is_sealed_when_it_is_opened(busy):
    folder = busy.folder
    busy.close()
    db = sqlite3.connect(folder / "registry.sqlite")
    db.executescript("DROP TABLE seals; DROP INDEX events_of;")
    db.close()
    again = Registry(folder)
    assert again.rows.check_log().num_entries == 9
    again.close()
