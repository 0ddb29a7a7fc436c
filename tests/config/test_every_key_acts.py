"""Every key of a stage acts: given a second value, in the smallest run where it applies, something recorded differs.

Recorded are metrics, events, data summary, files, weights, and how the stage ends. What a key cannot change here is in
`ELSEWHERE`, by name and with the reason.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.rl import PolicyGradientKeys, RewardedKeys
from posttrain.config.stages import TrainKeys
from posttrain.errors import PosttrainError

ELSEWHERE = {
    "revision": "a hub model's; tests/config/test_hub.py",
    "trust_remote_code": "the same model, with or without code of its own; tests/models/test_load.py",
    "device": "the same numbers on another device",
    "dataset_num_proc": "who tokenises, with the same rows; tests/data/test_dealt.py",
    "gradient_checkpointing": "memory for time, with the same numbers; tests/models/test_policy.py",
    "unfrozen_layers_spread": "which of more than two layers; tests/models/test_freezing.py",
    "torch_compile": "time, and roundings of the compiler; tests/models/test_compiled.py",
    "layer_offloading": "where frozen weights lie, with the same numbers; tests/models/test_offload.py",
    "ddp_timeout": "a deadline between processes; tests/distributed/test_meeting.py",
    "sharding": "between processes; tests/distributed/test_sharding_keys.py",
    "output_dir": "where the folder is; tests/cli/test_app.py",
    "lint": "asked before a stage is run; tests/data/test_lint.py",
    "advice_off": "what is said before a run; tests/config/test_advice.py",
    "mlflow": "a mirror; tests/tracking/test_mirror.py",
    "report_to": "mirrors; tests/tracking/test_mirror.py",
    "log_completions": "mirrors; tests/tracking/test_mirror.py",
    "prometheus_port": "a mirror; tests/tracking/test_prometheus.py",
    "allow_raw_base": "what a pipeline may start on; tests/pipeline/test_checks.py",
    "precompute_ref_log_probs": "memory for time, with the same numbers; tests/recipes/test_loops.py",
    "reward_timeout_s": "a deadline; tests/rewards/test_workers.py",
    "env_timeout_s": "a deadline; tests/environments/test_pool.py",
    "env_workers": "how many answer at once; tests/environments/test_pool.py",
    "tools": "needs a template that writes calls; tests/recipes/experience/test_episodes.py",
    "reward_workers": "how many score at once; tests/rewards/test_workers.py",
    "importance_sampling_cap": "binds where sampler and trainer disagree, which they do not here; tests/objectives/test_ratios.py",
    "allow_uncorrected": "with another engine than ours; tests/config/test_rollout.py",
    "rollout_batch_size": "a completion does not depend on its company; tests/rollout/test_contract.py",
    "reward_check": "whether a pipeline certifies; tests/pipeline/test_run.py",
}
"""Key → why no run here can show it, and which test does."""

LORA = {"adapter": "lora", "lora_r": 8}
QLORA = {"adapter": "qlora", "lora_r": 8}
DEV = {"eval_datasets": [{"path": "DATA/dev-sft.jsonl"}]}
BEST = DEV | {"eval_steps": 1, "learning_rate": 0.5, "load_best_model_at_end": True}
KTO = {"loss_type": "kto", "datasets": [{"path": "DATA/kto.jsonl"}]}
OFF_POLICY = {"num_iterations": 2, "learning_rate": 3e-2}
WEIGHED = {"datasets": [{"path": "DATA/weighed.jsonl"}]}
TWO = {"reward_funcs": ["DATA/rewards.py:spread", "DATA/rewards.py:last_digit"]}
PTX = {"ptx_datasets": [{"path": "DATA/sft.jsonl"}]}
HINTED = {"teachers": [{"model": "policy", "prompt": "{prompt} It is {answer}."}]}
GIVEN = {"datasets": [{"path": "DATA/sft.jsonl"}], "teachers": [{"model": "start"}], "loss_type": "jsd"}
PAYING = {
    "env": "DATA/paying.py:Env", "reward_funcs": ["environment"], "reward_check": "off", "max_completion_length": 60,
    "temperature": 2.0, "stop": list("aeiou "),
}  # fmt: skip
"""Answers end at a vowel, so that there are several turns, each with its reward; an EOS alone would rarely come in time."""
CLIP_COV = {"loss_type": "clip_cov", "clip_cov_ratio": 0.3, "clip_cov_lb": -50, "clip_cov_ub": 50}
KL_COV = {"loss_type": "kl_cov", "kl_cov_ratio": 0.1, "num_iterations": 2, "learning_rate": 1e-2}
SPIKE = {"times": 0.0, "after": 1, "at_least": 0.0}


@dataclass(frozen=True)
class Flip:
    """A key's second value, and what a run needs so that the key applies."""

    key: str
    second: Any
    base: dict[str, Any] = field(default_factory=dict)


