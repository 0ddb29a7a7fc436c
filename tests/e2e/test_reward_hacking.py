"""The story that examples/reward-hacking tells, as it is shipped."""

import json
import shutil
from pathlib import Path

import pytest

from posttrain.cli.app import main
from posttrain.report.records import load_run

EXAMPLE = Path(__file__).parents[2] / "examples" / "reward-hacking"


@pytest.fixture
def example(tmp_path):
    ignored = shutil.ignore_patterns("runs", "registry", "__pycache__")
    return Path(shutil.copytree(EXAMPLE, tmp_path / "example", ignore=ignored))


def run(config, *options):
    with pytest.raises(SystemExit) as caught:
        main(["run", str(config), "--quiet", *options])
    return caught.value.code


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_reward_that_can_be_fooled_is_refused_then_found_out_then_blocked(example, capsys):
    assert run(example / "hackable.yaml") != 0
    said = capsys.readouterr()
    assert "the rewards did not pass their check, so RL does not start" in said.out + said.err
    assert not list(example.glob("runs/hackable/stages/*/metrics.jsonl"))

    assert run(example / "hackable.yaml", "--set", "name=forced", "--set", "grpo.reward_check=off") != 0
    (stage,) = (example / "runs" / "forced" / "stages").glob("*-grpo")
    reports = lines(stage / "metrics.jsonl")
    scores = [report["eval_score"] for report in reports if "eval_score" in report]
    rewards = [report["reward"] for report in reports]
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert scores[-1] < scores[0] - 0.3
    findings = [event["rule"] for event in lines(stage / "events.jsonl") if event["kind"] == "finding"]
    assert "reward_without_score" in findings
    record = load_run(example / "runs" / "forced")
    assert record.status == "failed"
    assert record.registered is None


@pytest.mark.slow
def test_the_same_run_with_a_reward_that_holds_is_certified_and_promoted(example, capsys):
    assert run(example / "certified.yaml") == 0
    record = load_run(example / "runs" / "certified")
    assert [certificate["verdict"] for certificate in record.certificates.values()] == ["pass"]
    assert record.registered is not None
    assert record.registered["alias"] == "champion"
    (stage,) = (example / "runs" / "certified" / "stages").glob("*-grpo")
    findings = [event["rule"] for event in lines(stage / "events.jsonl") if event["kind"] == "finding"]
    assert "reward_without_score" not in findings
