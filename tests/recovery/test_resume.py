"""Stopped in the middle, continued in a fresh process: the same weights bit by bit, the same metrics, the same ledger.

The rows come from the tables and from the choices of the keys, so a new loss, estimator or choice is covered as it is
added. Three fresh processes run them all: one to the end, one to the stop, one from there.
"""

import fcntl
import itertools
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.rl import GRPOKeys
from posttrain.objectives.advantages import ADVANTAGES
from posttrain.objectives.kl import KL_ESTIMATORS
from posttrain.objectives.policy import POLICY_LOSSES
from posttrain.objectives.preference import PREFERENCE_LOSSES
from posttrain.objectives.ratios import CORRECTIONS
from posttrain.objectives.sft import SFT_LOSSES

LORA = {"adapter": "lora", "lora_r": 4}
TWICE = {"num_iterations": 2, "max_steps": 4}
"""Stopped after three of four steps: in the second pass over the second generation batch."""
NEEDED = {
    "luspo": {"importance_sampling_level": "sequence"},
    "exo_pair": {"label_smoothing": 1e-3},
    "clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": -50, "clip_cov_ub": 50},
    "kl_cov": {"kl_cov_ratio": 0.2},
}
"""What a row of a table cannot do without."""
PAIRED_WITH = {"qlora": {"lora_r": 4}, "lora": {"lora_r": 4, "lora_dropout": 0.2}}


def choices(kind, key):
    """The values that a key may have, from its type."""
    return typing.get_args(STAGE_KINDS[kind].keys.model_fields[key].annotation)


def together(**tables):
    """Rows that between them take every value of every table at least once."""
    rounds = max(len(values) for values in tables.values())
    columns = [itertools.islice(itertools.cycle(values), rounds) for values in tables.values()]
    return [dict(zip(tables, row, strict=True)) for row in zip(*columns, strict=True)]


