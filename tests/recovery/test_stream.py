"""A run on streamed rows, killed at any moment, trains on the rows that it would have trained on."""

import os
import random
import signal
import time

import pytest
import torch

KEYS = {
    "streaming": True, "buffer_size": 5, "max_steps": 6, "save_steps": 1, "per_device_train_batch_size": 2, "num_processes": 2,
}  # fmt: skip


def saved(folder):
    return {path.name for path in (folder / "checkpoints").glob("step-*")}


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_killed_run_on_a_stream_ends_as_if_it_had_not_been(harness, runner, model_dir, data_dir, tmp_path, kills):
    keys = runner.keys_of("sft", model_dir("llama"), data_dir, **KEYS)
    runner.run_stage("sft", tmp_path / "whole", keys)
    cut, errors, died = tmp_path / "cut", tmp_path / "err", 0
    chance = random.Random(0)
    while True:
        child = harness.start(lambda: runner.run_stage("sft", cut, keys), errors)
        if died < kills:
            # Killed some time after it has written another checkpoint, so that each start goes on from another place.
            known = saved(cut)
            while saved(cut) == known and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.002)
            time.sleep(chance.uniform(0.0, 0.05))
            os.kill(child, signal.SIGKILL)
        if not harness.wait(child, errors):
            break
        died += 1
    assert died
    assert runner.rows(cut) == runner.rows(tmp_path / "whole")
    expected, found = (runner.weights(folder) for folder in (tmp_path / "whole", cut))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
