"""A checkpoint holds the same state whatever number of ranks wrote it and reads it."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path
import torch
from posttrain.checkpoint.store import CheckpointStore
from posttrain.distributed.ranks import join_ranks
from posttrain.models.load import load_policy
from posttrain.recipes.optim import make_optimizer
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.train_state import TrainState
import stage_runner

def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16] + str(tuple(tensor.shape))

torch.set_num_threads(1)
job = json.loads(sys.argv[1])
with join_ranks() as ranks:
    keys = stage_runner.keys_of("sft", Path(job["model"]), Path(job["data"]), **job["options"])
    stage = Stage("sft", Path(job["folder"]) / f"reader{ranks.world_size}", keys, ranks)
    policy = load_policy(keys, sharding=stage.sharding)
    optimizer = make_optimizer(policy, keys)
    ref = ranks.broadcast(CheckpointStore(Path(job["folder"]) / "checkpoints").at(2))
    rows = json.loads((ref.path / "state.json").read_text())["rows_per_step"]
    stage.checkpoints.load(ref, TrainState(policy, optimizer, stage.guard, ranks.world_size, rows))
    whole = policy.sharding.whole
    found = {name: digest(whole(parameter)) for name, parameter in policy.trainable()}
    for name, values in policy.sharding.optimizer_state(policy.model, optimizer).items():
        found |= {f"{name}|{key}": digest(whole(value)) for key, value in values.items()}
    if ranks.is_main:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
"""


def _job(folder, model_dir, data_dir, options):
    return {"model": str(model_dir("llama")), "data": str(data_dir), "folder": str(folder), "options": options}


def _stopped(folder, ranks, model_dir, data_dir, runner, options, kind="sft"):
    """A run that two steps were taken of."""
    job = {"kind": kind, "model": str(model_dir("llama")), "data": str(data_dir), "folder": str(folder)}
    command = [runner.__file__, json.dumps([{**job, "options": options, "stop_after": 2}])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("written_by, read_by", [(2, [1, 2]), (1, [1, 2, 4])])
def test_state_is_the_same_bit_for_bit_under_another_number_of_ranks(
    written_by, read_by, model_dir, data_dir, runner, found_by, tmp_path
):
    _stopped(tmp_path / "run", written_by, model_dir, data_dir, runner, {})
    files = {path.name for path in (tmp_path / "run/checkpoints/step-00000002").iterdir()}
    assert ("weights-00001-of-00002.safetensors" in files) == (written_by == 2)
    job = _job(tmp_path / "run", model_dir, data_dir, {})
    states = [found_by(ranks, SCRIPT, job) for ranks in read_by]
    assert len(states[0]) > 60
    for state in states[1:]:
        assert state == states[0]


@pytest.mark.slow
def test_four_ranks_go_on_from_two_and_one_from_four(model_dir, data_dir, runner, found_by, tmp_path):
    for written_by, read_by, options in ((2, (1, 4), {}), (4, (1, 2), {"adapter": "lora", "lora_r": 4})):
        folder = tmp_path / str(written_by)
        _stopped(folder, written_by, model_dir, data_dir, runner, options)
        one, other = (found_by(ranks, SCRIPT, _job(folder, model_dir, data_dir, options)) for ranks in read_by)
        assert one == other


@pytest.mark.slow
def test_a_reference_that_moves_is_written_in_shares_after_it_has_scored(model_dir, data_dir, runner, tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "save_steps": 1, "max_steps": 3}
    half = {**options, "per_device_train_batch_size": 2}
    _stopped(tmp_path / "run", 2, model_dir, data_dir, runner, half, kind="dpo")
    parts = tmp_path / "run/checkpoints/step-00000001"  # it has not moved yet, which gives back what was gathered
    for rank in (1, 2):
        sizes = [
            (parts / f"{stem}-0000{rank}-of-00002.safetensors").stat().st_size for stem in ("reference", "weights")
        ]
        assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[1]
    _stopped(tmp_path / "alone", 1, model_dir, data_dir, runner, options, kind="dpo")
    one, two = ([row["loss"] for row in runner.rows(tmp_path / name)] for name in ("alone", "run"))
    assert two == pytest.approx(one, rel=1e-6)
