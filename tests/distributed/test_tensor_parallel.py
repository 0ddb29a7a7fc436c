"""Ranks that hold layers between them, by the model's own plan, learn what one process learns, and write what it writes."""

import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.distributed import sequence_runner

from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.sharding import ShardingSpec
from posttrain.files import file_digests

ROWS = {
    "norms of heads, a tied head": ("qwen3", {}),
    "experts": ("qwen3_moe", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "soft caps": ("gemma2", {}),
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 1, "init_lora_weights": False}
"""Of B that is zero, A would have no gradient; what is drawn in its place is scaled down, for rounding grows with the logits."""
ADAPTERS = {
    "an adapter": ("qwen3", LORA),
    "an adapter beside experts": ("qwen3_moe", {**LORA, "lora_target": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "an adapter on biases and the head": (
        "llama",
        {**LORA, "lora_target": ["q_proj", "o_proj", "down_proj", "lm_head"]},
    ),
}
STAGES = {
    "sft": {"per_device_train_batch_size": 2, "num_processes": 2, "save_steps": 1, "gradient_checkpointing": True},
    "dpo": {"per_device_train_batch_size": 2, "num_processes": 2},
    "grpo": {"beta": 0.1, "num_iterations": 2, "max_steps": 3},
    "ppo": {"beta": 0.1, "num_iterations": 2, "critic_learning_rate": 1e-4, "adam_epsilon": 1e-6},
    "reward_model": {"per_device_train_batch_size": 2, "num_processes": 2},
    "process_reward_model": {"per_device_train_batch_size": 2, "num_processes": 2},
}
REWARDED = {
    "a reward model": ("llama", {"kind": "reward_model"}),
    "a reward model with experts": ("qwen3_moe", {"kind": "reward_model"}),
    "a process reward model": ("qwen3", {"kind": "process_reward_model"}),
}
SHARED = {"sharding": {"tensor_parallel_size": 2}, "learning_rate": 1e-4, "max_steps": 2}
CASES = {
    "fast": (2, ["norms of heads, a tied head", "experts"], ["sft"]),
    "two": (2, [*ROWS, *REWARDED], list(STAGES)),
    "four": (4, [*ROWS, *REWARDED], list(STAGES)),
    "adapters": (2, list(ADAPTERS), ["sft", "dpo", "grpo", "ppo"]),
    "adapters on four": (4, list(ADAPTERS), ["sft", "dpo", "grpo", "ppo"]),
}
"""Name → ranks, two of which hold a layer between them; the rows that they score and export, the stages that they take."""
ALL_CASES = ["fast", *(pytest.param(name, marks=pytest.mark.slow) for name in ("two", "four"))]
ADAPTED = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name.startswith("adapters")]


@pytest.fixture(scope="module")
def shared(model_dir, data_dir, tmp_path_factory):
    """`shared("fast")`: what the ranks of a case, started once, found, and their jobs with the folders that they wrote."""
    done = {}

    def call(case):
        if case not in done:
            ranks, names, kinds = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            stages = {kind: {**SHARED, **STAGES[kind]} for kind in kinds}
            if ranks == 4:  # the rows of two processes
                stages = {k: o | ({"num_processes": 4} if "num_processes" in o else {}) for k, o in stages.items()}
            if case.startswith("adapters"):
                stages = {kind: LORA | options for kind, options in stages.items()}
            rows = _rows(names, model_dir)
            job = {
                "spec": {"tensor_parallel_size": 2}, "data": str(data_dir), "rows": rows,
                "exports": {
                    name: (model, str(folder / name / "model"), own)
                    for name, (model, own) in rows.items()
                    if name not in REWARDED  # read whole, as a new head is made
                },
            }  # fmt: skip
            found, jobs = sequence_runner.started(ranks, job, str(model_dir("qwen3")), folder, stages)
            done[case] = found, jobs, folder
        return done[case]

    return call


def _rows(names, model_dir):
    """Name → model, and the stage's keys."""
    plain = {name: (str(model_dir(ROWS[name][0], **ROWS[name][1])), {}) for name in names if name in ROWS}
    other = ADAPTERS | REWARDED
    return plain | {name: (str(model_dir(other[name][0])), other[name][1]) for name in names if name in other}


@pytest.mark.xdist_group("tensor parallel")
@pytest.mark.parametrize("case", [*ALL_CASES, *ADAPTED])
def test_scores_and_gradients_are_those_of_one_process(case, shared, model_dir, data_dir):
    with join_ranks() as alone:
        one = sequence_runner.scored(data_dir, _rows(CASES[case][1], model_dir), alone, {})
    found = shared(case)[0]
    sequence_runner.same({name: found[name] for name in one}, one)


@pytest.mark.xdist_group("tensor parallel")
@pytest.mark.parametrize("case", [*ALL_CASES, *ADAPTED])
def test_stages_take_the_steps_of_one_process_which_goes_on_from_them(case, shared, runner, tmp_path):
    *jobs, stopped = shared(case)[1]

    def alone(job, folder):
        keys = runner.keys_of(job["kind"], Path(job["model"]), Path(job["data"]), **job["options"])
        runner.run_stage(job["kind"], folder, keys)
        return folder

    for job in jobs:
        sequence_runner.learned_alike(runner, Path(job["folder"]), alone(job, tmp_path / job["kind"]))
    assert not (Path(stopped["folder"]) / "result.json").exists()
    sequence_runner.learned_alike(runner, alone(stopped, Path(stopped["folder"])), Path(jobs[0]["folder"]))


@pytest.mark.xdist_group("tensor parallel")
@pytest.mark.parametrize("case", ALL_CASES)
def test_each_rank_reads_its_shares_alone_and_all_write_the_files_of_one_process(case, shared, model_dir, tmp_path):
    ranks, names, _ = CASES[case]
    found, _, folder = shared(case)
    one = _exported([name for name in names if name in ROWS], model_dir, tmp_path)
    for name, [[whole]] in one.items():
        assert file_digests(folder / name / "model") == file_digests(tmp_path / name / "model"), name
        for *reads, held in found[name]:  # the proof of an export reads them too; a head is cut before it is tied
            assert len(reads) == 2 and held <= min(reads) and max(reads) < 1.25 * whole / ranks


@pytest.mark.xdist_group("tensor parallel")
@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_are_written_and_merged_as_by_one_process(case, shared, model_dir, tmp_path):
    _, names, _ = CASES[case]
    folder = shared(case)[2]
    _exported(names, model_dir, tmp_path)
    for name in names:
        for part in ("model", "adapter"):
            assert file_digests(folder / name / part) == file_digests(tmp_path / name / part), (name, part)


def _exported(names, model_dir, folder):
    rows = _rows(names, model_dir)
    with join_ranks() as alone:
        exports = {name: (model, str(folder / name / "model"), own) for name, (model, own) in rows.items()}
        return sequence_runner.exported(exports, alone, {})


def test_keys_that_do_not_go_together_are_refused(runner, model_dir, data_dir):
    def keys(kind, tp=2, **options):
        sharding = {"tensor_parallel_size": tp, **options.pop("sharding", {})}
        return runner.keys_of(kind, model_dir("llama"), data_dir, sharding=sharding, **options)

    for says, kind, options in (
        ("tensor_parallel_size: 2 with sp_size: 2", "sft", {"sharding": {"sp_size": 2}}),
        ("tensor_parallel_size: 2 with dp_shard_size: node", "sft", {"sharding": {"dp_shard_size": "node"}}),
        ("sharding.tensor_parallel_size: 2 with a base in 4 bits", "sft", {"adapter": "qlora"}),
        ("sharding.tensor_parallel_size: 2 with use_dora: true", "sft", {**LORA, "use_dora": True}),
        (
            "sharding.tensor_parallel_size: 2 with init_lora_weights: pissa",
            "sft",
            {**LORA, "init_lora_weights": "pissa"},
        ),
        ("sharding.tensor_parallel_size: 2 with lora_dropout: 0.1", "sft", {**LORA, "lora_dropout": 0.1}),
        (
            "tensor_parallel_size: 2 with lora_modules_to_save: lm_head",
            "sft",
            {**LORA, "lora_modules_to_save": ["lm_head"]},
        ),
        ("tensor_parallel_size: 2 with added_tokens: <tool>", "sft", {**LORA, "added_tokens": ["<tool>"]}),
        ("sharding.tensor_parallel_size: 2 with optim: sgd", "sft", {"optim": "sgd"}),
        (
            "tensor_parallel_size: 2 with param_dtype: bfloat16",
            "sft",
            {"sharding": {"param_dtype": "bfloat16"}},
        ),
        ("tensor_parallel_size: 2 with an adapter on a reward model", "reward_model", LORA),
        ("sharding.tensor_parallel_size: 2 with teachers", "distill", {}),
        ("num_processes: 3 with sharding.tensor_parallel_size: 2; expected a multiple", "sft", {"num_processes": 3}),
    ):
        with pytest.raises(ValidationError, match=says):
            keys(kind, **options)


def test_a_group_counts_as_one_where_rows_are_dealt(runner, model_dir, data_dir):
    keys = runner.keys_of("sft", model_dir("llama"), data_dir, sharding={"tensor_parallel_size": 4})
    assert [keys.micro_batches_per_step(processes) for processes in (1, 4, 16)] == [1, 1, 4]
    assert ShardingSpec().tensor_parallel_size == 1


@pytest.mark.slow
def test_bf16_between_two_processes_is_as_near_to_float32_as_that_of_one(model_dir, data_dir, runner, tmp_path):
    models = {
        name: str(model_dir(ROWS[name][0], **ROWS[name][1])) for name in ("norms of heads, a tied head", "biases")
    }
    rows = {f"{name} {bf16}": (model, {"bf16": bf16}) for name, model in models.items() for bf16 in (False, True)}
    job = {"spec": {"tensor_parallel_size": 2}, "data": str(data_dir), "rows": rows}
    stages = {"sft": {**SHARED, **STAGES["sft"], "bf16": True}}
    found, (trained, _) = sequence_runner.started(2, job, str(model_dir("qwen3")), tmp_path, stages)
    with join_ranks() as alone:
        one = sequence_runner.scored(data_dir, rows, alone, {})

    def logp(some, name, *, bf16):
        return [value for batch in sequence_runner.BATCHES for value in some[f"{name} {bf16}, {batch}"]["logp"]]

    for name in models:
        exact, by_one, by_two = logp(one, name, bf16=False), logp(one, name, bf16=True), logp(found, name, bf16=True)
        assert 0 < math.dist(by_two, exact) < 1.5 * math.dist(by_one, exact)
    keys = runner.keys_of("sft", Path(trained["model"]), data_dir, **trained["options"])
    runner.run_stage("sft", tmp_path / "alone", keys)
    together, by_one = runner.losses(Path(trained["folder"])), runner.losses(tmp_path / "alone")
    assert together == pytest.approx(by_one, rel=2e-3)
    assert together != by_one


@pytest.mark.slow
def test_an_adapter_on_experts_is_refused_by_every_process_in_one_line(refused, write_yaml, tmp_path):
    keys = {"adapter": "lora", "lora_target": ["q_proj", "gate_up_proj"], "sharding": {"tensor_parallel_size": 2}}
    done = refused(2, "sft", write_yaml("sft", architecture="qwen3_moe", **keys))
    said = "is trained, where only A and B of linear layers are proven; take it out of the adapter, or set it to 1"
    assert done.stderr.count(said) == 1
