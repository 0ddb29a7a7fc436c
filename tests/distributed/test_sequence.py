"""Ranks that share a micro-batch, each a part of its tokens, learn what one process learns."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.models.load import load_config
from posttrain.models.sequence import refuse_unless_split

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.sharding import ShardingSpec, sharding_over
from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.types import TokenSeq
import stage_runner

torch.set_num_threads(1)
job, found = json.loads(sys.argv[1]), {}

def sequence(*ids):
    return TokenSeq(ids, tuple(place > 2 for place in range(len(ids))))

shared = tuple(range(5, 60))
BATCHES = {
    "documents": [[sequence(*range(3 + i, 20 + 3 * i))] for i in range(4)],
    "trees": [[sequence(*shared, *range(7, 50), 3 + i, *range(9 + i, 40)) for i in range(2)], [sequence(*shared[:9], 8 * i, 5) for i in range(3)]],
    "fewer tokens than ranks": [[sequence(4, 5, 6, 7)]],
}
with join_ranks() as ranks:
    for name, (model, options) in job["rows"].items():
        keys = stage_runner.keys_of("sft", Path(model), Path(job["data"]), **options)
        size = ranks.world_size if ranks.world_size > 1 else 1
        policy = load_policy(keys, sharding=sharding_over(ranks, ShardingSpec(sp_size=size)))
        held = []
        layer = policy.base.get_decoder().layers[0]
        layer.register_forward_pre_hook(lambda module, given: held.append(given[0].shape[1]))
        for batch_name, families in BATCHES.items():
            held.clear()
            batch = pack(families)
            policy.model.train()
            scores = policy.score(batch, entropy=True, top1=True)
            weights = torch.linspace(-1.0, 2.0, len(scores.logp_M))
            loss = (weights * scores.logp_M).sum() + scores.entropy_M.mean()
            if scores.aux_loss is not None:
                loss = loss + scores.aux_loss
            loss.backward()
            gradients = {n: policy.sharding.whole(p.grad).double() for n, p in policy.trainable() if p.grad is not None}
            policy.model.zero_grad(set_to_none=True)
            tokens = len(batch.input_ids_N)
            tokens = max(tokens, ranks.world_size)
            assert sum(ranks.gather(held[0])) == tokens and (ranks.world_size == 1 or held[0] <= -(-tokens // ranks.world_size))
            found[name + ", " + batch_name] = {
                "loss": float(loss.detach()), "logp": scores.logp_M.tolist(), "top1": scores.top1_M.tolist(),
                "gradients": {n: [float(g.norm()), float((g * torch.linspace(-1, 1, g.numel()).view_as(g)).sum())] for n, g in gradients.items()},
            }
    if ranks.is_main:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
"""
ROWS = {
    "grouped heads": ("llama", {}),
    "a window": ("mistral", {}),
    "soft caps": ("gemma2", {}),
    "experts": ("qwen3_moe", {}),
    "an adapter, recomputed": ("qwen3", {"adapter": "lora", "lora_r": 4, "gradient_checkpointing": True}),
}


def _same(found, one):
    assert found.keys() == one.keys()
    for name, expected in one.items():
        assert found[name]["loss"] == pytest.approx(expected["loss"], rel=1e-6), name
        assert found[name]["logp"] == pytest.approx(expected["logp"], rel=1e-6, abs=2e-6), name
        assert found[name]["top1"] == expected["top1"], name
        assert found[name]["gradients"].keys() == expected["gradients"].keys()
        largest = max(norm for norm, _ in expected["gradients"].values())
        for parameter, values in expected["gradients"].items():
            assert found[name]["gradients"][parameter] == pytest.approx(values, rel=1e-5, abs=1e-6 * largest), (
                name,
                parameter,
            )


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, ["grouped heads", "experts"]),
        pytest.param(2, list(ROWS), marks=pytest.mark.slow),
        pytest.param(4, list(ROWS), marks=pytest.mark.slow),
    ],
)
def test_scores_and_gradients_are_those_of_one_process(ranks, names, model_dir, data_dir, found_by):
    job = {"data": str(data_dir), "rows": {name: (str(model_dir(ROWS[name][0])), ROWS[name][1]) for name in names}}
    _same(found_by(ranks, SCRIPT, job), found_by(1, SCRIPT, job))


SHARED = {"sharding": {"sp_size": 2}, "learning_rate": 1e-4, "max_steps": 2}
STAGES = {
    "sft": {"packing": True, "sequence_len": 64, "per_device_train_batch_size": 1, "num_processes": 2, "save_steps": 1},
    "dpo": {"num_processes": 2},
    "grpo": {"beta": 0.1, "num_iterations": 2, "max_steps": 3},
    "reward_model": {"num_processes": 2},
}


