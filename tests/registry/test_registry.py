import getpass
import socket
import sqlite3
from dataclasses import replace

import pytest

from posttrain.errors import RegistryError
from posttrain.evidence import Decision, Verdict
from posttrain.files import digest_bytes, digest_json, digest_tree, write_json
from posttrain.registry import Registry


@pytest.fixture
def add(registry, model, lineage):
    def register(weights, stages=("sft",), **keywords):
        folder = model(weights)
        return registry.register("words", folder, lineage(folder, stages), **keywords)

    return register


# --- register and resolve ---


def test_versions_count_up_and_can_be_loaded_by_reference(registry, add, model):
    first, second = add("a"), add("b")
    assert (first.version, second.version) == (1, 2)
    assert first.digest == digest_tree(model("a")) == digest_tree(first.path)
    assert registry.resolve("words@2") == second
    assert registry.entries("words") == [first, second]
    assert registry.entries("other") == []


def test_registering_the_same_again_is_the_same_version(registry, add):
    assert add("a") == add("a")
    assert [event.action for event in registry.rows.events()] == ["register"]


def test_a_verdict_can_follow_its_version(registry, add, passing, base):
    entry = add("a")
    assert registry.verdict_record("words", 1) is None
    verdict = passing(entry.digest, base)
    assert add("a", verdict=verdict).version == 1
    assert registry.verdict_record("words", 1) == verdict.to_json()


def test_what_does_not_fit_together_is_refused(registry, model, lineage, passing, base):
    folder = model("a")
    chain = lineage(folder)
    with pytest.raises(RegistryError, match="the verdict is about"):
        registry.register("words", folder, chain, passing(base, base))
    with pytest.raises(RegistryError, match="got model name 'a b'"):
        registry.register("a b", folder, chain)
    (folder / "extra.json").write_text("{}")
    with pytest.raises(RegistryError, match="the files changed after the stage that made them"):
        registry.register("words", folder, chain)
    assert registry.entries() == []


def test_references_that_name_nothing_say_so(registry, add, passing, base, model, lineage):
    entry = add("a")
    with pytest.raises(RegistryError, match=r"no words@7 in .*; it has words@1"):
        registry.resolve("words@7")
    with pytest.raises(RegistryError, match="nothing has been promoted"):
        registry.resolve("alias:champion")
    with pytest.raises(RegistryError, match="expected NAME@VERSION"):
        registry.resolve("words")
    registry.promote("words", 1, "champion", passing(entry.digest, base))
    assert registry.resolve("alias:champion") == registry.resolve("words@champion") == registry.show("words", 1)
    folder = model("a")
    registry.register("other", folder, lineage(folder))
    registry.promote("other", 1, "champion", passing(entry.digest, base))
    with pytest.raises(RegistryError, match="ambiguous: other, words"):
        registry.resolve("alias:champion")
    assert registry.resolve("alias:champion", "words").name == "words"


def test_a_deleted_checkout_is_written_again(registry, add):
    entry = add("a")
    for path in sorted(entry.path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    entry.path.rmdir()
    assert digest_tree(registry.resolve("words@1").path) == entry.digest


# --- promote ---


def test_the_first_promotion_is_against_the_base(registry, add, passing, base):
    entry = add("a")
    done = registry.promote("words", 1, "champion", passing(entry.digest, base))
    assert done.aliases == ("champion",)
    assert registry.alias_epoch("words", "champion") == 1


def test_the_next_one_is_against_the_holder_which_becomes_previous(registry, add, passing, base):
    first, second = add("a"), add("b")
    registry.promote("words", 1, "champion", passing(first.digest, base))
    registry.promote("words", 2, "champion", passing(second.digest, first.digest))
    assert registry.show("words", 1).aliases == ("previous",)
    assert registry.show("words", 2).aliases == ("champion",)
    assert registry.resolve("words@previous").version == 1
    assert registry.resolve("alias:previous").version == 1
    assert registry.holder("words", "staging") is None


def test_aliases_are_independent(registry, add, passing, base):
    first, second = add("a"), add("b")
    registry.promote("words", 1, "staging", passing(first.digest, base))
    registry.promote("words", 2, "champion", passing(second.digest, base))
    registry.promote("words", 2, "staging", passing(second.digest, first.digest))
    assert registry.show("words", 1).aliases == ("staging.previous",)
    assert registry.resolve("words@staging.previous").version == 1


def test_promoting_twice_with_the_same_verdict_changes_nothing(registry, add, passing, base):
    entry = add("a")
    verdict = passing(entry.digest, base)
    registry.promote("words", 1, "champion", verdict, 0)
    registry.promote("words", 1, "champion", verdict, 0)
    assert registry.alias_epoch("words", "champion") == 1
    assert [event.action for event in registry.rows.events()] == ["register", "promote"]


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.INVALID])
def test_only_pass_promotes(registry, add, passing, base, verdict):
    entry = add("a")
    with pytest.raises(RegistryError, match=f"verdict is {verdict.value} .* expected PASS"):
        registry.promote("words", 1, "champion", passing(entry.digest, base, verdict))
    assert registry.alias_epoch("words", "champion") == 0


