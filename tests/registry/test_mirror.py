import socket
import time

import pytest

from posttrain.errors import ConfigError
from posttrain.registry.mirror import Delivery, MlflowMirror, UndeliverableError, alias_there, deliver


class Flaky:
    """A mirror that is down until told otherwise, and remembers what it was sent."""

    name = "flaky"

    def __init__(self):
        self.up, self.sent = False, []

    def send(self, event, registry):
        if not self.up:
            raise ConnectionError("nobody answers")
        self.sent.append((event.action, event.version))


@pytest.fixture
def promoted(registry, model, lineage, passing, base):
    """Two versions, the second one champion."""
    for weights, version in (("a", 1), ("b", 2)):
        entry = registry.register("words", model(weights), lineage(model(weights)))
        registry.promote("words", version, "champion", passing(entry.digest, base))
        base = entry.digest
    return registry


EXPECTED = [("register", 1), ("promote", 1), ("register", 2), ("promote", 2)]


def test_events_wait_for_a_mirror_that_is_down_and_are_sent_once(promoted):
    mirror = Flaky()
    waiting = deliver(promoted, mirror)
    assert (waiting.sent, waiting.pending, waiting.error) == (0, 4, "ConnectionError: nobody answers")
    mirror.up = True
    assert deliver(promoted, mirror).sent == 4
    assert mirror.sent == EXPECTED
    assert deliver(promoted, mirror).sent == 0
    promoted.rollback("words", "champion", "bad")
    deliver(promoted, mirror)
    assert mirror.sent == [*EXPECTED, ("rollback", 1)]


class Picky(Flaky):
    """Takes everything but promotions."""

    def send(self, event, registry):
        if event.action == "promote":
            raise UndeliverableError("no such name here")
        self.sent.append((event.action, event.version))


def test_an_event_that_can_never_be_delivered_is_named_and_passed_over(promoted):
    mirror = Picky()
    done = deliver(promoted, mirror)
    assert (done.sent, done.pending, mirror.sent) == (2, 0, [("register", 1), ("register", 2)])
    assert done.passed_over == ("promote words@1: no such name here", "promote words@2: no such name here")
    assert deliver(promoted, mirror) == Delivery(0, 0)


def test_a_password_in_the_uri_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        MlflowMirror("http://user:s3cret@127.0.0.1:5000")
    assert "s3cret" not in str(refusal.value)


def test_aliases_are_cleaned_to_what_mlflow_takes():
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved

    aliases = {
        "champion": "champion", "staging.previous": "staging__previous", "v3": "v3__alias", "Latest": "Latest__alias",
        "a-b_c": "a-b_c",
    }  # fmt: skip
    for ours, theirs in aliases.items():
        assert alias_there(ours) == theirs
        _validate_model_alias_name(theirs)
        _validate_model_alias_name_reserved(theirs)


def test_a_dead_server_blocks_nothing(promoted):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    start = time.monotonic()
    result = deliver(promoted, MlflowMirror(f"http://127.0.0.1:{port}"))
    assert (result.sent, result.pending) == (0, 4)
    assert "ConnectionRefusedError" in result.error
    assert time.monotonic() - start < 20


def test_aliases_other_than_champion_reach_mlflow(registry, model, lineage, passing, base, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    tracking = pytest.importorskip("mlflow.tracking")
    for weights, version in (("a", 1), ("b", 2)):
        entry = registry.register("words", model(weights), lineage(model(weights)))
        registry.promote("words", version, "staging.eu", passing(entry.digest, base))
        base = entry.digest
    registry.tag("words", 1, "note", "x" * 200_000)  # longer than MLflow takes
    registry.tag("words", 2, "note", "short")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = deliver(registry, MlflowMirror(uri))
    assert (done.pending, done.error) == (0, None)
    assert [event.partition(":")[0] for event in done.passed_over] == ["tag words@1"]
    client = tracking.MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = {
        alias: client.get_model_version_by_alias("words", alias).tags
        for alias in ("staging__eu", "staging__eu__previous")
    }
    assert [tags["posttrain.version"] for tags in found.values()] == ["2", "1"]
    assert found["staging__eu"]["note"] == "short"


@pytest.mark.slow
def test_mlflow_has_the_versions_and_aliases(promoted, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    tracking = pytest.importorskip("mlflow.tracking")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mirror = MlflowMirror(uri)
    result = deliver(promoted, mirror)
    assert (result.sent, result.pending, result.error) == (4, 0, None)
    client = tracking.MlflowClient(tracking_uri=uri, registry_uri=uri)

    def digest_at(alias):
        return client.get_model_version_by_alias("words", alias).tags["posttrain.digest"]

    first, second = promoted.entries("words")
    assert (digest_at("champion"), digest_at("previous")) == (second.digest, first.digest)
    assert len(client.search_model_versions("name = 'words'")) == 2

    for event in promoted.rows.events():  # sent again, as after a crash between sending and noting it
        mirror.send(event, promoted)
    assert len(client.search_model_versions("name = 'words'")) == 2

    promoted.rollback("words", "champion", "wrong answers")
    assert deliver(promoted, mirror).sent == 1
    assert digest_at("champion") == first.digest
    assert set(client.get_registered_model("words").aliases) == {"champion"}
    held = [version.tags.get("hold") for version in client.search_model_versions("name = 'words'")]
    assert sorted(map(str, held)) == ["None", "wrong answers"]

    promoted.untag("words", 2, "hold")
    assert deliver(promoted, mirror).sent == 1
    assert not any("hold" in version.tags for version in client.search_model_versions("name = 'words'"))