def _started(runner, ranks, jobs):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launcher, runner.__file__, json.dumps(jobs)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]


def _learned_alike(runner, found, one):
    assert [row.keys() for row in runner.rows(found)] == [row.keys() for row in runner.rows(one)]
    for mine, expected in zip(runner.rows(found), runner.rows(one), strict=True):
        for name, value in expected.items():
            assert mine[name] == pytest.approx(value, rel=5e-6 if name == "loss" else 1e-4, abs=2e-6), name
    assert runner.losses(found) == pytest.approx(runner.losses(one), rel=1e-6, abs=1e-6)
    for name, tensor in runner.weights(one).items():
        assert (runner.weights(found)[name] - tensor).abs().max() < 2e-5, name


def _jobs(kinds, model, data_dir, folder):
    common = {"model": str(model), "data": str(data_dir)}
    return [{**common, "kind": k, "folder": str(folder / k), "options": {**SHARED, **STAGES[k]}} for k in kinds]


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        (2, ["sft", "grpo"]),
        pytest.param(2, ["sft", "dpo", "reward_model"], marks=pytest.mark.slow),
        pytest.param(4, list(STAGES), marks=pytest.mark.slow),
    ],
)
def test_stages_take_the_steps_of_one_process_which_goes_on_from_them(
    ranks, kinds, runner, model_dir, data_dir, tmp_path
):
    """A pair of ranks counts as one where rows are dealt; their checkpoint and their model are those of any ranks."""
    jobs = _jobs(kinds, model_dir("llama"), data_dir, tmp_path)
    if ranks == 4:  # two pairs: the rows of two processes
        for job in jobs:
            job["options"] |= {"num_processes": 4} if "num_processes" in job["options"] else {}
    stopped = {**jobs[0], "folder": str(tmp_path / "stopped"), "stop_after": 1}
    _started(runner, ranks, [*jobs, stopped])
    for job in jobs:
        keys = runner.keys_of(job["kind"], model_dir("llama"), data_dir, **job["options"])
        folder = tmp_path / f"{job['kind']} alone"
        runner.run_stage(job["kind"], folder, keys)
        _learned_alike(runner, tmp_path / job["kind"], folder)
    runner.run_stage(
        "sft", tmp_path / "stopped", runner.keys_of("sft", model_dir("llama"), data_dir, **jobs[0]["options"])
    )
    _learned_alike(runner, tmp_path / "stopped", tmp_path / "sft")


@pytest.mark.parametrize(
    ("architecture", "changes", "size", "says"),
    [
        ("llama", {}, 3, "it has 4 attention heads and 2 of keys and values; expected one of 2, 4"),
        ("gpt_oss", {}, 2, "its attention does not fit the packed layout"),
        ("mamba", {}, 2, "its attention does not fit the packed layout"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            2,
            "its rotary embeddings depend on",
        ),
    ],
)
def test_a_model_whose_tokens_cannot_be_dealt_is_refused_before_it_is_loaded(
    architecture, changes, size, says, model_dir
):
    config = load_config(ModelKeys(base_model=str(model_dir(architecture, **changes))))
    with pytest.raises(ModelError, match=f"sharding.sp_size: {size} with m: {says}"):
        refuse_unless_split("m", config, size)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "qwen3_moe"])
def test_a_model_whose_tokens_can_be_dealt_is_not_refused(architecture, model_dir):
    refuse_unless_split("m", load_config(ModelKeys(base_model=str(model_dir(architecture)))), 2)


def test_keys_that_do_not_go_together_are_refused(runner, model_dir, data_dir):
    with pytest.raises(ValidationError, match=r"num_processes: 3 with sharding.sp_size: 2; expected a multiple of it"):
        runner.keys_of("sft", model_dir("llama"), data_dir, num_processes=3, sharding={"sp_size": 2})
    with pytest.raises(ValidationError, match=r"sharding.sp_size: 2 with teachers, which score whole sequences"):
        runner.keys_of("distill", model_dir("llama"), data_dir, sharding={"sp_size": 2})


def test_a_group_counts_as_one_where_rows_are_dealt(runner, model_dir, data_dir):
    keys = runner.keys_of("sft", model_dir("llama"), data_dir, sharding={"sp_size": 4}, gradient_accumulation_steps=2)
    assert [keys.micro_batches_per_step(processes) for processes in (1, 4, 16)] == [2, 2, 8]
