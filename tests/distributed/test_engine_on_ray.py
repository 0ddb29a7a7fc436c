"""GRPO whose server of vLLM is a role of its own on a cluster of two nodes: kept warm while the trainer dies, brought back when it dies."""

import json
import os
import signal
import time
from importlib.util import find_spec

import pytest
from tests.distributed.test_on_ray import cluster, events  # noqa: F401 - a fixture
from tests.distributed.test_rank_group import await_steps, done, rank_pids, workers  # noqa: F401 - a fixture
from tests.processes import command_of, writers_of

pytestmark = [
    pytest.mark.skipif(
        not (find_spec("ray") and find_spec("vllm")), reason="Ray or vLLM is not installed: make setup-ray setup-vllm"
    ),
    pytest.mark.xdist_group("ray"),
    pytest.mark.slow,
]
GRPO = {
    "max_steps": 6, "num_generations": 2, "num_prompts_per_step": 2, "max_completion_length": 24, "sequence_len": 64,
    "learning_rate": 3e-3, "rollout": {"engine": "vllm_server", "memory_gib": 0.1, "timeout_s": 90, "start_timeout_s": 1400},
}  # fmt: skip
LONGEST_S = 1500
"""A run that hangs: a busy machine starts vLLM in minutes."""


SLOW_REWARD = """
import pathlib, time

def spread(prompts, completions, answer, **columns):
    with pathlib.Path("{place}").open("a") as scored:
        scored.write(".")
    time.sleep(2)
    return [sum(map(ord, c[0]["content"])) % 17 / 17.0 for c in completions]
"""


def vllm_worker(stage):
    """The process of vLLM that holds the weights of this stage."""
    [worker] = [pid for pid in writers_of(stage / "vllm_server.log") if command_of(pid).startswith(b"VLLM::Worker")]
    return worker


def issued(stage):
    found = [json.loads(line) for line in (stage / "events.jsonl").read_text().splitlines()]
    return [number for event in found if event["kind"] == "rollouts" for number in event["prompts"]["issued"]]


def of_engine(run):
    return [event["to"] for event in events(run) if event.get("role") == "engine-0"]


def test_a_trainer_that_is_killed_finds_its_engine_warm_on_another_node(cluster, workers, write_yaml, runner, tmp_path):  # noqa: F811
    how = ("--workers", 1, "--worker", "placement=strict_spread")
    scored = tmp_path / "scored"
    (tmp_path / "slow.py").write_text(SLOW_REWARD.format(place=scored))
    keys = GRPO | {"reward_funcs": [f"{tmp_path / 'slow.py'}:spread"]}
    process = workers(cluster.address, "grpo", write_yaml("grpo", architecture="qwen3", **keys), *how)
    run, stage = tmp_path / "run", tmp_path / "run/stages/01-grpo"
    await_steps(run, 2, process, LONGEST_S)
    begun = scored.stat().st_size
    while scored.stat().st_size == begun:  # no update is on its way while completions are scored
        assert process.poll() is None
        time.sleep(0.01)
    engine = vllm_worker(stage)
    assert list(stage.glob("posttrain-engine-*")), "weights travel in the folder that both nodes see"
    os.kill(rank_pids(run)[0], signal.SIGKILL)
    await_steps(run, 5, process, LONGEST_S)
    assert vllm_worker(stage) == engine, "kept warm"
    _, err = done(process, timeout=LONGEST_S)
    assert "was killed by SIGKILL; the ranks start again" in err
    rows = runner.rows(stage)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(row["sync/canary_gap"] < 1e-4 for row in rows)
    assert len(issued(stage)) == len(set(issued(stage))) == 12
    assert of_engine(run)[:3] == ["restarting", "stale", "healthy"]


def test_an_engine_that_is_killed_is_started_again_and_synced(cluster, workers, write_yaml, runner, tmp_path):  # noqa: F811
    process = workers(cluster.address, "grpo", write_yaml("grpo", architecture="qwen3", **GRPO))
    run, stage = tmp_path / "run", tmp_path / "run/stages/01-grpo"
    await_steps(run, 2, process, LONGEST_S)
    os.kill(vllm_worker(stage), signal.SIGKILL)
    _, err = done(process, timeout=LONGEST_S)
    assert "it is started again (1 more times at most)" in err
    assert [row["step"] for row in runner.rows(stage)] == list(range(1, 7))
    assert len(issued(stage)) == len(set(issued(stage))) == 12
    assert of_engine(run)[:7] == ["restarting", "stale", "healthy", "dead", "restarting", "stale", "healthy"]
