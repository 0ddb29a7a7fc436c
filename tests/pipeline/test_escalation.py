"""A verdict that waits for people, and what their decisions do."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from posttrain.api import load_run
from posttrain.cli.app import main
from posttrain.errors import GateError, RegistryError
from posttrain.evidence import Verdict
from posttrain.files import read_json, write_json
from posttrain.gate.folder import load_verdict
from posttrain.pipeline.escalation import decide_pending, decisions

SLOW = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-6, "max_steps": 1}
ASKED = {"baseline": "alias:champion", "primary": [{"suite": "yes"}], "on_inconclusive": "escalate"}


def call(*words):
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return caught.value.code


def decide(run, *words):
    return call("gate", "decide", str(run.out), *words)


@pytest.fixture
def waiting(project):
    """A run whose verdict waits; `waiting(**keys of the stage)`."""

    def make(**keys):
        run = project([{"sft": {**SLOW, **keys}}], gate=ASKED, register={"name": "yes"})
        assert run.command() == 4
        return run

    return make


def test_an_inconclusive_verdict_waits_in_a_file_and_with_an_exit_code_of_its_own(waiting):
    run = waiting()
    assert run.state.status == "pending"
    pending = read_json(run.out / "pending.json")
    assert pending["gate"] == "gates/final"
    assert pending["verdict_digest"] == read_json(run.out / "gates/final/verdict.json")["digest"]
    assert run.state.registered is None
    assert run.command() == 4, "started again it still waits"


def test_accepted_it_is_promoted_and_lineage_and_registry_say_by_whom(waiting, capsys):
    run = waiting()
    assert decide(run, "--accept", "--by", "Ada", "--reason", "safe to try") == 0
    assert "accepted by Ada: safe to try" in capsys.readouterr().out
    assert not (run.out / "pending.json").exists()
    assert run.command() == 0
    assert "gate      ACCEPTED: by Ada: safe to try; the gate said INCONCLUSIVE" in capsys.readouterr().out
    book = run.registry()
    holder = book.holder("yes", "champion")
    assert (holder.version, holder.digest) == (1, run.state.stages[-1].output_digest)
    (record,) = book.records("yes", 1, "decision")
    assert (record["by"], record["reason"], record["accepted"]) == ("Ada", "safe to try", True)
    assert book.chain("yes", 1)[-1].details["decisions"] == [record]
    assert [event.actor for event in book.rows.events("yes") if event.action == "promote"] == ["Ada"]
    assert book.verify("yes", 1).num_files > 0
    book.close()
    assert load_run(run.out).verdict is Verdict.PASS, "as the person decided it"
    state = read_json(run.out / "pipeline.json")
    assert run.command() == 0, "the champion is the candidate by now"
    assert read_json(run.out / "pipeline.json") == state


def test_rejected_the_run_has_failed(waiting):
    run = waiting()
    assert decide(run, "--reject", "--by", "Ada", "--reason", "no gain seen") == 0
    assert run.command() == 1
    assert (run.state.status, run.state.reason) == ("failed", "rejected by Ada: no gain seen")
    assert run.state.registered is None


def test_a_held_run_stays_held_whoever_accepts_it(waiting):
    run = waiting(max_steps=2, health={"gradient_spike": {"times": 0.001, "after": 1, "at_least": 0.0}})
    assert decide(run, "--accept", "--by", "Ada", "--reason", "looks fine") == 0
    run.command()
    assert run.state.registered["alias"] is None
    assert "it is on hold: health: gradient_spike" in run.state.registered["refused"]
    book = ["--registry", str(run.folder / "registry")]
    assert call("registry", "promote", "yes@1", *book) == 64
    assert call("registry", "release", "yes@1", *book) == 0
    assert call("registry", "promote", "yes@1", *book) == 0, "the hold was released, and the decision still stands"


def test_only_a_verdict_that_waits_is_decided_and_only_with_a_name_and_a_reason(waiting, finished, capsys):
    run = waiting()
    with pytest.raises(GateError, match="a name and a reason"):
        decide_pending(run.out, accepted=True, by=" ", reason="x")
    with pytest.raises(GateError, match="no verdict waits for a decision here"):
        decide_pending(finished.out, accepted=True, by="Ada", reason="x")
    assert decide(run, "--by", "Ada", "--reason", "x") == 64, "neither accepted nor rejected"
    write_json(run.out / "pending.json", read_json(run.out / "pending.json") | {"verdict_digest": "sha256:other"})
    with pytest.raises(GateError, match="run it again"):
        decide_pending(run.out, accepted=True, by="Ada", reason="x")


def test_a_decision_on_another_verdict_does_not_count(waiting):
    run = waiting()
    decide_pending(run.out, accepted=True, by="Ada", reason="x")
    path = run.out / "decisions.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict_digest": "sha256:other"}) + "\n")
    assert run.command() == 4, "it still waits"


def test_a_rejection_ends_the_run_whatever_the_champion_is(make_project, tmp_path):
    """Two runs wait on one registry; one is accepted, which moves the champion, then the other is rejected."""
    runs = []
    for name, rate in (("first", 1e-6), ("second", 2e-6)):
        stage = {"sft": {**SLOW, "learning_rate": rate}}
        register = {"name": "yes", "registry": str(tmp_path / "registry")}
        runs.append(make_project(tmp_path / name, [stage], gate=ASKED, register=register))
        assert runs[-1].command() == 4
    first, second = runs
    assert decide(first, "--accept", "--by", "Ada", "--reason", "safe") == 0
    assert first.command() == 0
    assert decide(second, "--reject", "--by", "Eve", "--reason", "rude answers") == 0
    for _ in range(2):
        assert second.command() == 1
        assert (second.state.status, second.state.reason) == ("failed", "rejected by Eve: rude answers")
        assert not (second.out / "pending.json").exists(), "nobody is asked again"
    assert decide(second, "--accept", "--by", "Eve", "--reason", "x") == 64


def test_decisions_are_only_added_to(waiting):
    run = waiting()
    decide_pending(run.out, accepted=True, by="Ada", reason="safe")
    before = (run.out / "decisions.jsonl").read_text()
    (run.out / "gates/final").rename(run.out / "gates/elsewhere")
    run.values["gate"] = {**ASKED, "power": 0.7}
    run.run(on_change="rerun")
    decide_pending(run.out, accepted=False, by="Eve", reason="no")
    assert (run.out / "decisions.jsonl").read_text().startswith(before)
    assert [(decision.by, decision.accepted) for _, decision in decisions(run.out)] == [("Ada", True), ("Eve", False)]


# --- approvals ---------------------------------------------------------------------------------------------------------

QUICK = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 8, "lr_scheduler_type": "constant",
         "per_device_train_batch_size": 8}  # fmt: skip
APPROVED = {"baseline": "alias:champion", "primary": [{"suite": "yes", "min_delta": 0.35}], "approve": 2}


@pytest.fixture(scope="module")
def passed(make_project, tmp_path_factory):
    """A run that passed its gate and waits for two people. Not to be changed."""
    run = make_project(tmp_path_factory.mktemp("passed"), [{"sft": QUICK}], gate=APPROVED, register={"name": "yes"})
    assert run.command() == 4
    return run


@pytest.fixture
def approving(passed, tmp_path):
    """`passed`, in a folder of its own."""
    shutil.copytree(passed.folder, tmp_path / "project")
    return replace(passed, folder=tmp_path / "project")


def test_a_pass_waits_for_as_many_people_as_the_gate_asks_for(approving, capsys):
    run = approving
    pending = read_json(run.out / "pending.json")
    assert (pending["verdict"], pending["approve"], pending["accepted_by"]) == ("PASS", 2, [])
    assert "waits for 2 people" in run.state.reason
    assert run.state.registered is None
    assert decide(run, "--accept", "--by", "Ada", "--reason", "read 40 answers") == 0
    assert "1 of 2 people have accepted it" in capsys.readouterr().out
    assert run.command() == 4, "started again it waits for the second"
    assert read_json(run.out / "pending.json")["accepted_by"] == ["Ada"]
    for name in ("Ada", " ada ", "ＡＤＡ"):
        assert decide(run, "--accept", "--by", name, "--reason", "again") == 64
    assert "has accepted this verdict already (1 of 2 have: Ada); another person must" in capsys.readouterr().err
    assert decide(run, "--accept", "--by", "Eve", "--reason", "so did I") == 0
    assert run.command() == 0
    book = run.registry()
    assert book.holder("yes", "champion").version == 1
    manifest = book.chain("yes", 1)[-1]
    assert manifest.details["approve"] == 2
    assert [(one.by, one.reason) for one in manifest.decisions] == [("Ada", "read 40 answers"), ("Eve", "so did I")]
    assert [(e.actor, e.details["reason"]) for e in book.rows.events("yes", action="decide")] == [
        ("Ada", "read 40 answers"), ("Eve", "so did I"),
    ]  # fmt: skip
    assert book.rows.check_log().num_entries > 0
    book.close()
    card = (run.out / "MODEL_CARD.md").read_text()
    assert "Accepted by Ada on" in card
    assert "Accepted by Eve on" in card
    assert run.command() == 0, "finished, nobody is asked again"


def test_one_rejection_of_a_pass_ends_the_run(approving):
    assert decide(approving, "--accept", "--by", "Ada", "--reason", "fine") == 0
    assert decide(approving, "--reject", "--by", "Eve", "--reason", "rude") == 0
    assert approving.command() == 1
    assert approving.state.reason == "rejected by Eve: rude"
    assert approving.state.registered is None
    assert load_run(approving.out).verdict is Verdict.FAIL


def test_an_inconclusive_verdict_takes_as_many_people_under_escalate(project):
    run = project([{"sft": SLOW}], gate={**ASKED, "approve": 2}, register={"name": "yes"})
    assert run.command() == 4
    assert decide(run, "--accept", "--by", "Ada", "--reason", "a") == 0
    assert run.command() == 4
    assert decide(run, "--accept", "--by", "Eve", "--reason", "b") == 0
    assert run.command() == 0


def test_the_registry_refuses_an_alias_to_what_fewer_people_approved(approving):
    for name in ("Ada", "Eve"):
        decide_pending(approving.out, accepted=True, by=name, reason="read")
    assert approving.command() == 0
    book = approving.registry()
    verdict = load_verdict(approving.out / "gates/final")
    with pytest.raises(RegistryError, match="asks that 2 people approve the verdict, nobody has: start its run again"):
        book.promote("yes", 1, "staging", verdict)
    first = book.chain("yes", 1)[-1].decisions[:1]
    with pytest.raises(RegistryError, match=r"1 have \(Ada\)"):
        book.promote("yes", 1, "staging", verdict, decisions=[*first, *first])
    book.close()
    assert (
        call("registry", "promote", "yes@1", "--alias", "staging", "--registry", str(approving.folder / "registry"))
        == 0
    )


def _deciders(run, *names):
    program = "import sys; from posttrain.cli.app import main; main(['gate', 'decide', *sys.argv[1:]])"
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    words = [str(run.out), "--accept", "--reason", "at once", "--by"]
    started = [
        subprocess.Popen([sys.executable, "-c", program, *words, name], env=environment, stderr=subprocess.PIPE)
        for name in names
    ]
    return [process.wait(60) for process in started], [process.stderr.read().decode() for process in started]


def test_of_two_who_approve_at_once_neither_is_lost_and_one_person_counts_once(approving):
    codes, said = _deciders(approving, "Ada", "ada")
    assert sorted(codes) == [0, 64]
    assert any("another person must" in text for text in said)
    (approving.out / "decisions.jsonl").unlink()
    codes, said = _deciders(approving, "Ada", "Eve")
    assert codes == [0, 0], said
    assert sorted(one.by for _, one in decisions(approving.out)) == ["Ada", "Eve"]
    assert not (approving.out / "pending.json").exists()


def test_a_decision_killed_before_it_cleared_the_question_is_not_asked_again(approving):
    pending = (approving.out / "pending.json").read_text()
    for name in ("Ada", "Eve"):
        decide_pending(approving.out, accepted=True, by=name, reason="read")
    (approving.out / "pending.json").write_text(pending)
    with pytest.raises(GateError, match="no verdict waits"):
        decide_pending(approving.out, accepted=True, by="Bob", reason="late")
    assert [one.by for _, one in decisions(approving.out)] == ["Ada", "Eve"]
    assert approving.command() == 0
