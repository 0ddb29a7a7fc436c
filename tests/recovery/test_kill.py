"""A real child process, killed at random instants and started again until it is done."""

import json
import os
import random
import shutil
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


def kill_once(run, longest_s: float, chance: random.Random) -> bool:
    """Start a child and kill it after a random time; whether it was still at work."""
    child = start(run)
    time.sleep(chance.uniform(0.0, longest_s))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def check_same(runner, found, expected):
    assert runner.rows(found) == runner.rows(expected)
    mine, theirs = runner.weights(found), runner.weights(expected)
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
    digests = [json.loads((part / "result.json").read_text())["model_digest"] for part in (found, expected)]
    assert digests[0] == digests[1]
    leftovers = [path.name for path in (found / "checkpoints").iterdir() if path.name.startswith(".")]
    assert len(leftovers) <= 1, leftovers


@pytest.mark.parametrize(("kind", "kills"), CASES)
def test_killed_anywhere_it_ends_with_the_same_weights_and_metrics(kind, kills, runner, model_dir, data_dir, tmp_path):
    keys = runner.keys_of(kind, model_dir("llama"), data_dir, **OPTIONS[kind])
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    longest_s = finish(lambda: runner.run_stage(kind, straight, keys))

    def run():
        runner.run_stage(kind, folder, keys)

    chance, killed = random.Random(f"{kind}{kills}"), 0
    while killed < kills:
        if kill_once(run, longest_s, chance):
            killed += 1
        else:
            # It got to the end before it was hit: judge it, and begin anew.
            check_same(runner, folder, straight)
            shutil.rmtree(folder)
    finish(run)
    check_same(runner, folder, straight)
