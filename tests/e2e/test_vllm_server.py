"""`posttrain grpo` with a server of vLLM: it ends with the run, and neither's death is trained on twice."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.processes import all_gone, family

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm"),
    pytest.mark.xdist_group("vllm"),
]
SETTINGS = (
    "reward_check=off", "max_steps=6", "save_steps=1", "num_generations=2", "num_prompts_per_step=2", "max_completion_length=24",
    "sequence_len=64", "learning_rate=3e-3", "rollout.engine=vllm_server", "rollout.memory_gib=0.1",
)  # fmt: skip


@pytest.fixture
def started(tmp_path, data_dir, model_dir):
    """`started()`: the command on a tiny model, in a process of its own."""
    config = tmp_path / "grpo.yaml"
    config.write_text(
        f"base_model: {model_dir('qwen3')}\ndatasets: [{{ path: prompts.jsonl }}]\nreward_funcs: [rewards.py:spread]\n"
    )
    for name in ("prompts.jsonl", "rewards.py"):
        (tmp_path / name).write_text((data_dir / name).read_text())
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "-c", "from posttrain.cli.app import main; main()", "grpo", str(config), *sets]
    running = []

    def start():
        with (tmp_path / "output").open("ab") as output:
            running.append(subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output))
        return running[-1]

    start.folder, start.output = tmp_path / "runs" / "grpo" / "stages" / "01-grpo", tmp_path / "output"
    yield start
    for process in running:
        process.kill()
        process.wait()


def steps(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def await_step(folder, number, process):
    deadline = time.monotonic() + 400
    while number not in steps(folder):
        assert process.poll() is None, (folder.parents[3] / "output").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def worker_of(pid):
    """The process of vLLM that holds the weights."""
    return next(one for one in family(pid) if Path(f"/proc/{one}/cmdline").read_bytes().startswith(b"VLLM::Worker"))


def issued(folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [number for event in events if event["kind"] == "rollouts" for number in event["prompts"]["issued"]]


@pytest.mark.slow
def test_a_stage_samples_with_a_server_of_its_own_that_ends_with_it(started):
    process = started()
    await_step(started.folder, 1, process)
    running = family(process.pid)[1:]
    assert process.wait(300) == 0, started.output.read_text()[-2000:]
    assert all_gone(running)
    rows = [json.loads(line) for line in (started.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(row["sync/moved_bytes"] > 0 and row["sync/canary_gap"] < 1e-4 for row in rows)
    assert "Application startup complete" in (started.folder / "vllm_server.log").read_text()
    assert (started.folder / "model" / "config.json").exists()


@pytest.mark.slow
def test_the_deaths_of_the_server_and_of_the_run_are_survived_and_nothing_is_trained_twice(started):
    process = started()
    await_step(started.folder, 1, process)
    os.kill(worker_of(process.pid), signal.SIGKILL)
    await_step(started.folder, 3, process)
    running = family(process.pid)[1:]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all_gone(running)
    again = started()
    assert again.wait(400) == 0, started.output.read_text()[-2000:]
    assert "it is started again (1 more times at most)" in started.output.read_text()
    assert steps(started.folder) == list(range(1, 7))
    numbers = issued(started.folder)
    assert len(numbers) == len(set(numbers)) == 12
