"""Groups made ahead, and the trainer killed at any moment: none is lost, trained twice, or older than the bound, and all is on record."""

import json
import os
import random
import signal
import time

import pytest

STALENESS, BATCH = 2, 2
OPTIONS = {
    "max_steps": 4, "num_prompts_per_step": BATCH, "save_steps": 1, "save_total_limit": 9, "dynamic_sampling": True,
    "reward_funcs": ["last_digit"], "rollout": {"max_staleness": STALENESS},
}  # fmt: skip


def killed(harness, runner, keys, folder, kills, chance, longest_s):
    """Run to the end in children, of which so many die at a random moment or stand still for a while first."""
    errors, died = folder.with_suffix(".err"), 0
    while True:
        child = harness.start(lambda: runner.run_stage("grpo", folder, keys), errors)
        if died < kills:
            time.sleep(chance.uniform(0.0, longest_s))
            if chance.random() < 0.3:
                os.kill(child, signal.SIGSTOP)
                time.sleep(0.2)
                os.kill(child, signal.SIGCONT)
            os.kill(child, signal.SIGKILL)
        if not harness.wait(child, errors):
            return died
        died += 1


def check(folder, runner):
    lines = [json.loads(line) for path in sorted((folder / "rollouts").glob("*.jsonl")) for line in path.open()]
    batches = [tuple(line["batched"]) for line in lines if "batched" in line]
    assert [generation for generation, _ in batches] == list(range(OPTIONS["max_steps"]))
    trained = [number for _, numbers in batches for number in numbers]
    dropped = [line["dropped"][0] for line in lines if "dropped" in line]
    issued = [line["issued"][0] for line in lines if "issued" in line]
    arrived = [line["arrived"][0] for line in lines if "arrived" in line]
    # Nothing twice, nothing lost: every prompt is in a batch, let go of, or still to be trained on.
    for numbers in (trained, dropped, issued, arrived):
        assert len(numbers) == len(set(numbers))
    assert not set(trained) & set(dropped)
    assert set(trained) | set(dropped) <= set(arrived) <= set(issued) == set(range(len(issued)))
    assert len(issued) - len(trained) - len(dropped) <= (STALENESS + 1) * BATCH
    # Every token says which weights it is of: none was older than allowed when it was trained on, and none of a step to come.
    versions = {
        line["arrived"][0]: [(r["completion"]["policy_version"], *r["completion"]["policy_versions"]) for r in line["rollouts"]]
        for line in lines if "arrived" in line
    }  # fmt: skip
    for generation, numbers in batches:
        for number in numbers:
            of = [version for rollout in versions[number] for version in rollout]
            assert generation - STALENESS <= min(of) <= max(of) <= generation, (generation, number, of)
    rows = runner.rows(folder)
    assert [row["step"] for row in rows] == list(range(1, OPTIONS["max_steps"] + 1))
    assert all(row["sampling/staleness/max"] <= STALENESS for row in rows)
    # What was trained on, as the run tells it, is what stands on record.
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["kind"] == "rollouts"]
    assert [event["generation"] for event in told] == list(range(OPTIONS["max_steps"]))
    assert all(set(event["prompts"]["trained"]) <= set(batch[1]) for event, batch in zip(told, batches, strict=True))


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_killed_run_trains_on_every_group_at_most_once(kills, harness, runner, model_dir, data_dir, tmp_path):
    keys = runner.keys_of("grpo", model_dir("llama"), data_dir, **OPTIONS)
    began = time.monotonic()
    runner.run_stage("grpo", tmp_path / "first", keys)
    longest_s, chance = time.monotonic() - began, random.Random(kills)
    check(tmp_path / "first", runner)
    died = number = 0
    # A child that goes on is done sooner than one that begins, and may be gone before its moment comes.
    while number < kills // 6 or (died < kills / 2 and number < kills):
        folder = tmp_path / f"run-{number}"
        number += 1
        died += killed(harness, runner, keys, folder, 6, chance, longest_s)
        check(folder, runner)
    assert died >= kills / 2