def test_a_person_may_accept_an_inconclusive_verdict_and_only_that(registry, add, passing, base):
    entry = add("one")
    unsure = passing(entry.digest, base, Verdict.INCONCLUSIVE)
    said = Decision(unsure.digest, True, "Ada", "safe to try", "2026-01-01T00:00:00+00:00")
    for decision, verdict, message in (
        (None, unsure, "expected PASS"),
        (replace(said, accepted=False), unsure, "Ada rejected it: safe to try"),
        (replace(said, verdict_digest="sha256:other"), unsure, "Ada accepted another verdict"),
        (said, passing(entry.digest, base, Verdict.FAIL), "accepted another verdict"),
    ):
        with pytest.raises(RegistryError, match=message):
            registry.promote("words", entry.version, "champion", verdict, decisions=[decision] if decision else [])
    failed = passing(entry.digest, base, Verdict.FAIL)
    with pytest.raises(RegistryError, match="verdict is FAIL"):
        accepted = replace(said, verdict_digest=failed.digest)
        registry.promote("words", entry.version, "champion", failed, decisions=[accepted])
    assert registry.holder("words", "champion") is None
    registry.tag("words", entry.version, "hold", "health: kl")
    with pytest.raises(RegistryError, match="on hold: health: kl"):
        registry.promote("words", entry.version, "champion", unsure, decisions=[said])
    registry.untag("words", entry.version, "hold")
    registry.promote("words", entry.version, "champion", unsure, decisions=[said])
    assert registry.records("words", entry.version, "decision") == [said.to_json()]
    assert registry.rows.events("words")[-1].actor == "Ada"


def test_evidence_is_handed_out_as_it_was_registered(registry, model, lineage, tmp_path):
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "a.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("name: x")
    evidence = {"evals": tmp_path / "evals", "config": tmp_path / "config.yaml"}
    folder = model("one")
    entry = registry.register("words", folder, lineage(folder), evidence=evidence)
    for role in evidence:
        assert registry.export("words", entry.version, role, tmp_path / "out" / role) == tmp_path / "out" / role
    assert digest_tree(tmp_path / "out" / "evals") == digest_tree(tmp_path / "evals")
    assert (tmp_path / "out" / "config").read_text() == "name: x"
    assert registry.export("words", entry.version, "gates", tmp_path / "out" / "gates") is None


def test_refusals_name_their_reason_and_change_nothing(registry, add, passing, base):
    from dataclasses import replace

    first, second = add("a"), add("b")
    good = passing(first.digest, base)

    def refused(message, version, verdict, **keywords):
        with pytest.raises(RegistryError, match=message):
            registry.promote("words", version, keywords.pop("alias", "champion"), verdict, **keywords)

    refused("this version is .*: gate this version", 2, good)
    refused("says PASS, but its tests do not", 1, replace(good, tests=()))
    stray = passing(first.digest, second.digest)
    refused("nothing holds champion yet, so the baseline must be the base model", 1, stray)
    refused(r"the alias has moved \(epoch 0, expected 3\)", 1, good, expected_epoch=3)
    refused("kept by the registry itself", 1, good, alias="previous")
    refused("got alias '3'", 1, good, alias="3")
    assert [event.action for event in registry.rows.events()] == ["register", "register"]

    registry.promote("words", 1, "champion", good)
    refused("champion is now version 1 .* stale, gate against the present holder", 2, passing(second.digest, base))
    registry.tag("words", 2, "hold", "entropy collapsed")
    refused("on hold: entropy collapsed", 2, passing(second.digest, first.digest))
    registry.untag("words", 2, "hold")
    registry.promote("words", 2, "champion", passing(second.digest, first.digest))


# --- reward certificates ---


def grpo(registry, model, lineage, certificate, registered=True):
    folder = model("rl")
    inputs = {} if certificate is None else {"certificate": digest_json(certificate)}
    chain = lineage(folder, ("sft", "grpo"), **inputs)
    return registry.register("words", folder, chain, certificates=[certificate] if certificate and registered else [])


def test_rl_is_promoted_with_a_passing_certificate(registry, model, lineage, passing, base):
    entry = grpo(registry, model, lineage, {"verdict": "pass", "reward": "sha256:1"})
    assert registry.promote("words", 1, "champion", passing(entry.digest, base)).aliases == ("champion",)


