"""Attempts are chosen on the dev split; the gate's own split is opened for the verdict, and every look at it is counted."""

import json
import math

import pytest

from posttrain.evidence import Verdict
from posttrain.files import read_json
from posttrain.gate.folder import recompute

QUICK = {"learning_rate": 1e-2, "max_steps": 8, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
SLOW = {**QUICK, "max_steps": 1, "learning_rate": 1e-6}
FIRST_LOOK = 0.05 * 6 / math.pi**2
UNSURE = {"baseline": "stage:base", "primary": [{"suite": "yes"}]}
"""Nobody answers right, and 40 items do not show that nobody will."""


def sft(**keys):
    return {"sft": {"datasets": [{"path": "sft.jsonl"}], **QUICK, **keys}}


def gate(**keys):
    return {"baseline": "stage:base", "primary": [{"suite": "yes", "min_delta": 0.35}], **keys}


def relabel(run, before, after):
    """Move items of the suite from one split to another."""
    path = run.folder / "yes.jsonl"
    path.write_text(path.read_text().replace(f'"split": "{before}"', f'"split": "{after}"'))


def verdicts(run):
    return [(entry.attempt, entry.verdict) for entry in run.state.gates]


def evals(run, name):
    return sorted(path.name for path in (run.out / "evals" / name).iterdir())


def alphas(run):
    return [read_json(run.out / entry.folder / "verdict.json")["alpha"] for entry in run.state.gates]


RETRY = {"retry": "sft", "times": 1, "with": {"max_steps": 8, "learning_rate": 1e-2}}


def test_a_retry_is_chosen_on_dev_and_only_the_chosen_one_is_judged(project):
    run = project([sft(**SLOW)], gate=gate(on_fail=RETRY), register={"name": "yes"})
    assert run.run().verdict is Verdict.PASS
    assert [(made.attempt, made.chosen) for made in run.state.selections] == [(1, False), (2, True)]
    assert run.state.selections[0].reason == "yes +0.0000 (line +0.3500)"
    assert verdicts(run) == [(2, "PASS")]
    assert evals(run, "01-sft") == ["yes-dev"]
    assert evals(run, "01-sft-2") == ["yes-dev", "yes-gate"]
    digest = read_json(run.out / "evals/base/yes-gate/report.json")["suite_digest"]
    book = run.registry()
    assert [(one.digest, one.num_looks) for one in book.all_looks()] == [(digest, 1)]
    book.close()
    state = read_json(run.out / "pipeline.json")
    assert run.run().verdict is Verdict.PASS, "by now the champion is the candidate itself"
    assert read_json(run.out / "pipeline.json") == state


def test_under_gate_passes_the_stages_are_chosen_on_dev(project):
    last = {"dpo": {"datasets": [{"path": "pairs.jsonl"}], "loss_type": "sft", "max_steps": 10,
                    "learning_rate": 1e-2, "lr_scheduler_type": "constant"}}  # fmt: skip
    run = project([sft(**SLOW), last], gate=gate(), stop_when="gate_passes")
    assert run.run().verdict is Verdict.PASS
    assert [(made.after, made.chosen) for made in run.state.selections] == [(1, False), ("final", True)]
    assert [entry.after for entry in run.state.gates] == ["final"]
    assert evals(run, "01-sft") == ["yes-dev"]


def test_without_a_dev_split_every_attempt_is_a_look_that_alpha_is_spent_on(project, caplog):
    run = project([sft(**SLOW)], gate=gate(on_fail=RETRY))
    relabel(run, "dev", "gate")
    with caplog.at_level("INFO"):
        assert run.run().verdict is Verdict.PASS
    assert "no items with split dev in yes to choose on" in caplog.text
    assert run.state.selections == ()
    assert verdicts(run) == [(1, "FAIL"), (2, "PASS")]
    assert alphas(run) == pytest.approx([FIRST_LOOK, FIRST_LOOK / 4])
    for entry in run.state.gates:
        recompute(run.out / entry.folder)


def test_inconclusive_is_judged_once_more_with_the_reserve_at_half_of_alpha_each(project):
    run = project([sft(**SLOW)], gate={**UNSURE, "on_inconclusive": "extend"})
    relabel(run, "dev", "reserve")
    assert run.run().verdict is Verdict.INCONCLUSIVE
    tests = [read_json(run.out / entry.folder / "verdict.json")["tests"][0] for entry in run.state.gates]
    assert [test["num_items"] for test in tests] == [40, 75]
    assert alphas(run) == [0.025, 0.025]
    first, both = (read_json(run.out / f"evals/base/yes-{split}/report.json") for split in ("gate", "gate+reserve"))
    assert first["suite_digest"] != both["suite_digest"]
    state = read_json(run.out / "pipeline.json")
    assert run.command() == 2
    assert read_json(run.out / "pipeline.json") == state
    assert [recompute(run.out / entry.folder).verdict for entry in run.state.gates] == [Verdict.INCONCLUSIVE] * 2


def test_what_the_reserve_decides_is_promoted_and_stands_at_the_next_start(project):
    """3 gains on 40 items may be chance; with the 35 of the reserve they are not."""
    gate_ = {**UNSURE, "baseline": "alias:champion", "on_inconclusive": "extend"}
    run = project([sft()], gate=gate_, register={"name": "yes"})
    relabel(run, "dev", "reserve")
    wrong_for_most(run)
    assert run.run().verdict is Verdict.PASS
    assert [entry.verdict for entry in run.state.gates] == ["INCONCLUSIVE", "PASS"]
    state = read_json(run.out / "pipeline.json")
    assert run.run().verdict is Verdict.PASS
    assert read_json(run.out / "pipeline.json") == state
    assert run.state.registered["alias"] == "champion"


def wrong_for_most(run, right=3):
    """Of the gate's items only some count "Yes." as right; of the reserve all do."""
    path, left, rows = run.folder / "yes.jsonl", right, []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "gate":
            row["target"] = "Yes." if left > 0 else "Never."
            left -= 1
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))


def test_extend_without_a_reserve_is_refused_before_any_work(project, capsys):
    run = project([sft(**SLOW)], gate={**UNSURE, "on_inconclusive": "extend"})
    assert run.command() == 64
    assert "no suite of yes has any with split reserve" in capsys.readouterr().err
    assert not (run.out / "stages").exists()


def test_answers_beyond_a_limit_block_a_better_model(project):
    run = project([sft()], gate=gate(limits={"length_ratio": 0.01}))
    assert run.command() == 1
    assert run.state.gates[0].verdict == "FAIL"
    reason = read_json(run.out / "gates/final/verdict.json")["reason"]
    assert reason.startswith("limit yes: answers have")