STRIDED = {"mode": "strided", "max_completion_length": 3}

FLIPS = {
    "sft": [
        Flip("base_model", "MODEL:llama"),
        Flip("init_seed", 7),
        Flip("adapter_name_or_path", "DATA/adapter", LORA),
        Flip("tokenizer_name_or_path", "DATA/tokenizer"),
        Flip("chat_template", "DATA/other.jinja"),
        Flip("chat_template_kwargs", {"loud": True}, {"chat_template": "DATA/other.jinja"}),
        Flip("added_tokens", ["<|never seen|>"]),
        Flip("save_dtype", "bfloat16"),
        Flip("adapter", "lora"),
        Flip("adapter_start", "continue", LORA),
        Flip("load_in_4bit", True),
        Flip("load_in_8bit", True, LORA),
        Flip("bnb_4bit_quant_type", "fp4", QLORA),
        Flip("bnb_4bit_use_double_quant", False, QLORA),
        Flip("lora_r", 4, LORA),
        Flip("lora_alpha", 64, LORA),
        Flip("lora_dropout", 0.5, LORA),
        Flip("lora_target", ["q_proj"], LORA),
        Flip("lora_modules_to_save", ["lm_head"], LORA | {"base_model": "MODEL:llama"}),
        Flip("loraplus_lr_ratio", 16, LORA),
        Flip("use_rslora", True, LORA),
        Flip("use_dora", True, LORA),
        Flip("init_lora_weights", "gaussian", LORA),
        Flip("rank_pattern", {"q_proj": 2}, LORA),
        Flip("alpha_pattern", {"q_proj": 64}, LORA),
        Flip("merge_onto", "original", QLORA),
        Flip("bf16", True),
        Flip("datasets", [{"path": "DATA/dev-sft.jsonl"}]),
        Flip("eval_datasets", DEV["eval_datasets"]),
        Flip("val_size", 4),
        Flip("special_tokens", {"eos_token": "<|endoftext|>"}),
        Flip("seed", 8),
        Flip("sequence_len", 34),
        Flip("overflow", "truncate", {"sequence_len": 34}),
        Flip("min_sample_len", 34),
        Flip("train_sampling_strategy", "sequential"),
        Flip("deduplicate", True, {"datasets": [{"path": "DATA/sft.jsonl"}, {"path": "DATA/sft.jsonl"}]}),
        Flip("per_device_train_batch_size", 2),
        Flip("gradient_accumulation_steps", 2),
        Flip("num_processes", 2),
        Flip("num_train_epochs", 2, {"max_steps": -1}),
        Flip("max_steps", 2),
        Flip("learning_rate", 1e-4),
        Flip("lr_scheduler_type", "linear"),
        Flip("min_lr_ratio", 0.5),
        Flip("warmup_ratio", 0.5),
        Flip("warmup_steps", 2),
        Flip("unfrozen_parameters", [r"model\.layers\.1\."]),
        Flip("unfrozen_layers", 1),
        Flip("unfrozen_layer_modules", ["mlp"], {"unfrozen_layers": 1}),
        Flip("warmup_type", "quadratic", {"warmup_steps": 3}),
        Flip("lr_num_cycles", 2, {"lr_scheduler_type": "cosine_with_restarts"}),
        Flip("lr_power", 2.0, {"lr_scheduler_type": "polynomial"}),
        Flip("lr_decay_ratio", 0.5),
        Flip("optim", "adamw_8bit"),
        Flip("muon_adjust_lr", "spectral_norm", {"optim": "muon"}),
        Flip("embedding_lr_scale", 0.1),
        Flip("adam_beta1", 0.5),
        Flip("adam_beta2", 0.9),
        Flip("adam_epsilon", 1e-2),
        Flip("weight_decay", 0.5),
        Flip("max_grad_norm", 1e-3),
        Flip("logging_steps", 2),
        Flip("eval_suite", "DATA/suite.jsonl"),
        Flip("eval_suite_limit", 1, {"eval_suite": "DATA/suite.jsonl"}),
        Flip("eval_steps", 1, DEV),
        Flip("save_steps", 1),
        Flip("save_total_limit", 1, {"save_steps": 1}),
        Flip("save_keep_every", 1, {"save_steps": 1, "save_total_limit": 1}),
        Flip("load_best_model_at_end", True, DEV | {"eval_steps": 1, "learning_rate": 0.5}),
        Flip(
            "metric_for_best_model",
            "eval_mean_token_accuracy",
            BEST | {"learning_rate": 1e-3, "greater_is_better": False},
        ),
        Flip("greater_is_better", True, BEST),
        Flip(
            "early_stopping_patience", 1, DEV | {"eval_steps": 1, "learning_rate": 0.5, "load_best_model_at_end": True}
        ),
        Flip("health", {"gradient_spike": SPIKE | {"action": "hold"}}),
        Flip("health_rollbacks", 0, {"health": {"gradient_spike": SPIKE | {"action": "rollback"}}}),
        Flip("train_on", "all"),
        Flip("loss_type", "dft"),
        Flip("eaft_alpha", 0.5, {"loss_type": "eaft"}),
        Flip("eaft_k", 5, {"loss_type": "eaft"}),
        Flip("label_smoothing_factor", 0.1),
        Flip("neftune_noise_alpha", 5),
        Flip("packing_window", 1, {"packing": True, "sequence_len": 100, "per_device_train_batch_size": 2}),
        Flip("packing_strategy", "wrapped", {"packing": True, "sequence_len": 100, "per_device_train_batch_size": 2}),
        Flip("streaming", True),
        Flip("buffer_size", 3, {"streaming": True}),
        Flip("packing", True, {"sequence_len": 100, "per_device_train_batch_size": 2}),
    ],
    "dpo": [
        Flip("loss_type", "ipo"),
        Flip("beta", 0.5),
        Flip("label_smoothing", 0.2),
        Flip("loss_weights", [0.2, 1.0], {"loss_type": ["sigmoid", "sft"]}),
        Flip("f_divergence_type", "js_divergence", {"learning_rate": 1e-2}),
        Flip("f_alpha_divergence_coef", 0.1, {"f_divergence_type": "alpha_divergence", "learning_rate": 1e-2}),
        Flip("ld_alpha", 0.1, {"learning_rate": 1e-2}),
        Flip("use_weighting", True),
        Flip("row_weights", True, WEIGHED),
        Flip("margin_coef", 0.5, WEIGHED),
        Flip("sync_ref_model", True, {"ref_model_sync_steps": 1}),
        Flip("ref_model_mixup_alpha", 0.1, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
        Flip("ref_model_sync_steps", 2, {"sync_ref_model": True}),
        Flip("dpop_lambda", 1.0, {"loss_type": "dpop", "learning_rate": 0.3}),
        Flip("discopop_tau", 0.5, {"loss_type": "discopop"}),
        Flip("simpo_gamma", 1.5, {"loss_type": "simpo"}),
        Flip("cpo_alpha", 0.2, {"loss_type": "cpo"}),
        Flip("rpo_alpha", 0.5),
        Flip("desirable_weight", 2.0, KTO),
        Flip("undesirable_weight", 2.0, KTO),
    ],
    "reward_model": [Flip("center_rewards_coefficient", 0.5)],
    "process_reward_model": [
        Flip("step_separator", "\n\n"),
        Flip("max_completion_length", 24),
        Flip("train_on_last_step_only", True),
    ],
    "grpo": [
        Flip("off_policy_mask_threshold", 1e-9, OFF_POLICY),
        Flip("top_entropy_quantile", 0.2),
        Flip("clip_cov_ratio", 0.9, CLIP_COV),
        Flip("clip_cov_lb", 0.0, CLIP_COV),
        Flip("clip_cov_ub", 0.0, CLIP_COV),
        Flip("kl_cov_ratio", 0.5, KL_COV),
        Flip("ppo_kl_coef", 5.0, KL_COV),
        Flip("env", "DATA/env.py:Env"),
        Flip("credit", "turn", PAYING),
        Flip("gamma", 0.5, PAYING | {"credit": "turn"}),
        Flip("max_turns", 1, {"env": "DATA/env.py:Env", "max_completion_length": 40, "temperature": 2.0}),
        Flip("reward_funcs", ["DATA/rewards.py:last_digit"]),
        Flip("reward_weights", [1.0, 0.1], TWO),
        Flip("reward_kwargs", {"soft_overlong": {"max_length": 4, "cache": 4}}, {"reward_funcs": ["soft_overlong"]}),
        Flip("multi_objective_aggregation", "normalize_then_sum", TWO),
        Flip("kl_reduction", "sequence_sum_mean", {"beta": 0.5, "num_iterations": 2, "learning_rate": 3e-2}),
        Flip("loss_reduction", "prompt_mean_of_token_mean", {"num_prompts_per_step": 3, "stop": list("aeiou ")}),
        Flip(
            "zero_variance_filtering", True, {"reward_funcs": ["DATA/rewards.py:last_digit"], "num_prompts_per_step": 4}
        ),
        Flip("ptx_datasets", [{"path": "DATA/sft.jsonl"}]),
        Flip("ptx_coef", 0.5, PTX),
        Flip("ptx_rows_per_step", 3, PTX),
        Flip("num_generations", 3),
        Flip("num_prompts_per_step", 4),
        Flip("steps_per_generation", 2),
        Flip("num_iterations", 2),
        Flip("max_completion_length", 3),
        Flip("temperature", 0.5),
        Flip("top_p", 0.5),
        Flip("top_k", 3),
        Flip("min_p", 0.5),
        Flip("stop", list("abcdefghijklmnopqrstuvwxyz ")),
        Flip("loss_type", "grpo", {"num_prompts_per_step": 3, "stop": list("aeiou ")}),
        Flip("beta", 0.5),
        Flip("kl_estimator", "k1", {"beta": 0.5}),
        Flip("kl_in_reward", True, {"beta": 0.5}),
        Flip("use_bias_correction_kl", False, {"beta": 0.5} | OFF_POLICY),
        Flip("epsilon", 0.001, OFF_POLICY),
        Flip("epsilon_high", 0.001, OFF_POLICY),
        Flip("delta", 1.3, OFF_POLICY),
        Flip("importance_sampling_level", "sequence", OFF_POLICY),
        Flip("scale_rewards", "none"),
        Flip("advantage_estimator", "rloo"),
        Flip("advantage_eps", 1.0),
        Flip("sapo_temperature_pos", 2.0, {"loss_type": "sapo"}),
        Flip("sapo_temperature_neg", 2.0, {"loss_type": "sapo"}),
        Flip("mask_truncated_completions", True),
        Flip("kl_target", 1e-6, {"beta": 0.1, "learning_rate": 1e-2}),
        Flip("entropy_coef", 0.1),
        Flip("entropy_target", 50.0),
        Flip("dynamic_sampling", True, {"reward_funcs": ["DATA/rewards.py:last_digit"]}),
        Flip(
            "dynamic_sampling_max_rounds", 1, {"reward_funcs": ["DATA/rewards.py:constant"], "dynamic_sampling": True}
        ),
        Flip("no_resampling_pass_rate", 0.1, {"reward_funcs": ["DATA/rewards.py:last_digit"], "max_steps": 8}),
        Flip("thinking_budget", 2, {"max_completion_length": 16, "interruption": "So: ."}),
        Flip("thinking_budget_spread", 2, {"max_completion_length": 16, "interruption": "So: .", "thinking_budget": 3}),
        Flip("interruption", "No.", {"max_completion_length": 16, "interruption": "So: .", "thinking_budget": 3}),
        Flip("cast_lm_head_to_fp32", True, {"bf16": True}),
        Flip("preset", "scalerl", {"rollout": {"max_staleness": 0}}),
        Flip("soft_overlong_cache", 3, {"stop": list("aeiou ")}),
        Flip("missing_eos_penalty", 1.0, {"stop": list("aeiou ")}),
        Flip("importance_sampling_correction", "token_truncate"),
        # Of its other keys, which are another engine's: tests/recipes/experience/test_engines.py.
        Flip("rollout", {"exact": True}),
        Flip("keep_rollouts", True),
        Flip("reward_check_steps", 1, {"reward_funcs": ["DATA/rewards.py:last_digit"]}),
        Flip("teachers", [HINTED["teachers"][0]]),
        Flip("teacher_advantage", "rlsd", HINTED),
        Flip("teacher_coef", 0.1, HINTED),
        Flip("teacher_clip", 0.01, HINTED | {"teacher_advantage": "rlsd"}),
        Flip("teacher_warmup_steps", 2, HINTED),
        Flip("teacher_decay_steps", 2, HINTED),
    ],
    "ppo": [
        Flip("num_generations", 3),
        Flip("num_prompts_per_step", 2),
        Flip("kl_in_reward", False, {"beta": 0.5}),
        Flip("epsilon", 0.01, OFF_POLICY),
        Flip("epsilon_high", 0.9, OFF_POLICY),
        Flip("gamma", 0.5),
        Flip("gae_lambda", 0.0),
        Flip("value_model", "MODEL:llama"),
        Flip("critic_learning_rate", 1e-4),
        Flip("critic_warmup_steps", 2),
        Flip("vf_coef", 0.1),
        Flip("cliprange_value", None, OFF_POLICY | {"cliprange_value": 0.001}),
    ],
    "online_dpo": [
        Flip("loss_type", "ipo"),
        Flip("loss_weights", [0.2, 1.0], {"loss_type": ["sigmoid", "sft"]}),
        Flip("beta", 0.5),
        Flip("num_generations", 3),
        Flip("num_iterations", 2),
        Flip("temperature", 0.5),
        Flip("missing_eos_penalty", 1.0, {"stop": list("aeiou ")}),
        Flip("label_smoothing", 0.2),
        Flip("f_divergence_type", "js_divergence", {"learning_rate": 1e-2}),
        Flip("f_alpha_divergence_coef", 0.1, {"f_divergence_type": "alpha_divergence", "learning_rate": 1e-2}),
        Flip("ld_alpha", 0.1, {"learning_rate": 1e-2, "stop": list("aeiou ")}),
        Flip("dpop_lambda", 1.0, {"loss_type": "dpop", "learning_rate": 0.3}),
        Flip("discopop_tau", 0.5, {"loss_type": "discopop"}),
        Flip("simpo_gamma", 1.5, {"loss_type": "simpo"}),
        Flip("cpo_alpha", 0.2, {"loss_type": "cpo"}),
        Flip("rpo_alpha", 0.5),
    ],
    "distill": [
        Flip("teachers", [{"model": "policy", "prompt": "{answer}"}]),
        Flip("loss_type", "jsd"),
        Flip("jsd_beta", 0.1, {"loss_type": "jsd"}),
        Flip("teacher_top_k", 4),
        Flip("on_policy_share", 0.0, GIVEN | {"on_policy_share": 0.5}),
        Flip("num_generations", 3),
        Flip("num_prompts_per_step", 4),
        Flip("max_completion_length", 3),
        Flip("temperature", 0.5),
        Flip("top_p", 0.5),
        Flip("top_k", 3),
        Flip("min_p", 0.5),
        Flip("stop", list("abcdefghijklmnopqrstuvwxyz ")),
        # Of its keys those of other engines: tests/recipes/experience/test_engines.py; our own has none that distill may set.
        Flip("rollout", {"exact": True}),
    ],
    "ebft": [
        Flip("learning_rate", 1e-4),
        Flip("num_generations", 3),
        Flip("num_prompts_per_step", 4),
        Flip("max_completion_length", 3),
        Flip("temperature", 0.5),
        Flip("top_p", 0.5),
        Flip("top_k", 3),
        Flip("min_p", 0.5),
        Flip("stop", list("abcdefghijklmnopqrstuvwxyz ")),
        Flip("mode", "strided"),
        Flip("stride", 3, STRIDED),
        Flip("context_length", 20, STRIDED),
        Flip("min_completion_prefix", 2, STRIDED),
        Flip("feature_layers", [1.0]),
        Flip("embed_method", "mean_pooling"),
        Flip("normalize_layers", True, {"feature_layers": [0.5, 1.0]}),
        Flip("use_whitening", False),
        Flip("alignment_coef", 0.5, {"use_whitening": False}),
        Flip("diversity_coef", 0.5, {"use_whitening": False}),
        Flip("unbiased_baseline", False, {"use_whitening": False}),
        Flip("advantage_estimator", "group"),
        Flip("scale_rewards", "none", {"advantage_estimator": "group"}),
        Flip("advantage_eps", 0.5, {"advantage_estimator": "group"}),
        Flip("loss_type", "dr_grpo"),
        Flip("ce_coef", 0.5),
        Flip("teachers", [{"model": "start"}]),
        # Of its keys those of other engines: as of distill.
        Flip("rollout", {"exact": True}),
    ],
}
"""Stage → its flips. What every stage has is flipped under SFT, the shortest of them; what GRPO and PPO share under GRPO."""

QUICK = {
    "sft": ("min_lr_ratio", "load_in_4bit", "train_on"),
    "dpo": ("label_smoothing",),
    "reward_model": ("center_rewards_coefficient",),
    "process_reward_model": ("train_on_last_step_only",),
    "grpo": ("stop", "scale_rewards", "soft_overlong_cache", "rollout"),
    "ppo": ("gae_lambda",),
    "online_dpo": ("loss_type",),
    "distill": ("teacher_top_k",),
    "ebft": ("mode",),
}
CASES = [
    pytest.param(kind, flip, id=f"{kind}-{flip.key}", marks=() if flip.key in QUICK[kind] else pytest.mark.slow)
    for kind, flips in FLIPS.items()
    for flip in flips
]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ ' !' if loud else ':' }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ ' !' if loud else ':' }}\n{% endif %}"
)


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_every_key_of_the_schema_is_flipped_or_listed(kind):
    shared = {"sft": (), "ppo": PolicyGradientKeys.model_fields, "online_dpo": RewardedKeys.model_fields}.get(
        kind, TrainKeys.model_fields
    )
    keys = set(STAGE_KINDS[kind].keys.model_fields) - set(shared)
    flipped = [flip.key for flip in FLIPS[kind]]
    assert len(set(flipped)) == len(flipped)
    assert set(flipped) & ELSEWHERE.keys() == set()
    missing = keys - set(flipped) - ELSEWHERE.keys()
    assert missing == set(), f"give each a Flip, or a reason in ELSEWHERE: {sorted(missing)}"
    assert set(flipped) <= set(STAGE_KINDS[kind].keys.model_fields)


