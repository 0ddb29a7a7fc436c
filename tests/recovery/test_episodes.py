"""A run that is killed in the middle of episodes plays them again whole, with their seeds."""

from pathlib import Path

import pytest

ENV = Path(__file__).parents[1] / "environments" / "own_env.py"
PLAYED = {
    "env": f"{ENV}:AsyncEcho",
    "max_completion_length": 50,
    "sequence_len": 200,
    "max_steps": 3,
    "dynamic_sampling": False,
}


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_in_its_episodes_a_run_ends_the_same(kills, harness, runner, model_dir, data_dir, tmp_path):
    driver = harness.stage_driver("grpo", runner, model_dir("llama"), data_dir, **PLAYED)
    driver.run(tmp_path / "first")  # so that no child has to import
    expected, took_s = harness.uninterrupted(driver, tmp_path / "whole")
    assert any(row["env/turns"] > 1 for row in expected["metrics"])
    tally = harness.kill_at_random(driver, tmp_path / "killed", expected, kills, 0.8 * took_s)
    assert tally.kills >= kills and tally.runs and tally.differences == []
