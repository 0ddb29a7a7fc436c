"""Axolotl's `rl: grpo` and `gdpo`: what `trl` says, which its trainer hands on to TRL's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import ImportDraft, KeyFate, flag, follow, is_off, left, refused, rows, to
from posttrain.config.importers.groups import Devices, generation_batches
from posttrain.config.importers.paths import local_file, reward_file

_OTHER = "take it out, or train with Axolotl"
_SAMPLER = "it says where completions are sampled or logged; the embedded engine samples here"
_ASYNC = "it is read with async_prefetch or use_data_producer only"

ROWS: dict[str, KeyFate] = {
    **{key: to(key) for key in ("beta", "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "epsilon", "epsilon_high", "delta", "loss_type",
                                "num_iterations", "reward_weights", "importance_sampling_level", "entropy_coef", "multi_objective_aggregation", "off_policy_mask_threshold",
                                "top_entropy_quantile")},
    **{key: to(key, flag) for key in ("mask_truncated_completions", "use_bias_correction_kl", "log_completions")},
    "scale_rewards": to("scale_rewards", {True: "group", False: "none", "group": "group", "batch": "batch", "none": "none"}),
    "reward_num_workers": to("reward_workers"),
    **rows(left(_SAMPLER), "use_vllm", "use_liger_loss", "num_completions_to_print", "log_multimodal", "vllm_mode", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
           "vllm_enable_sleep_mode", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_min",
           "vllm_importance_sampling_clip_max", "vllm_lora_sync"),
    "vllm_guided_decoding_regex": refused("completions are sampled freely", "take it out"),
    "sync_ref_model": refused("the reference of grpo stays where the stage begins", _OTHER),
    **rows(left("it is read with sync_ref_model only"), "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "repetition_penalty": refused("sampling has no such penalty, and the loss would not know of it", "set 1.0", (1, 1.0)),
    **rows(left("Axolotl hands it on to nothing in grpo"), "generation_kwargs", "chat_template_kwargs"),
    "use_adaptive_entropy": refused("its controller is another one than entropy_target's", "set entropy_target in a YAML of ours"),
    **rows(left("it is read with use_adaptive_entropy only"), "entropy_target", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
    "rollout_func": refused("it is a program of its own that plays the episodes", "write an environment (docs/environments.md), and name it in env"),
    "reward_processing_classes": refused("a reward model reads rows by the tokenizer of its folder here", "take it out"),
    "async_prefetch": refused("there a batch is sampled by an older policy while this one is trained", _OTHER),
    "use_data_producer": refused("its trainer drops and replays groups as it goes", _OTHER),
    "vllm_sync_interval": refused("the sampler has the newest weights at each generation batch here", "set 1", (1,)),
    **rows(left(_ASYNC), "prefetch_depth", "streaming_partial_batch", "streaming_min_groups", "replay_buffer_size", "replay_recompute_logps", "reroll_start_fraction",
           "reroll_max_groups", "skip_zero_advantage_batches"),
}  # fmt: skip
"""A key of `trl` → its fate; those of rewards and of the batch are read together."""
_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_TOGETHER = ("reward_funcs", "generation_batch_size")


def read_grpo(draft: ImportDraft) -> None:
    """Puts or refuses every key of `trl` but those of the batch. Raises: AttributeError where it is no mapping."""
    trl = _trl(draft)
    _rewards(draft, trl)
    for key, value in trl.items():
        if value is None or key in _TOGETHER:
            continue
        if key in ROWS:
            follow(ROWS[key], f"trl.{key}", value, draft)
        elif not is_off(value):
            draft.refuse(f"trl.{key}", f"{value}: no key of its grpo that is known here", _OTHER)
    if trl.get("max_completion_length") is None:
        draft.refuse("trl.max_completion_length", "missing: completions then end where the model does", "set it")
    if draft.source["rl"] == "gdpo" and trl.get("multi_objective_aggregation") is None:
        draft.put("multi_objective_aggregation", "normalize_then_sum", "rl", "gdpo there")
    else:
        draft.leave("rl", f"{draft.source['rl']}: it is run by `posttrain grpo`")
    draft.assume("loss_type", "dapo")
    draft.assume("beta", 0.0)


def read_batches(draft: ImportDraft) -> None:
    """Prompts of a step, once the micro-batches are known that TRL counts completions by."""
    if draft.kind == "grpo":
        rows_, accumulated = draft.size("micro_batch_size", 1), draft.keys.get("gradient_accumulation_steps", 1)
        generation_batches(draft, _trl(draft), Devices("micro_batch_size", rows_, int(accumulated)), "trl.")


def _trl(draft: ImportDraft) -> Mapping[str, Any]:
    return draft.source.get("trl") or {}


def _rewards(draft: ImportDraft, trl: Mapping[str, Any]) -> None:
    """`module.function` of each, or a reward model: what no module is called."""
    funcs = trl.get("reward_funcs")
    if not funcs:
        draft.refuse("trl.reward_funcs", "missing: RL needs a reward", "name reward functions, as file.py:function")
        return
    listed = [str(name) for name in ([funcs] if isinstance(funcs, str) else funcs)]
    files = [reward_file(draft, name) if _FUNCTION.fullmatch(name) else f"model:{local_file(draft, name)}" for name in listed]  # fmt: skip
    draft.put("reward_funcs", files, "trl.reward_funcs", "module.function there is file.py:function here, and a model is model:FOLDER")  # fmt: skip