def test_what_is_listed_is_a_key():
    assert ELSEWHERE.keys() <= {key for row in STAGE_KINDS.values() for key in row.keys.model_fields}


@pytest.fixture(scope="module")
def record(runner, model_dir, data_dir, tmp_path_factory):
    """`record(kind, options)` is all that a run with these options leaves; runs are made once."""
    folder, made = tmp_path_factory.mktemp("flips"), {}
    for path in data_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    weighed = [row | {"weight": number % 3, "margin": number % 2} for number, row in enumerate(pairs)]
    (folder / "weighed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighed))
    texts = [{"prompt": f"{number} and {number} is", "completion": f" {2 * number}."} for number in range(8)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "other.jinja").write_text(TEMPLATE)
    (folder / "env.py").write_text("class Env:\n    def step(self, answer):\n        return 'on'\n")
    paying = (
        "class Env:\n    def step(self, answer):\n        return {'observation': 'on', 'reward': len(answer) % 5 / 5}\n"
    )
    (folder / "paying.py").write_text(paying)
    other = AutoTokenizer.from_pretrained(model_dir("qwen3"))
    other.eos_token = "<|endoftext|>"
    other.save_pretrained(folder / "tokenizer")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir("qwen3")), lora).save_pretrained(folder / "adapter")
    rows = [{"id": str(n), "prompt": f"{n}", "target": "e", "scorer": "contains", "split": "dev"} for n in range(3)]
    (folder / "suite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = {
        "sft": "sft",
        "dpo": "pairs",
        "reward_model": "pairs",
        "process_reward_model": "steps",
        "grpo": "prompts",
        "ppo": "prompts",
        "online_dpo": "prompts",
        "distill": "prompts",
        "ebft": "sft",
    }

    def placed(value):
        text = json.dumps(value).replace("DATA/", f"{folder}/")
        for architecture in ("llama", "qwen3"):
            text = text.replace(f"MODEL:{architecture}", str(model_dir(architecture)))
        return json.loads(text)

    def make(kind, options):
        name = hashlib.sha256(json.dumps([kind, options], sort_keys=True).encode()).hexdigest()[:12]
        if name not in made:
            values = runner.COMMON | {"max_steps": 3} | runner.OWN[kind]
            values |= {"base_model": "MODEL:qwen3", "datasets": [{"path": f"DATA/{usual[kind]}.jsonl"}]}
            if kind in ("grpo", "ppo", "online_dpo"):
                values["reward_funcs"] = ["DATA/rewards.py:spread"]
            try:
                keys = STAGE_KINDS[kind].keys.model_validate(placed(values | options))
                runner.run_stage(kind, folder / name, keys)
                made[name] = recorded(runner, folder / name)
            except (PosttrainError, ValueError) as error:
                made[name] = f"{type(error).__name__}: {str(error).replace(name, '')}"
        return made[name]

    return make


