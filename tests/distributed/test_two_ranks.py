"""Two ranks under torchrun (gloo, FSDP2) take the steps of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from posttrain.models.batch import pack
from posttrain.recipes import dpo

pytestmark = pytest.mark.xdist_group("two ranks")  # one of them makes the runs that all look at
LORA = {"adapter": "lora", "lora_r": 4}
# One process sees per step what two ranks see together.
QUICK = {
    "sft": ("sft", {"save_steps": 1}),
    "turns": ("dpo", {"data": "turns", "sequence_len": 512, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05}),
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 32}
HINTED = {"model": "policy", "prompt": "{prompt} It is {answer}."}
NO_SPREAD = {
    "dynamic_sampling": True, "dynamic_sampling_max_rounds": 2, "reward_funcs": ["constant"], "num_prompts_per_step": 3,
    "beta": 0.1,
}  # fmt: skip
SCALERL = {
    "preset": "scalerl", "rollout": {"max_staleness": 0}, "reward_funcs": ["last_digit"], "num_prompts_per_step": 5,
    "no_resampling_pass_rate": 0.1,
}  # fmt: skip
INTERRUPTED = {"thinking_budget": 4, "thinking_budget_spread": 3, "interruption": "So: .", "max_completion_length": 16}
SLOW_CRITIC = {"critic_learning_rate": 1e-4, "adam_epsilon": 1e-6}
"""As slow as the policy of these rows; and of a gradient that is only rounding AdamW makes no step as large as its rate."""
MORE = {
    "sft packed": ("sft", {"packing": True, "sequence_len": 64, "per_device_train_batch_size": 1}),
    "sft on a stream": ("sft", {"streaming": True, "buffer_size": 4, "save_steps": 1}),
    "sft with an adapter": ("sft", LORA),
    "sft with an adapter on 4 bits": ("sft", {"adapter": "qlora", "lora_r": 4}),
    "sft, weights by seed": ("sft", {"init_seed": 3}),
    "sft, a part of the weights": ("sft", {"unfrozen_parameters": [r"model\.layers\.1\.", "model.norm"]}),
    "sft by SGD": ("sft", {"optim": "sgd", "learning_rate": 0.1}),
    "sft with experts": ("sft", {"architecture": "qwen3_moe"}),
    "sft with an adapter on experts": (
        "sft",
        {**LORA, "architecture": "qwen3_moe", "lora_target": ["q_proj", "gate_up_proj", "down_proj"]},
    ),
    "sft, rows that do not divide": ("sft", {"per_device_train_batch_size": 5, "max_steps": 6}),
    "sft, one forward a sequence": (
        "sft",
        {"architecture": "gpt_oss", "per_device_train_batch_size": 5, "max_steps": 6},
    ),
    "sft, an encoding of its own for each length": (
        "sft",
        {"architecture": "llama", "config": DYNAMIC, "per_device_train_batch_size": 5},
    ),
    "dpo": ("dpo", {}),
    "dpo with an adapter": ("dpo", LORA),
    "dpo with a frozen copy": ("dpo", {"precompute_ref_log_probs": False}),
    "dpo with a reference that follows": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "dpo, a sum of losses": (
        "dpo",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "ld_alpha": 0.5, "use_weighting": True},
    ),
    "dpo, compared over the step": ("dpo", {"loss_type": "aot_unpaired"}),
    "reward model": ("reward_model", {"center_rewards_coefficient": 0.1, "eval": "dev-pairs", "eval_steps": 2}),
    "process reward model": ("process_reward_model", {"eval": "dev-steps", "eval_steps": 2}),
    "reward model with an adapter": ("reward_model", {**LORA, "center_rewards_coefficient": 0.1}),
    "reward model, one forward a sequence": (
        "reward_model",
        {"architecture": "gpt_oss", "per_device_train_batch_size": 5, "max_steps": 6},
    ),
    "kto": ("dpo", {"loss_type": "kto", "data": "kto"}),
    "grpo": ("grpo", {"eval": "dev-prompts", "eval_steps": 2}),
    "grpo with kl": ("grpo", {"beta": 0.1, "num_iterations": 2}),
    "grpo with an adapter": ("grpo", {**LORA, "beta": 0.1}),
    "grpo, batches split over steps": ("grpo", {"num_prompts_per_step": 3, "steps_per_generation": 3}),
    "grpo, uncertain tokens": (
        "grpo",
        {"top_entropy_quantile": 0.3, "num_iterations": 2, "num_prompts_per_step": 3},
    ),
    "grpo, tokens of high covariance": (
        "grpo",
        {
            "loss_type": "clip_cov",
            "clip_cov_ratio": 0.3,
            "clip_cov_lb": -50,
            "clip_cov_ub": 50,
            "num_prompts_per_step": 3,
        },
    ),
    "grpo, tokens of the highest covariance": (
        "grpo",
        {
            "loss_type": "kl_cov",
            "kl_cov_ratio": 0.3,
            "num_iterations": 2,
            "num_prompts_per_step": 3,
            "adam_epsilon": 1e-6,
        },
    ),
    "grpo, refilled": ("grpo", {"dynamic_sampling": True, "reward_funcs": ["last_digit"], "num_prompts_per_step": 3}),
    "grpo, nothing has spread": ("grpo", NO_SPREAD),
    "grpo, shares that do not divide": ("grpo", {**LORA, "beta": 0.1, "num_prompts_per_step": 3}),
    "grpo, decoded from the shares": ("grpo", {"rollout": {"transfer": "shared"}, "num_prompts_per_step": 3}),
    "grpo, decoded from the shares with an adapter": ("grpo", {**LORA, "rollout": {"transfer": "shared"}, "beta": 0.1}),
    "grpo, decoded from the shares, one forward a sequence": (
        "grpo",
        {"rollout": {"transfer": "shared"}, "architecture": "gpt_oss", "num_prompts_per_step": 3, "max_steps": 2},
    ),
    "grpo, experts decoded from the shares": (
        "grpo",
        {"rollout": {"transfer": "shared"}, "architecture": "qwen3_moe", "eval": "dev-prompts", "eval_steps": 2},
    ),
    "grpo, experts replayed": (
        "grpo",
        {
            "rollout": {"routed_experts": "replay"},
            "architecture": "qwen3_moe",
            "num_iterations": 2,
            "num_prompts_per_step": 3,
        },
    ),
    "grpo, scalerl": ("grpo", SCALERL),
    "grpo, the head in float32": ("grpo", {"bf16": True, "cast_lm_head_to_fp32": True}),
    "grpo, thoughts interrupted": ("grpo", {**INTERRUPTED, "mask_truncated_completions": True}),
    "grpo, thoughts interrupted, decoded from the shares": (
        "grpo",
        {**INTERRUPTED, "rollout": {"transfer": "shared"}, "num_prompts_per_step": 1},
    ),
    "grpo, taught": (
        "grpo",
        {"teachers": [{"model": "start"}, HINTED], "num_iterations": 2, "num_prompts_per_step": 3},
    ),
    "distill": ("distill", {"teachers": [HINTED], "teacher_top_k": 4, "eval": "dev-prompts", "eval_steps": 2}),
    "distill, given and own answers": (
        "distill",
        {
            "data": "sft",
            "teachers": [{"model": "start"}],
            "loss_type": "jsd",
            "on_policy_share": 0.5,
            "num_prompts_per_step": 3,
        },
    ),
    "distill, one teacher for some": (
        "distill",
        {
            "teachers": [{"model": "start", "when": {"answer": "1"}}, HINTED],
            "loss_type": "reverse_kl",
            "num_prompts_per_step": 1,
        },
    ),
    "distill, one forward a sequence": (
        "distill",
        {"architecture": "gpt_oss", "teachers": [HINTED], "loss_type": "forward_kl", "num_prompts_per_step": 1},
    ),
    "ebft, shares that do not divide": (
        "ebft",
        {"num_prompts_per_step": 3, "ce_coef": 0.1, "eval": "dev-sft", "eval_steps": 2, "use_whitening": False},
    ),
    "ebft, strided, with an adapter": ("ebft", {**LORA, "mode": "strided", "max_completion_length": 3}),
    "ebft, a rank without a prompt": ("ebft", {"num_prompts_per_step": 1}),
    "ebft, decoded from the shares": ("ebft", {"rollout": {"transfer": "shared"}, "num_prompts_per_step": 3}),
    "ppo": ("ppo", {"beta": 0.1, "num_iterations": 2, "critic_warmup_steps": 1, **SLOW_CRITIC}),
    "ppo with an adapter, shares that do not divide": (
        "ppo",
        {**LORA, "num_generations": 1, "num_prompts_per_step": 5, **SLOW_CRITIC},
    ),
    "online dpo": ("online_dpo", {"num_iterations": 2, "eval": "dev-prompts", "eval_steps": 2}),
    "online dpo with an adapter, ties, shares that do not divide": (
        "online_dpo",
        {**LORA, "reward_funcs": ["last_digit"], "num_prompts_per_step": 5, "num_generations": 2},
    ),
    "online dpo, compared over the step": ("online_dpo", {"loss_type": "aot", "num_prompts_per_step": 3}),
    "grpo, one prompt": ("grpo", {"num_prompts_per_step": 1, "soft_overlong_cache": 3}),
}
GENTLE = {"learning_rate": 1e-4}
ROUNDING = 2e-6
"""Of float32 sums that are added up in another order."""


def _options(rows, name, data_dir, ranks):
    kind, options = rows[name]
    options = {**GENTLE, **options}
    architecture, config = options.pop("architecture", "llama"), options.pop("config", {})
    for key, target in (("data", "datasets"), ("eval", "eval_datasets")):
        if key in options:
            options[target] = [{"path": str(data_dir / f"{options.pop(key)}.jsonl")}]
    if kind not in ("grpo", "ppo", "online_dpo") and ranks == 1:
        options["num_processes"] = 2
    return kind, (architecture, config), options


def _command(runner, jobs, ranks=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, runner.__file__, json.dumps(jobs)]


def torchrun_jobs(runner, jobs, ranks=2, timeout=400):
    done = subprocess.run(_command(runner, jobs, ranks), check=False, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-6000:]


def _job(rows, name, folder, runner, model_dir, data_dir, **extra):
    kind, (architecture, config), options = _options(rows, name, data_dir, ranks=2)
    return {
        "kind": kind,
        "model": str(model_dir(architecture, **config)),
        "data": str(data_dir),
        "folder": str(folder),
        "options": options,
        **extra,
    }


def _alone(rows, name, folder, runner, model_dir, data_dir):
    kind, (architecture, config), options = _options(rows, name, data_dir, ranks=1)
    runner.run_stage(kind, folder, runner.keys_of(kind, model_dir(architecture, **config), data_dir, **options))
    return folder


def _same(runner, one, two):
    mine, theirs = runner.rows(one), runner.rows(two)
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        # A policy's loss is a sum of advantages that add up to nothing: what is left of it is rounded as they are, absolutely.
        assert a == pytest.approx(b, abs=ROUNDING, rel=1e-6), a["step"]
    expected, found = runner.weights(one), runner.weights(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < ROUNDING, name


@pytest.fixture(scope="module")
def quick(runner, model_dir, data_dir, tmp_path_factory):
    """SFT straight, SFT stopped after two steps, and DPO on pairs from two conversations, all on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [
        _job(QUICK, "sft", folder / "straight", runner, model_dir, data_dir),
        _job(QUICK, "sft", folder / "stopped", runner, model_dir, data_dir, stop_after=2),
        _job(QUICK, "turns", folder / "turns", runner, model_dir, data_dir),
    ]
    torchrun_jobs(runner, jobs)
    return folder


