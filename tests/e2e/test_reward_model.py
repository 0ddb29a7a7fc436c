"""The example of a reward model as it is shipped: cut short in the quick tests, whole in the long ones."""

import pytest

from posttrain.cli.app import main
from posttrain.files import read_json_lines
from posttrain.report.records import read_run


@pytest.fixture
def example(shipped):
    return shipped("reward-model", "reward-hacking")


def run(example, *options):
    with pytest.raises(SystemExit) as caught:
        main(["run", str(example / "pipeline.yaml"), "--quiet", *options])
    return caught.value.code, example / "runs" / "paid-by-a-model"


def column(folder, stage, name):
    rows = [row for _, row in read_json_lines(folder / "stages" / stage / "metrics.jsonl")]
    return [row[name] for row in rows if name in row]


def test_the_short_example_trains_a_reward_model_and_is_paid_by_it(example):
    cut = [
        "reward_model.max_steps=20",
        "reward_model.eval_steps=20",
        "grpo.max_steps=2",
        "grpo.eval_steps=1",
        "gate=null",
    ]
    code, folder = run(example, *(word for one in cut for word in ("--set", one)))
    assert code == 0
    assert column(folder, "01-reward_model", "eval_rewards/accuracies")[-1] > 0.55
    assert len(set(column(folder, "02-grpo", "reward"))) == 2


@pytest.mark.slow
def test_the_reward_model_ranks_rightly_and_the_score_rises_before_it_is_fooled(example):
    """The README's numbers, less than their intervals away."""
    code, folder = run(example)
    assert code == 0 and read_run(folder).final_gate.verdict["verdict"] == "PASS"
    assert 0.83 <= column(folder, "01-reward_model", "eval_rewards/accuracies")[-1] <= 0.91
    scores = column(folder, "02-grpo", "eval_score")
    assert max(scores) >= 0.96 and scores[-1] < 0.7