VARIANTS = together(
    advantage_estimator=list(ADVANTAGES),
    kl_estimator=list(KL_ESTIMATORS),
    importance_sampling_correction=["off", *CORRECTIONS],
    scale_rewards=list(choices("grpo", "scale_rewards")),
    importance_sampling_level=list(choices("grpo", "importance_sampling_level")),
    lr_scheduler_type=list(choices("grpo", "lr_scheduler_type")),
    warmup_type=list(choices("grpo", "warmup_type")),
    warmup_steps=[1],
)
HINTED = [{"model": "policy", "prompt": "{prompt} It is {answer}."}]
TWO_REWARDS = {"reward_funcs": ["spread", "last_digit"], "reward_weights": [1.0, 0.5], "beta": 0.1}
ROWS = {
    **{f"sft: {name}": ("sft", {"loss_type": name}) for name in SFT_LOSSES},
    "reward_model": ("reward_model", {"center_rewards_coefficient": 0.1}),
    "process_reward_model": ("process_reward_model", {"data": ["steps"]}),
    **{f"sft: adapter {name}": ("sft", {"adapter": name, **PAIRED_WITH.get(name, {})}) for name in choices("sft", "adapter")},
    "sft: adapter lora on 8 bits": ("sft", {"adapter": "lora", "load_in_8bit": True, "lora_r": 4}),
    **{f"sft: {name}": ("sft", {"optim": name}) for name in choices("sft", "optim")},
    **{f"sft: {name} after a warmup": ("sft", {"lr_scheduler_type": name, "warmup_steps": 1}) for name in choices("sft", "lr_scheduler_type")},
    "sft: packed, accumulated": ("sft", {"packing": True, "sequence_len": 64, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 6}),
    "sft: a mixture over epochs": ("sft", {"data": ["sft", "dev-sft"], "weights": [0.7, 0.3], "max_steps": -1, "num_train_epochs": 2}),
    "sft: the best checkpoint": ("sft", {"eval_steps": 1, "load_best_model_at_end": True, "eval": "dev-sft"}),
    **{f"dpo: {name}": ("dpo", {"loss_type": name, "data": ["kto" if row.unpaired else "pairs"], **NEEDED.get(name, {})}) for name, row in PREFERENCE_LOSSES.items()},
    "dpo: a sum of losses, all that weighs a pair": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0], "f_divergence_type": "js_divergence", "ld_alpha": 0.5, "use_weighting": True}),
    "dpo: a reference that follows": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "dpo: an adapter, accumulated": ("dpo", {**LORA, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "dpo: a frozen copy as reference, over epochs": ("dpo", {"precompute_ref_log_probs": False, "max_steps": -1, "num_train_epochs": 2}),
    **{f"grpo: {name}": ("grpo", {"loss_type": name, **TWICE, **NEEDED.get(name, {})}) for name in POLICY_LOSSES},
    **{f"grpo: variants {number}": ("grpo", {**TWO_REWARDS, **TWICE, **row}) for number, row in enumerate(VARIANTS)},
    **{f"grpo: {name}": ("grpo", {**TWO_REWARDS, "multi_objective_aggregation": name}) for name in choices("grpo", "multi_objective_aggregation")},
    "grpo: uncertain tokens": ("grpo", {"top_entropy_quantile": 0.2, "mask_truncated_completions": True, **TWICE}),
    "grpo: taught": ("grpo", {"teachers": HINTED, "teacher_advantage": "rlsd", "teacher_decay_steps": 3, **TWICE}),
    "ppo: after a warm-up": ("ppo", {"critic_warmup_steps": 1, "beta": 0.1, "top_entropy_quantile": 0.3, **TWICE}),
    "ppo: an adapter": ("ppo", {**LORA, "beta": 0.1, "kl_in_reward": False, "optim": "adafactor", "cliprange_value": None}),
    "online_dpo: a batch used four times": ("online_dpo", {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4}),
    "online_dpo: an adapter, two losses, ties": ("online_dpo", {**LORA, "loss_type": ["sigmoid", "sft"], "reward_funcs": ["last_digit"], "missing_eos_penalty": 0.5, "num_prompts_per_step": 3}),
    "distill: opd": ("distill", {}),
    "distill: top-k, held out": ("distill", {"teacher_top_k": 4, "eval_steps": 1, "eval": "dev-prompts"}),
    "distill: half given": ("distill", {"loss_type": "jsd", "on_policy_share": 0.5, "teachers": [{"model": "start"}], "data": ["sft"]}),
    "ebft: held out": ("ebft", {"eval_steps": 1, "eval": "dev-sft", "ce_coef": 0.1}),
    "ebft: an adapter, strided": ("ebft", {**LORA, "mode": "strided", "max_completion_length": 4, "use_whitening": False}),
    "grpo: scalerl, thoughts interrupted": ("grpo", {"preset": "scalerl", "rollout": {"max_staleness": 0}, "reward_funcs": ["last_digit"], "no_resampling_pass_rate": 0.1, "num_prompts_per_step": 12, "thinking_budget": 4, "thinking_budget_spread": 3, "interruption": "So: .", "max_completion_length": 16}),
    "grpo: a batch used four times": ("grpo", {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4}),
    "grpo: refilled": ("grpo", {"dynamic_sampling": True, "reward_funcs": ["last_digit"], "num_prompts_per_step": 3, **TWICE}),
    "grpo: an adapter, kl in the reward": ("grpo", {**LORA, "beta": 0.1, "kl_in_reward": True}),
    "grpo: overlong, truncated, entropy": ("grpo", {"soft_overlong_cache": 3, "mask_truncated_completions": True, "entropy_coef": 0.01, **TWICE}),
    "grpo: the best checkpoint": ("grpo", {"eval_steps": 1, "load_best_model_at_end": True, "eval": "dev-prompts"}),
}  # fmt: skip
ALIKE = (
    {f"sft: {name}" for name in list(SFT_LOSSES)[1:]}
    | {f"sft: {name} after a warmup" for name in choices("sft", "lr_scheduler_type")[2:]}
    | {f"dpo: {name}" for name in list(PREFERENCE_LOSSES)[3:]}
)
"""Losses and schedules that carry no state of their own: of each table the first few run in every run of the tests."""


def job_of(name, model, data, folder):
    """A job of `stage_runner`, to the end."""
    kind, options = ROWS[name]
    options = {"save_steps": 1, "max_steps": 3, **options}
    weights = options.pop("weights", [None, None])
    if "data" in options:
        files = [str(data / f"{file}.jsonl") for file in options.pop("data")]
        options["datasets"] = [{"path": path, "weight": w} for path, w in zip(files, weights, strict=False)]
    if "eval" in options:
        options["eval_datasets"] = [{"path": str(data / f"{options.pop('eval')}.jsonl")}]
    return {"kind": kind, "model": str(model), "data": str(data), "folder": str(folder), "options": options}


def stop_of(job):
    """After two steps of three; after three where a generation batch is used twice."""
    return 3 if job["options"].get("num_iterations", 1) > 1 else 2


@pytest.fixture(scope="module")
def resumed(request, runner, model_dir, data_dir, tmp_path_factory, worker_id_or_none):
    """The rows that are asked for, straight and stopped-and-continued. Made once, also where tests run in many processes."""
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if worker_id_or_none else base) / "resumed"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _run_all([name for name in ROWS if name in asked], folder, runner, model_dir("llama"), data_dir)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="module")
def worker_id_or_none(request):
    return getattr(request.config, "workerinput", {}).get("workerid")