def test_sft_on_two_ranks_is_sft_on_one(quick, runner, model_dir, data_dir, tmp_path):
    _same(runner, _alone(QUICK, "sft", tmp_path / "one", runner, model_dir, data_dir), quick / "straight")


def test_two_ranks_learn_from_turns_that_share_what_came_before_as_one_does(
    quick, runner, model_dir, data_dir, tmp_path, monkeypatch
):
    depths = []

    def packed(rows):
        batch = pack(rows)
        depths.append(max(segment.depth for tree in batch.layout.trees for segment in tree.segments()))
        return batch

    monkeypatch.setattr(dpo, "pack", packed)
    one = _alone(QUICK, "turns", tmp_path / "one", runner, model_dir, data_dir)
    assert min(depths) >= 2
    _same(runner, one, quick / "turns")


def test_a_checkpoint_of_two_ranks_goes_on_with_one(quick, runner, model_dir, data_dir):
    """The restored weights are bitwise those of the checkpoint, and later losses agree."""
    before = sorted((quick / "stopped/checkpoints").glob("step-*"))[-1]
    assert before.name == "step-00000002"
    _alone(QUICK, "sft", quick / "stopped", runner, model_dir, data_dir)
    _same(runner, quick / "stopped", quick / "straight")


@pytest.fixture(scope="module")
def many(runner, model_dir, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [_job(MORE, name, folder / str(i), runner, model_dir, data_dir) for i, name in enumerate(MORE)]
    torchrun_jobs(runner, jobs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_two_ranks_take_the_steps_of_one(name, many, runner, model_dir, data_dir, tmp_path):
    one = _alone(MORE, name, tmp_path / "one", runner, model_dir, data_dir)
    _same(runner, one, many / str(list(MORE).index(name)))


@pytest.mark.slow
def test_four_ranks_have_the_losses_of_one(runner, model_dir, data_dir, tmp_path):
    names = ["sft packed", "sft with an adapter", "dpo", "kto", "reward model", "grpo with kl", "grpo, one prompt"]
    jobs = [_job(MORE, name, tmp_path / name, runner, model_dir, data_dir) for name in names]
    for job in jobs:
        job["options"] |= {} if job["kind"] == "grpo" else {"num_processes": 2}
    torchrun_jobs(runner, jobs, ranks=4)
    for name in names:
        one = _alone(MORE, name, tmp_path / f"{name} alone", runner, model_dir, data_dir)
        assert runner.losses(tmp_path / name) == pytest.approx(runner.losses(one), rel=1e-6, abs=1e-6), name


RESUMED = {
    "grpo": ("grpo", {"num_iterations": 2}),
    "ppo": ("ppo", {"num_iterations": 2, **SLOW_CRITIC}),
    "online dpo": ("online_dpo", {"num_iterations": 2, "num_prompts_per_step": 3}),
    "dpo": ("dpo", LORA),
    "dpo with a reference that follows": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_two_ranks_stop_and_go_on_bit_by_bit(name, runner, model_dir, data_dir, tmp_path):
    def job(folder, **extra):
        return _job(RESUMED, name, tmp_path / folder, runner, model_dir, data_dir, **extra)

    torchrun_jobs(runner, [job("straight"), job("stopped", stop_after=2), job("stopped"), job("one", stop_after=2)])
    assert runner.rows(tmp_path / "stopped") == runner.rows(tmp_path / "straight")
    for key, tensor in runner.weights(tmp_path / "straight").items():
        assert torch.equal(runner.weights(tmp_path / "stopped")[key], tensor), key
    _alone(RESUMED, name, tmp_path / "one", runner, model_dir, data_dir)
    _same(runner, tmp_path / "one", tmp_path / "straight")


# --- killed --------------------------------------------------------------------------------------------------------


def _ranks_of(launcher):
    """Process ids of the ranks: those children of the launcher that run stages."""
    with suppress(FileNotFoundError):  # the launcher, or one of them, has just ended
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        return [int(pid) for pid in children if "stage_runner" in Path(f"/proc/{pid}/cmdline").read_text()]
    return []


def _kill_once(runner, job, folder, after_steps, whole):
    """Start the job and SIGKILL one of its ranks, or all of it at once, as soon as so many steps are logged.

    Whether it was still running then.
    """
    launcher = subprocess.Popen(_command(runner, [job]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"

    def is_due():
        logged = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        return logged >= after_steps and len(_ranks_of(launcher)) == 2

    while launcher.poll() is None and not is_due():
        time.sleep(0.01)
    running = launcher.poll() is None
    ranks = _ranks_of(launcher) if running else []
    for pid in (launcher.pid, *ranks) if whole else ranks[-1:]:
        os.kill(pid, signal.SIGKILL)
    launcher.wait(120)
    return running


def _killed_and_started_again(runner, job, folder, kills):
    for after_steps, whole in kills:
        assert _kill_once(runner, job, folder, after_steps, whole)
        assert not (folder / "result.json").exists()
    torchrun_jobs(runner, [job])


def _bitwise(runner, one, two):
    assert runner.rows(one) == runner.rows(two)
    expected, found = runner.weights(one), runner.weights(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_rank_that_is_killed_costs_nothing_but_time(quick, runner, model_dir, data_dir, tmp_path):
    job = _job(QUICK, "sft", tmp_path / "killed", runner, model_dir, data_dir)
    _killed_and_started_again(runner, job, tmp_path / "killed", [(2, False)])
    _bitwise(runner, tmp_path / "killed", quick / "straight")


KILLED = {
    "sft": ("sft", {"save_steps": 1, "max_steps": 8}),
    "dpo": ("dpo", {**LORA, "save_steps": 2, "max_steps": 8}),
    "grpo": ("grpo", {"save_steps": 1, "max_steps": 8, "num_iterations": 2, "beta": 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_ranks_that_are_killed_again_and_again_end_the_same(name, runner, model_dir, data_dir, tmp_path):
    """One rank, both with their launcher, at the start of a step and further on."""
    straight, killed = (_job(KILLED, name, tmp_path / to, runner, model_dir, data_dir) for to in ("straight", "killed"))
    torchrun_jobs(runner, [straight])
    kills = [(1, False), (2, True), (4, False), (5, True), (7, False)]
    _killed_and_started_again(runner, killed, tmp_path / "killed", kills)
    _bitwise(runner, tmp_path / "killed", tmp_path / "straight")


@pytest.mark.slow
def test_two_ranks_ask_a_reward_model_for_their_own_share(runner, model_dir, data_dir, tmp_path):
    runner.run_stage("reward_model", tmp_path / "rm", runner.keys_of("reward_model", model_dir("llama"), data_dir))
    rows = {"paid": ("grpo", {"reward_funcs": [f"model:{tmp_path / 'rm/model'}", "spread"], "num_prompts_per_step": 3})}
    torchrun_jobs(runner, [_job(rows, "paid", tmp_path / "two", runner, model_dir, data_dir)])
    _same(runner, _alone(rows, "paid", tmp_path / "one", runner, model_dir, data_dir), tmp_path / "two")


@pytest.mark.slow
def test_two_ranks_ask_a_judge_for_their_own_share(runner, model_dir, data_dir, tmp_path, judging):
    """What one process asks, two ask between them, with a cache in common."""

    def rows(name, url):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "rubric.yaml"
        file.write_text(f"model: m\nurl: {url}\ncache: ./kept\nprompt: '{{completion}}'\n")
        return {"paid": ("grpo", {"reward_funcs": [f"judge:{file}", "spread"], "num_prompts_per_step": 3})}

    def verdict(question, body):
        return f"Verdict: {sum(map(ord, question)) % 11}"

    with judging(verdict) as (url, by_two):
        torchrun_jobs(runner, [_job(rows("judge-two", url), "paid", tmp_path / "two", runner, model_dir, data_dir)])
    with judging(verdict) as (url, by_one):
        alone = _alone(rows("judge-one", url), "paid", tmp_path / "one", runner, model_dir, data_dir)
    _same(runner, alone, tmp_path / "two")
    asked = [{request["messages"][-1]["content"] for request in requests} for requests in (by_one, by_two)]
    assert asked[0] == asked[1] and len(asked[0]) > 10
