"""OpenRLHF's keys of RL alone (`train_ppo_ray`), under their dotted names and the flat ones of releases before, and the fate of each."""

from __future__ import annotations

from typing import Any

from posttrain.config.importers.fates import KeyFate, as_float, changed, joint, left, refused, rows, to
from posttrain.config.importers.sharded import OFFLOAD
from posttrain.config.importers.values import GENERATION, MEMORY, OWN_LOOP, PROCESSES, SAVING, SCHEDULES, TRACKING

_SAMPLER = "the embedded engine samples here, from the policy's own weights"
_IN_FLIGHT = "sampling and training alternate here; set rollout.max_staleness in a YAML of ours"
_MUON = "Muon's own options are not passed on"
_MEDIA = "rows with images are refused when they are read"
_CRITICS = "it is the policy's own, which is checked"

ADVANTAGE = ("algo.advantage.estimator", "advantage_estimator")
ALIKE: dict[str, Any] = {
    "optim": "adam", "adam.betas": [0.9, 0.95], "adam.eps": 1e-8, "adam.weight_decay": 0.0, "lr_scheduler": "cosine_with_min_lr",
    "lr_warmup_ratio": 0.03, "min_lr_ratio": 0.1, "max_norm": 1.0,
}  # fmt: skip
"""Keys that the critic has beside the policy's in dotted names, and their defaults."""


def _each(row: KeyFate, *places: str) -> dict[str, KeyFate]:
    return rows(row, *(f"{model}{place}" for model in ("actor", "ref", "reward", "critic") for place in places))


