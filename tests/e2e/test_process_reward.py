"""The example of a process reward model as it is shipped: its rows in the quick tests, cut short and whole in the long ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli.app import main
from posttrain.files import read_json_lines

HERE = Path(__file__).parents[2] / "examples" / "process-reward"
KINDS = {(True, True, True), (True, True, False), (True, False, False), (False, False, False)}


@pytest.fixture
def example(shipped):
    return shipped("process-reward", "quickstart")


def called(*words):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, words)))
    assert caught.value.code == 0


def rated_rows(name):
    return [row for _, row in read_json_lines(HERE / "data" / name)]


def value(fact):
    """Of `3+1+1`."""
    return sum(map(int, re.findall(r"[+-]?\d+", fact)))


def labels_of(question, steps):
    """By counting again: whether the answer is right up to each step."""
    a, b = map(int, re.findall(r"\d+", question))
    (units, said_units), (tens, said_tens) = (step.split("=") for step in steps[:2])
    adds = "+" in units
    carries = a % 10 + b % 10 > 9 if adds else a % 10 < b % 10
    right = a + b if adds else a - b
    each = [
        value(units) == int(said_units),
        value(tens) == int(said_tens) and (len(re.findall(r"\d+", tens)) == 3) == carries,
        steps[2] == f"\\boxed{{{right}}}",
    ]
    return [all(each[: place + 1]) for place in range(3)]


def test_every_label_is_what_counting_says_and_no_sum_that_is_held_out_is_trained_on():
    trained, held_out = rated_rows("steps.jsonl"), rated_rows("held-out-steps.jsonl")
    for row in trained + held_out:
        assert row["labels"] == labels_of(row["prompt"], row["completions"]), row
    assert {tuple(row["labels"]) for row in trained} == KINDS
    asked = [row["prompt"] for row in rated_rows("sft.jsonl") + trained]
    unseen = [row["prompt"] for row in held_out] + [
        row["prompt"] for _, row in read_json_lines(HERE / "evals" / "sums.jsonl")
    ]
    assert not set(asked) & set(unseen)


@pytest.mark.slow
def test_cut_short_a_policy_answers_in_steps_and_a_model_rates_them(example, tmp_path):
    cut = ["sft.max_steps=2", "sft.num_train_epochs=null", "process_reward_model.max_steps=2", "process_reward_model.eval_steps=2"]  # fmt: skip
    for name, rows in (("data/held-out-steps.jsonl", 16), ("evals/sums.jsonl", 4)):
        lines = (example / name).read_text().splitlines(keepends=True)[:rows]
        (example / name).write_text("".join(lines))
    called("run", example / "pipeline.yaml", "--quiet", *(word for one in cut for word in ("--set", one)))
    record, said = best_of(example, tmp_path / "evals", 2, "--max-tokens", 12)
    assert record["verifier_kwargs"] == {"aggregate": "product"} and [at["n"] for at in record["curve"]] == [1, 2]
    assert "majority" in said


@pytest.mark.slow
def test_it_rates_steps_rightly_and_is_over_optimised(example, tmp_path):
    """The README's numbers, about as far away as their intervals go."""
    called("run", example / "pipeline.yaml", "--quiet")
    rows = [row for _, row in read_json_lines(stage(example, "02-process_reward_model") / "metrics.jsonl")]
    assert 0.9 <= [row["eval_accuracy"] for row in rows if "eval_accuracy" in row][-1] <= 0.96
    record, said = best_of(example, tmp_path / "evals", 16, "--max-tokens", 40)
    one, two, *_, last = (next(iter(at["graders"].values())) for at in record["curve"])
    assert two > one > last + 0.1 and record["curve"][-1]["verifier"] > record["curve"][0]["verifier"] + 0.1
    forgotten = [float(share) for share in re.findall(r"carry forgotten ([\d.]+)%", said)]
    assert forgotten[2] < forgotten[0] / 2 < forgotten[1], "of samples, of the majority's answers, of the verifier's"


def stage(example, name):
    return example / "runs" / "rated-steps" / "stages" / name


def best_of(example, out, most, *options):
    """As the README has it: what is recorded, and what `choices.py` says."""
    called(
        "eval", stage(example, "01-sft") / "model", "--suite", example / "evals" / "sums.jsonl", "--best-of", most, "--out", out,
        "--verifier", f"model:{stage(example, '02-process_reward_model') / 'model'}", "--verifier-kwargs", "aggregate=product", *options,
    )  # fmt: skip
    command = [sys.executable, str(example / "choices.py"), str(out)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads((out / "best-of-sums-gate.json").read_text()), said
