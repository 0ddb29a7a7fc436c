"""While RL runs: a judge that changes behind its name is seen, one that stays is not, and asking it again disturbs nothing."""

import json

import pytest
import torch
import yaml

from posttrain.recipes.experience.judge_drift import FILE


@pytest.fixture
def paid(train, tmp_path):
    """`paid(url, "name", …)` trains four steps paid by the judge at this URL; the run's folder."""

    def paid(url, name, **options):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"model": "m", "url": url, "cache": f"./kept-{name}"}))
        keys = {"max_steps": 4, "learning_rate": 1e-3, "reward_check_steps": 2, **options}
        return train("grpo", name=name, reward_funcs=[f"judge:{path}"], **keys)

    return paid


def steady(question, body):
    return f"Verdict: {sum(question.encode()) % 11}"


def changing():
    """Says the opposite when it is asked again."""
    seen = set()

    def rule(question, body):
        number = sum(question.encode()) % 2 * 10
        again = question in seen
        seen.add(question)
        return f"Verdict: {10 - number if again else number}"

    return rule


def findings(folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event["rule"] for event in events if event["kind"] == "finding"]


def agreement(rows):
    return {row["step"]: row["judge/agreement"] for row in rows if "judge/agreement" in row}


def test_a_judge_that_changes_behind_its_name_is_seen(paid, judging, runner):
    with judging(changing()) as (url, _):
        folder = paid(url, "changing")
    assert agreement(runner.rows(folder)) == {3: 0.0}
    assert "judge_drift" in findings(folder)


def test_a_steady_judge_raises_no_alarm_and_the_run_is_the_same(paid, judging, runner):
    with judging(steady) as (url, asked):
        watched = paid(url, "watched")
    with judging(steady) as (url, asked_alone):
        alone = paid(url, "alone", reward_check_steps=0)
    assert agreement(runner.rows(watched)) == {3: 1.0}
    assert "judge_drift" not in findings(watched)
    for name, weight in runner.weights(alone).items():
        assert torch.equal(weight, runner.weights(watched)[name]), name
    # What is written down of the first batch was asked for it; only the second time is paid for.
    [first] = json.loads((watched / FILE).read_text()).values()
    different = {json.dumps(one) for one in first["asked"]}
    assert 0 < len(first["asked"]) <= 16
    assert len(asked) - len(asked_alone) == len(different)
    assert not (alone / FILE).exists()


def test_a_resumed_run_compares_with_the_verdicts_of_its_first_batch(paid, judging, runner):
    with judging(changing()) as (url, _):
        folder = paid(url, "halves", save_steps=1, stop_after=1)
        first = (folder / FILE).read_bytes()
        assert agreement(runner.rows(folder)) == {}
        paid(url, "halves", save_steps=1)
    assert (folder / FILE).read_bytes() == first
    assert agreement(runner.rows(folder)) == {3: 0.0}
