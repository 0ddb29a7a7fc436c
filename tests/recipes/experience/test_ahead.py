"""Groups made ahead: what is trained on is on record first, ages are bounded, and a run that goes on is the run that stopped."""

import json
import shutil
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from posttrain.errors import RewardError
from posttrain.recipes import grpo
from posttrain.recipes.experience import ahead
from posttrain.recipes.experience.ahead import staleness_metrics
from posttrain.recipes.run.rollback import read_rollbacks

AHEAD = {"max_steps": 6, "num_prompts_per_step": 2, "save_steps": 1, "save_total_limit": 9}


def events(folder, kind):
    """Those on record, in order."""
    lines = [json.loads(line) for path in sorted((folder / "rollouts").glob("*.jsonl")) for line in path.open()]
    return [line for line in lines if kind in line]


def batches(folder):
    return [line["batched"][1] for line in events(folder, "batched")]


def versions(folder):
    """Oldest and newest weights that a token of each group is of."""
    found = {
        line["arrived"][0]: [v for r in line["rollouts"] for v in (r["completion"]["policy_version"], *r["completion"]["policy_versions"])]
        for line in events(folder, "arrived")
    }  # fmt: skip
    return {number: (min(of), max(of)) for number, of in found.items()}


def trained(folder):
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event["prompts"] for event in told if event["kind"] == "rollouts"]


def same_weights(runner, one, other):
    ours, theirs = runner.weights(one), runner.weights(other)
    return all((tensor == theirs[name]).all() for name, tensor in ours.items())


def of_training(rows):
    """What does not tell of the clock."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("sampling/queue", "sampling/under_way", "sync/"))}
        for row in rows
    ]


@pytest.mark.parametrize("staleness", [1, 2])
def test_no_token_is_older_than_the_bound_and_every_prompt_is_trained_once(train, runner, staleness):
    folder = train("grpo", rollout={"max_staleness": staleness}, **AHEAD)
    rows = runner.rows(folder)
    assert all(row["sampling/staleness/max"] <= staleness for row in rows)
    assert max(row["sampling/staleness/max"] for row in rows) > 0
    assert all("sampling/importance_sampling_ratio/mean" in row for row in rows)
    numbers = [number for batch in batches(folder) for number in batch]
    assert len(numbers) == len(set(numbers)) == 12
    issued = [number for step in trained(folder) for number in step["issued"]]
    assert issued == list(range(len(issued)))


def test_a_group_let_go_of_while_the_trainer_trains_is_replaced_within_the_bound(train, runner, tmp_path, monkeypatch):
    """The next batch's weights are not there yet: what is asked meanwhile is of the weights of the batch before."""
    original, folder = grpo.loss, tmp_path / "slow"

    def when_all_has_arrived(*args, **options):
        deadline = time.monotonic() + 20
        while len(events(folder, "issued")) > len(events(folder, "arrived")) and time.monotonic() < deadline:
            time.sleep(0.01)
        return original(*args, **options)

    monkeypatch.setattr(grpo, "loss", when_all_has_arrived)
    train(
        "grpo", name="slow", rollout={"max_staleness": 2}, dynamic_sampling=True, reward_funcs=["last_digit"],
        **{**AHEAD, "max_steps": 4},
    )  # fmt: skip
    asked, sampled = dict(line["issued"] for line in events(folder, "issued")), versions(folder)
    assert len(events(folder, "dropped")) > 0
    assert {n: (asked[n], oldest) for n, (oldest, _) in sampled.items() if oldest < asked[n]} == {}
    for generation, numbers in enumerate(batches(folder)):
        assert all(generation - 2 <= sampled[n][0] and sampled[n][1] <= generation for n in numbers)
    assert all(row["sampling/staleness/max"] <= 2 for row in runner.rows(folder))


def test_a_run_that_goes_on_from_an_older_checkpoint_replays_the_record(train, runner, tmp_path):
    options = {"rollout": {"max_staleness": 2}, **AHEAD}
    whole = train("grpo", name="whole", **options)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    # As a machine that died leaves it: the record is there, the checkpoints after step 2 are not.
    for step in range(3, 7):
        shutil.rmtree(again / f"checkpoints/step-{step:08d}")
    shutil.rmtree(again / "model")
    train("grpo", name="again", **options)
    assert batches(again) == batches(whole)
    assert of_training(runner.rows(again)) == of_training(runner.rows(whole))
    assert same_weights(runner, whole, again)


