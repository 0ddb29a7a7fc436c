"""What a run tells its hooks, and that a hook neither fails a run nor is told twice."""

import json

import pytest

from posttrain.cli.app import main
from posttrain.config.load_pipeline import load_pipeline
from posttrain.errors import ConfigError
from posttrain.pipeline.escalation import decide_pending

SLOW = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-6, "max_steps": 1}
ASKED = {"baseline": "alias:champion", "primary": [{"suite": "yes"}], "on_inconclusive": "escalate"}
TELL = "#!/bin/sh\ncat >> told.jsonl\necho >> told.jsonl\n"


def told(run):
    path = run.folder / "told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def call(*words):
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return caught.value.code


@pytest.fixture
def telling(project):
    """A run with a hook that is a command; `telling(**keys of the stage)`."""

    def make(**keys):
        run = project(
            [{"sft": {**SLOW, **keys}}],
            gate=ASKED,
            register={"name": "yes"},
            notify={"ops": {"command": ["./tell.sh"]}},
        )
        (run.folder / "tell.sh").write_text(TELL)
        (run.folder / "tell.sh").chmod(0o755)
        return run

    return make


def test_a_decision_that_waits_and_the_end_of_the_run_are_told_once(telling):
    run = telling()
    assert run.command() == 4
    assert run.command() == 4, "nobody is told again of the same verdict"
    (pending,) = told(run)
    assert (pending["event"], pending["run"], pending["status"]) == ("pending", "yes", "pending")
    assert "posttrain gate decide" in pending["text"]
    decide_pending(run.out, accepted=True, by="Ada", reason="safe")
    assert run.command() == 0
    assert run.command() == 0
    last = told(run)[1:]
    assert [(one["event"], one["status"], one["version"]) for one in last] == [("finished", "passed", "yes@1")]


def test_a_hold_is_told_and_a_model_without_its_alias(telling):
    run = telling(max_steps=2, health={"gradient_spike": {"times": 0.001, "after": 1, "at_least": 0.0}})
    assert run.command() == 4
    decide_pending(run.out, accepted=True, by="Ada", reason="safe")
    assert run.command() == 5
    events = [(one["event"], one["reason"]) for one in told(run)]
    assert [event for event, _ in sorted(events)] == ["finished", "held", "held", "pending"]
    assert any("health: gradient_spike" in reason for event, reason in events if event == "held")
    assert any("not promoted" in reason for event, reason in events if event == "held")


def test_a_run_that_ends_with_an_error_is_told(telling):
    run = telling(
        max_steps=2, health={"gradient_spike": {"times": 0.001, "after": 1, "at_least": 0.0, "action": "stop"}}
    )
    assert run.command() == 64
    (error,) = told(run)
    assert (error["event"], error["status"]) == ("finished", "error")


def test_a_hook_that_fails_does_not_fail_the_run_and_its_notice_is_sent_later(telling, capsys):
    run = telling()
    (run.folder / "tell.sh").write_text("#!/bin/sh\nexit 1\n")
    assert run.command() == 4
    assert call("notify", str(run.out)) == 75
    assert "waits: ops: pending: exit code 1" in capsys.readouterr().err
    (run.folder / "tell.sh").write_text(TELL)
    assert call("notify", str(run.out)) == 0
    assert call("notify", str(run.out)) == 0
    assert [one["event"] for one in told(run)] == ["pending"]
    assert call("notify", str(run.folder)) == 64


def test_mlflow_that_did_not_get_all_is_told(telling):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    run = telling(mlflow="http://127.0.0.1:1")
    assert run.command() == 4
    assert ("mirror_failed", "01-sft: mlflow has not got") in [(one["event"], one["reason"][:26]) for one in told(run)]


@pytest.mark.parametrize(
    "hook",
    [
        {"url_env": "https://hooks.example/T0P"},
        {"url_env": "OPS", "command": ["./tell.sh"]},
        {},
        {"command": []},
        {"command": ["./tell.sh"], "token_env": "OPS_TOKEN"},
    ],
)
def test_a_hook_names_variables_and_is_one_of_two(project, hook):
    run = project([{"sft": SLOW}], notify={"ops": hook})
    with pytest.raises(ConfigError, match="expected") as caught:
        load_pipeline(run.path)
    assert "T0P" not in str(caught.value)
    assert "notify" in str(caught.value)
