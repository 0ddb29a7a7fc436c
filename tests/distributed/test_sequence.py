"""Ranks that share a micro-batch, each a part of its tokens, learn what one process learns."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.distributed import sequence_runner

from posttrain.config.stages import ModelKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.errors import ModelError
from posttrain.models.load import load_config
from posttrain.models.sequence import refuse_unless_split

ROWS = {
    "grouped heads": ("llama", {}),
    "a window": ("mistral", {}),
    "soft caps": ("gemma2", {}),
    "experts": ("qwen3_moe", {}),
    "an adapter, recomputed": ("qwen3", {"adapter": "lora", "lora_r": 4, "gradient_checkpointing": True}),
}


SHARED = {"sharding": {"sp_size": 2}, "learning_rate": 1e-4, "max_steps": 2}
STAGES = {
    "sft": {"packing": True, "sequence_len": 64, "per_device_train_batch_size": 1, "num_processes": 2, "save_steps": 1},
    "dpo": {"num_processes": 2},
    "grpo": {"beta": 0.1, "num_iterations": 2, "max_steps": 3},
    "reward_model": {"num_processes": 2},
    "process_reward_model": {"num_processes": 2},
    "ppo": {"beta": 0.1, "num_iterations": 2, "critic_learning_rate": 1e-4, "adam_epsilon": 1e-6},
}


def _rows(names, model_dir):
    return {name: (str(model_dir(ROWS[name][0])), ROWS[name][1]) for name in names}


CASES = {
    "fast": (2, ["grouped heads", "experts"], ["sft", "grpo"]),
    "two": (2, list(ROWS), ["sft", "dpo", "reward_model", "process_reward_model", "ppo"]),
    "four": (4, list(ROWS), list(STAGES)),
}
"""Name → ranks, the rows that they score, the stages that they take."""
ALL_CASES = ["fast", *(pytest.param(name, marks=pytest.mark.slow) for name in ("two", "four"))]


@pytest.fixture(scope="module")
def shared(model_dir, data_dir, tmp_path_factory):
    """`shared("fast")`: what the ranks of a case, started once, found, and their jobs with the folders that they wrote."""
    done = {}

    def call(case):
        if case not in done:
            ranks, names, kinds = CASES[case]
            stages = {kind: {**SHARED, **STAGES[kind]} for kind in kinds}
            if ranks == 4:  # two pairs: the rows of two processes
                stages = {k: o | ({"num_processes": 4} if "num_processes" in o else {}) for k, o in stages.items()}
            job = {"spec": {"sp_size": ranks}, "data": str(data_dir), "rows": _rows(names, model_dir)}
            folder = tmp_path_factory.mktemp(case)
            done[case] = sequence_runner.started(ranks, job, str(model_dir("llama")), folder, stages)
        return done[case]

    return call


@pytest.mark.xdist_group("sequence")
@pytest.mark.parametrize("case", ALL_CASES)
def test_scores_and_gradients_are_those_of_one_process(case, shared, model_dir, data_dir):
    with join_ranks() as alone:
        one = sequence_runner.scored(data_dir, _rows(CASES[case][1], model_dir), alone, {})
    sequence_runner.same(shared(case)[0], one)


@pytest.mark.xdist_group("sequence")
@pytest.mark.parametrize("case", ALL_CASES)
def test_stages_take_the_steps_of_one_process_which_goes_on_from_them(case, shared, runner, tmp_path):
    """A pair of ranks counts as one where rows are dealt; their checkpoint and their model are those of any ranks."""
    *jobs, stopped = shared(case)[1]

    def alone(job, folder):
        keys = runner.keys_of(job["kind"], Path(job["model"]), Path(job["data"]), **job["options"])
        runner.run_stage(job["kind"], folder, keys)
        return folder

    for job in jobs:
        sequence_runner.learned_alike(runner, Path(job["folder"]), alone(job, tmp_path / job["kind"]))
    assert not (Path(stopped["folder"]) / "result.json").exists()
    sequence_runner.learned_alike(runner, alone(stopped, Path(stopped["folder"])), Path(jobs[0]["folder"]))


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
    options = {"sharding": {"sp_size": 4}, "gradient_accumulation_steps": 2}
    keys = runner.keys_of("sft", model_dir("llama"), data_dir, **options)
    begun_by_one = runner.keys_of("sft", model_dir("llama"), data_dir, num_processes=1, **options)
    assert [begun_by_one.micro_batches_per_step(processes) for processes in (1, 4)] == [2, 2]
    assert [keys.micro_batches_per_step(processes) for processes in (1, 4, 16)] == [2, 2, 8]