def test_groups_that_arrived_survive_a_stop_and_the_others_are_asked_again(train, runner, tmp_path):
    options = {"rollout": {"max_staleness": 2}, **AHEAD}
    train("grpo", name="run", stop_after=2, **options)
    folder = tmp_path / "run"
    last = sorted((folder / "rollouts").glob("*.jsonl"))[-1].read_text().splitlines()
    base = json.loads(last[0])["base"]
    arrived = base["arrived"] + [line["arrived"][0] for line in map(json.loads, last[1:]) if "arrived" in line]
    assert base["version"] == 2
    train("grpo", name="run", **options)
    numbers = [number for batch in batches(folder) for number in batch]
    assert len(numbers) == len(set(numbers)) == 12
    assert set(arrived) <= set(numbers) | set(base["arrived"])
    assert not [n for n in arrived if n < min(numbers[4:])]


def test_several_steps_a_batch_and_dynamic_sampling_go_ahead_too(train, runner):
    folder = train(
        "grpo", rollout={"max_staleness": 1}, max_steps=8, num_prompts_per_step=2, steps_per_generation=2, num_iterations=2,
        dynamic_sampling=True, reward_funcs=["last_digit"], save_steps=1,
    )  # fmt: skip
    prompts = trained(folder)
    numbers = [number for batch in batches(folder) for number in batch]
    assert len(numbers) == len(set(numbers))
    asked = [number for step in prompts for number in (*step["issued"], *step["passed_over"])]
    assert asked == list(range(len(asked)))


def test_validation_and_an_adapter_go_ahead_too(train, runner, data_dir):
    folder = train(
        "grpo", rollout={"max_staleness": 1}, adapter="lora", lora_r=4, eval_steps=2, max_steps=4,
        eval_datasets=[{"path": str(data_dir / "dev-prompts.jsonl")}],
    )  # fmt: skip
    assert [row["step"] for row in runner.rows(folder) if "eval_reward" in row] == [2, 4]


def test_a_rollback_forgets_what_the_abandoned_steps_sampled(train, runner, monkeypatch):
    original, calls = grpo.loss, []

    def poisoned(*args, **options):
        terms = original(*args, **options)
        calls.append(1)
        # A step has two micro-batches: it is the third step's first.
        return type(terms)(terms.loss * torch.nan, terms.metrics) if len(calls) == 5 else terms

    monkeypatch.setattr(grpo, "loss", poisoned)
    folder = train("grpo", rollout={"max_staleness": 1}, **AHEAD)
    [first] = read_rollbacks(folder)
    assert (first.from_step, first.to_step) == (3, 2)
    assert [row["step"] for row in runner.rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert {path.name.partition("-")[0] for path in (folder / "rollouts").iterdir()} == {"001"}
    before, after = trained(folder)[:2], trained(folder)[2:]
    asked = {number for step in before for number in step["issued"]}
    assert asked and not asked & {number for step in after for number in step["trained"]}


def test_a_reward_that_fails_ends_the_run_with_its_reason(runner, model_dir, data_dir, tmp_path):
    (tmp_path / "broken.py").write_text("def broken(prompts, completions, **columns):\n    raise ValueError('boom')\n")
    keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, rollout={"max_staleness": 1}, max_steps=2)
    keys = keys.model_copy(update={"reward_funcs": [f"{tmp_path / 'broken.py'}:broken"]})
    with pytest.raises(RewardError, match=r"8 of 8 completions are unscored.*boom"):
        runner.run_stage("grpo", tmp_path / "run", keys)


def test_a_thread_that_fails_between_two_groups_gives_the_engine_back_and_ends_the_run(train, monkeypatch):
    def full(group):
        raise OSError("no space left")

    monkeypatch.setattr(ahead, "has_spread", full)
    met = []

    def run():
        try:
            train("grpo", rollout={"max_staleness": 1}, dynamic_sampling=True, **AHEAD)
        except OSError as error:
            met.append(str(error))

    runs = threading.Thread(target=run, daemon=True)
    runs.start()
    runs.join(30)
    assert met == ["no space left"]


def test_ages_are_counted_by_token():
    found = staleness_metrics([0.0, 0.0, 1.0, 1.5], bound=2)
    assert found == {
        "sampling/staleness/mean": 0.625, "sampling/staleness/max": 1.5,
        "sampling/staleness/0": 0.5, "sampling/staleness/1": 0.25, "sampling/staleness/2": 0.25,
    }  # fmt: skip


def test_tokens_of_older_weights_than_a_group_was_asked_of_end_the_run(train, monkeypatch):
    original = ahead.groups_as_they_end

    def of_the_start(*asked):
        with closing(original(*asked)) as found:
            for place, completions in found:
                yield place, [replace(one, policy_version=0, policy_versions=()) for one in completions]

    monkeypatch.setattr(ahead, "groups_as_they_end", of_the_start)
    with pytest.raises(AssertionError, match="sampled by older weights than it was asked of"):
        train("grpo", rollout={"max_staleness": 1}, **AHEAD)