RL_ROWS: dict[str, KeyFate] = {
    **rows(joint("advantage_estimator", "gae is ppo, group_norm, dr_grpo and rloo are grpo"), *ADVANTAGE),
    **rows(joint("scale_rewards"), "algo.advantage.no_std_norm", "no_advantage_std_norm"),
    **rows(to("gamma", as_float), "algo.advantage.gamma", "gamma"),
    **rows(to("gae_lambda", as_float), "algo.advantage.lambd", "lambd"),
    **rows(joint("num_prompts_per_step"), "rollout.batch_size", "rollout_batch_size"),
    **rows(joint("num_generations"), "rollout.n_samples_per_prompt", "n_samples_per_prompt"),
    **rows(to("num_train_epochs"), "train.num_episodes", "num_episodes"),
    **rows(joint("max_completion_length"), "rollout.max_new_tokens", "max_new_tokens", "generate_max_len"),
    "prompt_max_len": joint("sequence_len"),
    **rows(to("temperature", as_float), "rollout.temperature", "temperature"),
    **rows(to("top_p", as_float), "rollout.top_p", "top_p"),
    **rows(joint("loss_type"), "actor.policy_loss_type", "policy_loss_type"),
    **rows(joint("epsilon"), "actor.eps_clip", "eps_clip", "actor.eps_clip_low_high", "eps_clip_low_high"),
    **rows(joint("delta"), "actor.dual_clip", "dual_clip"),
    **rows(joint("entropy_coef"), "actor.entropy_coef", "entropy_loss_coef"),
    **rows(joint("beta"), "algo.kl.init_coef", "init_kl_coef"),
    **rows(joint("kl_in_reward"), "algo.kl.use_loss", "use_kl_loss"),
    **rows(joint("kl_estimator"), "algo.kl.estimator", "kl_estimator"),
    **rows(refused("beta is steered in another way here", "take it out, or set kl_target in a YAML of ours"), "algo.kl.target", "kl_target"),
    **rows(left("it is read with a target of the KL only"), "algo.kl.horizon", "kl_horizon"),
    **rows(joint("reward_funcs"), "reward.model_name_or_path", "reward_pretrain"),
    **rows(joint("reward_funcs", "FILE.py whose reward_func has our signature; a server is refused"), "reward.remote_url", "remote_rm_url"),
    **rows(joint("reward_funcs", "refused where a reward model or a critic is asked"), "reward.normalize_enable", "normalize_reward"),
    **rows(joint("reward_funcs", "refused, also at its default of -10 to 10, unless nothing can be cut by it"), "reward.clip_range", "reward_clip_range"),
    **rows(joint("soft_overlong_cache"), "reward.overlong_buffer_len", "overlong_buffer_len", "reward.overlong_penalty_factor", "overlong_penalty_factor"),
    **rows(refused("a completion that is cut off is worth what its reward says", "take it out, or see mask_truncated_completions in a YAML of ours"), "reward.stop_properly_penalty_coef", "stop_properly_penalty_coef"),
    **rows(refused("its agents are classes of OpenRLHF's", "write a YAML for posttrain grpo with tools or env (docs/environments.md)"), "train.agent_func_path", "agent_func_path"),
    **rows(refused("it asks for scores in a range, and for equal rewards here", "set dynamic_sampling: true in a YAML of ours"), "algo.dynamic_filtering_enable", "dynamic_filtering"),
    **rows(left("it is read with dynamic filtering only"), "algo.dynamic_filtering_range", "dynamic_filtering_reward_range"),
    **rows(refused("a sampler's rounding is corrected by importance_sampling_correction here, and the embedded engine has none", "take it out, or set that key in a YAML of ours"),
           "algo.advantage.is_correction_enable", "enable_vllm_is_correction", "use_icepop"),
    **rows(left("it is read with that correction only"), "algo.advantage.is_correction_threshold", "algo.advantage.is_correction_type", "vllm_is_truncated_threshold", "vllm_is_correction_type"),
    **rows(joint("datasets"), "data.prompt_dataset", "prompt_data", "data.prompt_probs", "prompt_data_probs", "data.prompt_split", "prompt_split", "data.label_key", "label_key"),
    **rows(refused("supervised rows beside the rollouts have a step of their own here", "take it out, or set ptx_datasets in a YAML of ours"), "pretrain_data"),
    **rows(left("it is read with pretrain_data only"), "ptx_coef", "pretrain_data_probs", "pretrain_split"),
    "actor.model_name_or_path": to("base_model"),
    **rows(to("learning_rate", as_float), "actor.adam.lr", "actor_learning_rate"),
    "actor.adam.betas": joint("adam_beta1"),
    "actor.adam.eps": to("adam_epsilon", as_float),
    "actor.adam.weight_decay": to("weight_decay", as_float, "on matrices only"),
    "actor.optim": to("optim", {"adam": "adamw"}, "DeepSpeed's Adam decays weights as AdamW does", todo="set adam, or optim: muon in a YAML of ours"),
    "actor.lr_scheduler": to("lr_scheduler_type", SCHEDULES, todo="set lr_scheduler_type: cosine, linear, constant or wsd"),
    "actor.lr_warmup_ratio": to("warmup_ratio", as_float),
    "actor.min_lr_ratio": to("min_lr_ratio", as_float),
    "actor.max_norm": to("max_grad_norm", as_float),
    "actor.gradient_checkpointing_enable": to("gradient_checkpointing"),
    **rows(refused(_MUON, "write a YAML of ours with optim: muon"), *(f"{model}.muon.{key}" for model in ("actor", "critic") for key in ("lr", "momentum", "ns_steps", "nesterov", "no_nesterov"))),
    "actor.aux_loss_coef": refused("the routers' loss has the weight that the model's config gives it", "set router_aux_loss_coef in the config.json of a copy"),
    **rows(joint("value_model"), "critic.model_name_or_path", "critic_pretrain"),
    **rows(to("critic_learning_rate", as_float), "critic.adam.lr", "critic_learning_rate"),
    **rows(joint("critic_learning_rate", _CRITICS), *(f"critic.{key}" for key in ALIKE)),
    **rows(to("cliprange_value", as_float), "critic.value_clip", "value_clip"),
    **rows(joint("critic_warmup_steps"), "critic.freezing_steps", "freezing_actor_steps"),
    **rows(refused("the weights that are kept are those that were trained", "take it out"), "train.enable_ema", "enable_ema"),
    **rows(left("it is read with enable_ema only"), "train.ema_beta", "ema_beta"),
    **rows(refused(_IN_FLIGHT, "take it out"), "train.async_enable", "async_train", "train.partial_rollout_enable", "partial_rollout"),
    **rows(left("it is read with asynchronous training only"), "train.async_queue_size", "async_queue_size"),
    **_each(left(PROCESSES), ".num_nodes", ".num_gpus_per_node", "_num_nodes", "_num_gpus_per_node"),
    **rows(left(PROCESSES), "train.colocate_actor_ref", "colocate_actor_ref", "train.colocate_critic_reward", "colocate_critic_reward", "train.colocate_all", "colocate_all_models",
           "ds.enable_sleep", "deepspeed_enable_sleep", "actor_init_on_gpu", "rollout_tasks_per_gpu"),
    **rows(left(_SAMPLER), *(f"vllm{mark}{key}" for mark in "._" for key in ("num_engines", "tensor_parallel_size", "sync_backend", "sync_with_ray", "enable_sleep", "gpu_memory_utilization")),
           "vllm.enable_prefix_caching", "enable_prefix_caching", "vllm.enforce_eager", "enforce_eager", "rollout.vllm_generate_batch_size", "vllm_generate_batch_size"),
    **rows(left(MEMORY), "rollout.micro_batch_size", "micro_rollout_batch_size", "train.dynamic_batch_enable", "use_dynamic_batch", "rollout.max_tokens_per_gpu", "rollout_max_tokens_per_gpu",
           "train.max_tokens_per_gpu", "train_max_tokens_per_gpu", "actor.gradient_checkpointing_reentrant"),
    **rows(changed(OFFLOAD), "ref_reward_offload", "reward.offload"),
    **rows(left(GENERATION), "eval.temperature", "eval_temperature", "eval.n_samples_per_prompt", "eval_n_samples_per_prompt"),
    **rows(left(SAVING), "critic.save_value_network", "save_value_network", "ckpt.best_metric_key", "best_metric_key"),
    **rows(left(_MEDIA), "data.image_key", "image_key", "data.max_images_per_prompt", "max_images_per_prompt", "actor.freeze_visual_encoder"),
    "perf": left(TRACKING),
    "remote_rm_batch_size": left(OWN_LOOP),
}  # fmt: skip
