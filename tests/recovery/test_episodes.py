"""A run that is killed in the middle of episodes plays them again whole, with their seeds, and leaves no process behind."""

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("own", 1),
        pytest.param("own", 12, marks=SLOW),
        *(pytest.param(kind, 3, marks=SLOW) for kind in ("verifiers", "openenv", "mcp")),
    ],
)
def test_killed_in_its_episodes_a_run_ends_the_same(kind, kills, harness, runner, playing, tmp_path, monkeypatch):
    stage = playing(kind, "llama" if kind == "own" else "qwen3")
    options = {"max_steps": 3, "dynamic_sampling": False, "max_completion_length": 50, "save_steps": 1}
    monkeypatch.setenv("EPISODES_TEST", str(tmp_path))
    driver = harness.stage_driver("grpo", runner, stage.model, stage.data, **(stage.options | options))
    driver.run(tmp_path / "first")  # so that no child has to import
    expected, took_s = harness.uninterrupted(driver, tmp_path / "whole")
    played = [row for row in expected["metrics"] if stage.row_key in row]
    assert any(row[stage.row_key] > (kind != "mcp") for row in played)
    assert all(row["env/failed_ratio"] == 0 for row in played)
    tally = harness.kill_at_random(driver, tmp_path / "killed", expected, kills, 0.8 * took_s)
    assert tally.kills >= kills and tally.runs and tally.differences == []
    deadline = time.monotonic() + 20
    while (left := _started_with(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def _started_with(mark):
    """Processes that have it in the environment which they were started with."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if mark.encode() in Path(f"/proc/{entry}/environ").read_bytes():
                found.append(Path(f"/proc/{entry}/cmdline").read_text())
    return found
