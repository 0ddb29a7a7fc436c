"""A real child process, killed at random instants and started again until it is done."""

import json
import os
import random
import signal
import time

import pytest
import torch

OPTIONS = {
    "sft": {"max_steps": 6, "save_steps": 1, "adapter": "lora", "lora_r": 4, "lora_dropout": 0.1},
    "dpo": {"max_steps": 6, "save_steps": 2},
    "grpo": {"max_steps": 6, "save_steps": 1, "num_iterations": 2, "beta": 0.1},
}
CASES = [pytest.param(kind, 3, id=kind) for kind in OPTIONS] + [
    pytest.param(kind, 40, id=f"{kind}-many", marks=pytest.mark.slow) for kind in OPTIONS
]


def start(run) -> int:
    """`run` in a forked child; its process id. The child leaves without running anything of pytest's."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run()
        status = 0
    finally:
        os._exit(status)


def finish(run) -> float:
    began = time.monotonic()
    _, status = os.waitpid(start(run), 0)
    assert status == 0
    return time.monotonic() - began


def kill_at_random(run, number: int, longest_s: float, chance: random.Random) -> int:
    """Start `number` children, kill each after a random time; how many of them were killed at work."""
    killed = 0
    for _ in range(number):
        child = start(run)
        time.sleep(chance.uniform(0.0, longest_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    return killed


@pytest.mark.parametrize(("kind", "kills"), CASES)
def test_killed_anywhere_it_ends_with_the_same_weights_and_metrics(kind, kills, runner, model_dir, data_dir, tmp_path):
    keys = runner.keys_of(kind, model_dir("llama"), data_dir, **OPTIONS[kind])
    whole_s = finish(lambda: runner.run_stage(kind, tmp_path / "straight", keys))
    run = lambda: runner.run_stage(kind, tmp_path / "killed", keys)  # noqa: E731
    killed = kill_at_random(run, kills, whole_s, random.Random(f"{kind}{kills}"))
    assert killed >= min(kills, 2)
    finish(run)
    assert runner.rows(tmp_path / "killed") == runner.rows(tmp_path / "straight")
    expected, found = (runner.weights(tmp_path / part) for part in ("straight", "killed"))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    digests = [
        json.loads((tmp_path / part / "result.json").read_text())["model_digest"] for part in ("straight", "killed")
    ]
    assert digests[0] == digests[1]
    leftovers = [path.name for path in (tmp_path / "killed/checkpoints").iterdir() if path.name.startswith(".")]
    assert len(leftovers) <= 1, leftovers