@pytest.mark.parametrize(
    ("certificate", "registered", "message"),
    [
        (None, True, "stage grpo was trained without a reward certificate"),
        ({"verdict": "fail"}, True, "says 'fail', expected 'pass'"),
        ({"verdict": "partial"}, True, "says 'partial', expected 'pass'"),
        ({"verdict": "pass"}, False, "was not registered with this version"),
    ],
)
def test_rl_without_one_is_refused(registry, model, lineage, passing, base, certificate, registered, message):
    entry = grpo(registry, model, lineage, certificate, registered)
    with pytest.raises(RegistryError, match=message):
        registry.promote("words", 1, "champion", passing(entry.digest, base))
    assert registry.holder("words", "champion") is None


# --- rollback ---


def promoted(registry, add, passing, base, names):
    baseline = base
    for name in names:
        entry = add(name)
        registry.promote("words", entry.version, "champion", passing(entry.digest, baseline))
        baseline = entry.digest


def test_rollback_goes_to_previous_and_holds_the_bad_version(registry, add, passing, base):
    promoted(registry, add, passing, base, "abc")
    verdict = passing(registry.show("words", 3).digest, registry.show("words", 2).digest)
    assert registry.rollback("words", "champion", "wrong answers in production").version == 2
    assert registry.show("words", 3).tags == {"hold": "wrong answers in production"}
    assert registry.resolve("words@previous").version == 1
    assert registry.alias_epoch("words", "champion") == 4
    with pytest.raises(RegistryError, match="on hold: wrong answers"):
        registry.promote("words", 3, "champion", verdict)
    assert registry.rollback("words", "champion", "this one too").version == 1
    with pytest.raises(RegistryError, match="no version to go back to"):
        registry.rollback("words", "champion", "and this")
    last = registry.rows.events()[-1]
    assert (last.action, last.version, last.details["from"], last.details["reason"]) == (
        "rollback",
        1,
        2,
        "this one too",
    )


def test_after_a_rollback_a_new_candidate_is_gated_against_the_restored_one(registry, add, passing, base):
    promoted(registry, add, passing, base, "ab")
    registry.rollback("words", "champion", "bad")
    entry = add("c")
    registry.promote("words", 3, "champion", passing(entry.digest, registry.show("words", 1).digest))
    assert registry.resolve("words@previous").version == 1
    assert registry.rollback("words", "champion", "bad again").version == 1
    assert registry.holder("words", "previous") is None


def test_rollback_checks_before_it_moves(registry, add, passing, base):
    promoted(registry, add, passing, base, "ab")
    with pytest.raises(RegistryError, match="needs a reason"):
        registry.rollback("words", "champion", " ")
    with pytest.raises(RegistryError, match="is at version 2, expected 1"):
        registry.rollback("words", "champion", "bad", expected_version=1)
    weights = registry.show("words", 1).path / "model.safetensors"
    weights.chmod(0o644)
    weights.write_text("damaged in place")
    with pytest.raises(RegistryError, match=r"model\.safetensors: content has changed"):
        registry.rollback("words", "champion", "bad")
    assert registry.resolve("words@champion").version == 2
    assert registry.show("words", 2).tags == {}


def test_rollback_to_a_held_version_is_refused(registry, add, passing, base):
    promoted(registry, add, passing, base, "ab")
    registry.tag("words", 1, "hold", "leaks data")
    with pytest.raises(RegistryError, match=r"words@1 is on hold \(leaks data\)"):
        registry.rollback("words", "champion", "bad")


# --- verify ---


def test_a_hold_that_comes_while_the_bytes_are_read_stops_the_rollback(registry, add, passing, base, monkeypatch):
    promoted(registry, add, passing, base, "ab")
    real = registry.verify

    def slow(name, version):
        done = real(name, version)
        other = Registry(registry.folder)
        other.tag(name, version, "hold", "wrong units")
        other.close()
        return done

    monkeypatch.setattr(registry, "verify", slow)
    with pytest.raises(RegistryError, match=r"words@1 is on hold \(wrong units\)"):
        registry.rollback("words", "champion", "slow answers")
    assert registry.holder("words", "champion").version == 2


def flip(path):
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_walks_every_manifest_and_file(registry, add, tmp_path, passing, base, model):
    write_json(tmp_path / "suite.json", {"items": 3})
    verdict = passing(digest_tree(model("a")), base)
    add("a", ("sft", "dpo"), verdict=verdict, evidence={"suite": tmp_path / "suite.json", "copy": model("b")})
    done = registry.verify("words", 1)
    assert (done.num_manifests, done.num_files) == (2, 3 + 2 + 1 + 1 + 3)


