"""Stored rollouts are paid anew as training would pay them, and what changed is counted right."""

import json
import math

import pytest
from typer.testing import CliRunner

from posttrain.cli.rewards import rewards
from posttrain.errors import RewardError
from posttrain.rewards.rescore import SCORED, Rescored, ScoredCall, find_calls, largest_changes, paid_anew, what_changed
from posttrain.rewards.workers import RewardPool

SOURCE = """
def length(completions): return [float(len(c)) for c in completions]
def shorter(completions): return [-float(len(c)) for c in completions]
def vast(completions): return [(-1.0) ** len(c) * 1e200 for c in completions]
def half(completions): return [None if c == 'bb' else 1.0 for c in completions]
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "r.py").write_text(SOURCE)
    for step in range(3):
        columns = {"answer": ["x", "x", "y", "y"], "completion_ids": [[step], [1], [2], [3]]}
        call = ScoredCall(step, ["p", "p", "q", "q"], ["a", "bb", "ccc", "ccc"], columns, [1.0, 2.0, 3.0, 3.0])
        call.save(tmp_path / "run/stages/01-grpo" / SCORED)
        call.save(tmp_path / "run/stages/01-grpo" / SCORED)
    return tmp_path / "run"


def rescored(run, name):
    with RewardPool([f"r.py:{name}"], folder=run.parent) as pool:
        return paid_anew(find_calls(run), pool)


def test_the_same_reward_changes_nothing(run):
    found = what_changed(rescored(run, "length"))
    assert found["rollouts"] == [12, 4, 4, 4]
    assert found["mean before"] == found["mean after"] == [2.25] * 4
    assert (
        found["paid otherwise"]
        == found["groups with another best"]
        == found["advantages of the other sign"]
        == [0.0] * 4
    )
    assert found["rank correlation"] == pytest.approx([1.0] * 4)
    assert found["groups without spread before"] == found["groups without spread after"] == [0.5] * 4
    assert largest_changes(rescored(run, "length")) == []


def test_the_contrary_turns_every_advantage_round(run):
    rows = rescored(run, "shorter")
    found = what_changed(rows)
    assert found["paid otherwise"][0] == 1.0 and found["rank correlation"][0] == pytest.approx(-1.0)
    assert found["groups with another best"][0] == 0.5, "where all are alike the best stays"
    assert found["advantages of the other sign"][0] == 0.5
    assert {(row.before, row.after) for row in largest_changes(rows)} == {(3.0, -3.0)}


def test_what_cannot_be_scored_is_counted_and_in_no_mean(run):
    found = what_changed(rescored(run, "half"))
    assert found["unscored after"][0] == 0.25 and found["unscored before"][0] == 0.0
    assert found["mean before"][0] == pytest.approx((1 + 3 + 3) / 3)


def test_rewards_whose_squares_overflow_are_spread_infinitely(run):
    found = what_changed(rescored(run, "vast"))
    assert found["std after"] == [math.inf] * 4 and found["paid otherwise"][0] == 1.0


def test_groups_are_rows_of_one_prompt_and_its_columns(run):
    assert [row.group for row in rescored(run, "length")][:6] == [0, 0, 1, 1, 2, 2]


def test_one_step_has_no_thirds():
    rows = [Rescored(0, 0, "p", "c", 1.0, 2.0), Rescored(0, 0, "p", "d", 1.0, 1.0)]
    assert what_changed(rows)["mean after"] == [1.5]


def test_a_run_that_kept_nothing_and_a_damaged_file_are_named(tmp_path, run):
    with pytest.raises(RewardError, match=r"kept no rollouts; expected .* keep_rollouts: true"):
        find_calls(tmp_path / "nowhere")
    file = next((run / "stages/01-grpo" / SCORED).glob("*.json"))
    file.write_text("{")
    with pytest.raises(RewardError, match=rf"{file.name}: these rollouts cannot be read"):
        list(find_calls(run))


def test_the_command_prints_the_table_and_writes_every_completion(run, tmp_path):
    named = ["rescore", str(run), "--with", f"{run.parent}/r.py:shorter", "--out"]
    done = CliRunner().invoke(rewards, [*named, str(tmp_path)])
    assert done.exit_code == 2 and "is a directory" in done.output
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(rewards, [*named, str(out)])
    assert done.exit_code == 0, done.output
    assert "12 stored rollouts" in done.output and "advantages of the other sign" in done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 12 and lines[0] == {
        "step": 0, "group": 0, "prompt": "p", "completion": "a", "before": 1.0, "after": -1.0, "error": None,
    }  # fmt: skip
