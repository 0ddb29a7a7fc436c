"""Groups made ahead on servers of vLLM, for real: several of them, one killed or standing still, weights that come in the middle."""

import json
import os
import signal
import threading
import time
from importlib.util import find_spec

import pytest
from tests.processes import family

from posttrain.rollout.replicas import Replicas

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm"),
    pytest.mark.xdist_group("vllm"),
    pytest.mark.slow,
]
SHORT = {"max_steps": 6, "num_prompts_per_step": 2, "max_completion_length": 40, "save_steps": 1, "save_total_limit": 9}


def rollouts(folder):
    lines = [json.loads(line) for path in sorted((folder / "rollouts").glob("*.jsonl")) for line in path.open()]
    batches = [line["batched"] for line in lines if "batched" in line]
    arrived = {line["arrived"][0]: line["rollouts"] for line in lines if "arrived" in line}
    return batches, arrived


def check(folder, staleness):
    batches, arrived = rollouts(folder)
    numbers = [number for _, batch in batches for number in batch]
    assert len(numbers) == len(set(numbers)) == SHORT["max_steps"] * SHORT["num_prompts_per_step"]
    spread = 0
    for generation, batch in batches:
        for completion in (rollout["completion"] for number in batch for rollout in arrived[number]):
            versions = completion["policy_versions"] or [completion["policy_version"]]
            assert versions == sorted(versions)
            assert 0 <= generation - versions[0] <= staleness
            spread += len(set(versions)) > 1
    return spread


@pytest.mark.parametrize("pause", ["wait", "keep"])
def test_a_server_is_sampled_from_ahead(train, runner, pause):
    rollout = {"engine": "vllm_server", "memory_gib": 0.1, "max_staleness": 1, "pause": pause}
    folder = train("grpo", rollout=rollout, **SHORT)
    spread = check(folder, 1)
    assert max(row["sampling/staleness/max"] for row in runner.rows(folder)) == 1.0
    if pause == "wait":
        assert spread == 0


def test_vllm_in_this_process_is_sampled_from_ahead(train):
    folder = train("grpo", rollout={"engine": "vllm", "memory_gib": 0.1, "max_staleness": 1}, **SHORT)
    assert check(folder, 1) == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_of_two_servers_is_lost_and_the_run_goes_on(train, monkeypatch, caplog, how):
    """Whichever of them is hit: its groups are asked of the other, and it comes back with the weights."""
    started, reached = [], []

    def seen(replicas, *starts, make=Replicas.__init__, **how):
        make(replicas, *starts, **how)
        started.append(replicas)
        threading.Thread(target=strike, args=(replicas,), daemon=True).start()

    def strike(replicas):
        while not replicas._replicas[0].under_way:
            time.sleep(0.01)
        supervisor = replicas._replicas[0].engine._server.pid
        for child in family(supervisor)[1:]:
            os.kill(child, how)
        while "stale" not in replicas.states and not replicas._is_closing:
            time.sleep(0.005)
        reached.append(True)

    monkeypatch.setattr(Replicas, "__init__", seen)
    rollout = {"engine": "vllm_server", "memory_gib": 0.1, "max_staleness": 1, "replicas": 2, "timeout_s": 5.0}
    folder = train("grpo", rollout=rollout, **SHORT)
    check(folder, 1)
    assert started[0].restarts == 1
    assert "it is started again" in caplog.text