def test_a_flipped_byte_anywhere_is_found_and_named(registry, add, tmp_path, passing, base, model):
    write_json(tmp_path / "suite.json", {"items": 3})
    verdict = passing(digest_tree(model("a")), base)
    entry = add("a", ("sft", "dpo"), verdict=verdict, evidence={"suite": tmp_path / "suite.json"})
    chain = registry.chain("words", 1)
    store = registry.store
    objects = {
        r"words@1 model: model\.safetensors": store.tree(entry.digest)["model.safetensors"],
        r"words@1 model: tokenizer/vocab\.json": store.tree(entry.digest)["tokenizer/vocab.json"],
        "words@1 model: list of files": entry.digest,
        "words@1 suite: suite": digest_tree_of_file(tmp_path / "suite.json"),
        "words@1 verdict: verdict": verdict.digest,
        "words@1 manifest: content": chain[0].digest,
    }
    for message, digest in objects.items():
        flip(store.object_path(digest))
        with pytest.raises(RegistryError, match=f"{message}.*changed|{message} has changed"):
            registry.verify("words", 1)
        flip(store.object_path(digest))
    assert registry.verify("words", 1).num_manifests == 2


def digest_tree_of_file(path):
    return digest_bytes(path.read_bytes())


def test_a_checkout_that_is_no_longer_the_model_is_found(registry, add):
    entry = add("a")
    (entry.path / "config.json").unlink()
    (entry.path / "config.json").write_text('{"other": 1}')
    with pytest.raises(RegistryError, match=r"config\.json: is not the registered"):
        registry.verify("words", 1)
    (entry.path / "config.json").write_text("{}")
    (entry.path / "added.py").write_text("")
    with pytest.raises(RegistryError, match=r"files that were not registered: added\.py"):
        registry.verify("words", 1)


def test_a_version_row_pointing_elsewhere_is_found(registry, add, tmp_path):
    first, second = add("a"), add("b")
    db = sqlite3.connect(tmp_path / "registry" / "registry.sqlite")
    db.execute("UPDATE versions SET digest = ? WHERE version = 2", (first.digest,))
    db.commit()
    db.close()
    with pytest.raises(RegistryError, match=f"its manifest made {second.digest}"):
        registry.verify("words", 2)


def test_a_damaged_model_is_not_promoted(registry, add, passing, base):
    entry = add("a")
    flip(entry.path / "model.safetensors")
    with pytest.raises(RegistryError, match="content has changed"):
        registry.promote("words", 1, "champion", passing(entry.digest, base))


# --- events ---


def test_events_say_who_what_and_why_and_cannot_be_changed(registry, add, passing, base, tmp_path):
    entry = add("a", actor="ana")
    registry.promote("words", 1, "champion", passing(entry.digest, base), actor="ben")
    registered, promoted_event = registry.rows.events("words")
    assert (registered.actor, registered.details["digest"]) == ("ana", entry.digest)
    assert (promoted_event.actor, promoted_event.details["epoch"]) == ("ben", 1)
    assert registry.rows.events(after=registered.id) == [promoted_event]
    db = sqlite3.connect(tmp_path / "registry" / "registry.sqlite")
    for statement in ("UPDATE events SET actor = 'eve'", "DELETE FROM events"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)
    db.close()


def test_an_actor_is_named_even_without_asking(registry, add, monkeypatch):
    add("a")
    monkeypatch.setenv("POSTTRAIN_ACTOR", "nightly job")
    add("b")
    actors = [event.actor for event in registry.rows.events()]
    assert actors == [f"{getpass.getuser()}@{socket.gethostname()}", "nightly job"]


def statements(registry, work) -> int:
    """How many SQL statements `work` takes."""
    seen = []
    registry._db.set_trace_callback(seen.append)
    work()
    registry._db.set_trace_callback(None)
    return len(seen)


def test_listing_and_finding_take_as_much_work_with_many_versions_as_with_few(registry, add, passing, base):
    """No manifest is read for it: with their objects gone, versions are still listed and an alias still found."""
    first = add("a")
    registry.promote("words", 1, "champion", passing(first.digest, base))
    acts = (registry.entries, lambda: registry.find("alias:champion"), lambda: registry.find("words@champion"))
    before = [statements(registry, act) for act in acts]
    for number in range(30):
        add(f"w{number}")
    assert [statements(registry, act) for act in acts] == before
    for path in (registry.folder / "objects").glob("??/*"):
        path.unlink()
    assert len(registry.entries()) == 31 and registry.find("alias:champion").aliases == ("champion",)