def _run_all(names, folder, runner, model, data):
    def jobs(part):
        return [job_of(name, model, data, folder / f"{list(ROWS).index(name)}-{part}") for name in names]

    straight, stopped = jobs("straight"), jobs("stopped")
    # The other way round: what one row leaves behind in its process must not matter to another.
    _in_a_fresh_process(runner, straight[::-1])
    _in_a_fresh_process(runner, [job | {"stop_after": stop_of(job)} for job in stopped])
    assert not list(folder.glob("*-stopped/result.json"))
    _in_a_fresh_process(runner, stopped)


def _in_a_fresh_process(runner, jobs):
    command = [sys.executable, str(Path(runner.__file__)), json.dumps(jobs)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in ROWS])
def test_a_continued_run_is_the_uninterrupted_one(name, resumed, runner):
    straight, stopped = (resumed / f"{list(ROWS).index(name)}-{part}" for part in ("straight", "stopped"))
    assert runner.rows(stopped) == runner.rows(straight)
    expected, found = runner.weights(straight), runner.weights(stopped)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    results = [json.loads((folder / "result.json").read_text()) for folder in (straight, stopped)]
    for result in results:
        result.pop("wall_s")
    assert results[0] == results[1]
    assert ledger(stopped) == ledger(straight)


def ledger(folder):
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [(event["step"], event["generation"], event["prompts"]) for event in events if event["kind"] == "rollouts"]


def test_every_choice_that_decides_what_is_computed_is_in_a_row():
    """Of RL, where state is carried: each value of each key with choices, but for where and how a model is loaded."""
    elsewhere = {
        "overflow",
        "device",
        "merge_onto",
        "save_dtype",
        "bnb_4bit_quant_type",
        "reward_check",
        "adapter",
        "credit",  # tests/recipes/experience/test_episodes.py resumes it
        "adapter_start",  # tests/recipes/test_adapter_start.py resumes it
        "optim",
        "muon_adjust_lr",
        "train_sampling_strategy",
    }
    used = {}
    for kind, options in ROWS.values():
        if kind == "grpo":
            for key, value in GRPOKeys.model_validate(
                {"base_model": "m", "datasets": [{"path": "d"}], "reward_funcs": ["r"]}
                | {k: v for k, v in options.items() if k not in ("data", "eval", "reward_funcs", "reward_weights")}
            ):
                used.setdefault(key, set()).add(value if isinstance(value, str) else None)
    for key, field in GRPOKeys.model_fields.items():
        if typing.get_origin(field.annotation) is typing.Literal and key not in elsewhere:
            assert set(choices("grpo", key)) - {"auto"} <= used[key], (
                key
            )  # auto is another one by the time it is loaded