def recorded(runner, folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    return {
        "metrics": runner.rows(folder),
        "events": [[e["kind"], e["step"], e.get("rule"), e.get("action")] for e in events],
        "result": {name: value for name, value in result.items() if name != "wall_s"},
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "rewards" not in path.parts),
        "weights": {name: tensor.double().sum().item() for name, tensor in runner.weights(folder).items()},
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "flip"), CASES)
def test_a_second_value_changes_what_is_recorded(kind, flip, record):
    first, second = record(kind, flip.base), record(kind, flip.base | {flip.key: flip.second})
    assert not isinstance(first, str) or flip.key == "health_rollbacks", first
    assert first != second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "inner"),
    [("sft.jsonl", {"default_system": "Be brief."}), ("texts.jsonl", {"completion_suffix": "!"})],
    ids=["default_system", "completion_suffix"],
)
def test_a_key_of_a_source_changes_what_is_recorded(file, inner, record):
    first, second = (record("sft", {"datasets": [{"path": f"DATA/{file}", **keys}]}) for keys in ({}, inner))
    assert not isinstance(first, str) and not isinstance(second, str), (first, second)
    assert first != second


def test_the_record_of_equal_runs_is_equal(runner, model_dir, data_dir, tmp_path):
    """Else a difference would say nothing."""
    for name in ("one", "two"):
        keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, max_steps=2, reward_funcs=["last_digit"])
        runner.run_stage("grpo", tmp_path / name, keys)
    assert recorded(runner, tmp_path / "one") == recorded(runner, tmp_path / "two")
