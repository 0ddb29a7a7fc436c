"""verl's keys, by their path in its hydra configuration, and the fate of each."""

from __future__ import annotations

from typing import Any

from posttrain.config.importers.fates import KeyFate, as_float, changed, flag, joint, left, noted, refused, rows, to
from posttrain.config.importers.sharded import OFFLOAD
from posttrain.config.importers.trl import SCRIPT
from posttrain.config.importers.values import (
    KERNELS,
    LOADING,
    MEMORY,
    OWN_LOOP,
    PADDING,
    PROCESSES,
    SAVING,
    TRACKING,
    shuffled,
)

_SAMPLER = "the embedded engine samples here, from the policy's own weights"
_VALIDATION = "it is about answers while validating, not about training"
_REFERENCE = "the reference is the model that the stage starts from, scored as the policy is"
_SAME_CRITIC = "it is the policy's own, which is checked"
_MEDIA = "rows with images or video are refused when they are read"
_PLAIN = "take it out, or train with verl"


def _in(row: KeyFate, place: str, words: str) -> dict[str, KeyFate]:
    return rows(row, *(f"{place}.{word}" for word in words.split()))


_OPTIMIZER: dict[str, KeyFate] = {
    "lr": to("learning_rate", as_float),
    "lr_warmup_steps_ratio": joint("warmup_ratio"),
    "lr_warmup_steps": joint("warmup_steps", "in optimizer steps"),
    **rows(to("lr_scheduler_type", {"constant": "constant", "cosine": "cosine", "wsd": "wsd"}, todo="set cosine or constant"), "warmup_style", "lr_scheduler_type", "lr_scheduler"),
    "min_lr_ratio": to("min_lr_ratio", as_float),
    "num_cycles": refused("a cosine runs down once here", "set 0.5, or lr_scheduler_type: cosine_with_restarts in a YAML of ours", (0.5,)),
    "weight_decay": to("weight_decay", as_float, "on matrices only"),
    "betas": joint("adam_beta1"),
    "total_training_steps": left("trainer says how many steps there are"),
    "optimizer": to("optim", {"AdamW": "adamw", "AdamW8bit": "adamw_8bit"}, todo="set AdamW, or optim in a YAML of ours"),
    "optimizer_impl": left("the optimizer's name says what it does"),
    "override_optimizer_config": refused("options of an optimizer are not passed on", _PLAIN),
    "override_optimizer_config.*": refused("options of an optimizer are not passed on", _PLAIN),
    "clip_grad": to("max_grad_norm", as_float),
}  # fmt: skip

_MODEL: dict[str, KeyFate] = {
    "path": to("base_model"),
    "lora_rank": joint("adapter"),
    "lora_alpha": to("lora_alpha"),
    "target_modules": joint("lora_target"),
    "exclude_modules": refused("an adapter stands on what is named", "name the modules in target_modules"),
    "lora_adapter_path": refused("an adapter of before goes on in a pipeline here", "set adapter_start: continue in a YAML of ours"),
    "enable_gradient_checkpointing": to("gradient_checkpointing", flag),
    "trust_remote_code": to("trust_remote_code", flag),
    "custom_chat_template": refused("a template written into the command", "save it as a Jinja file and set chat_template: FILE in a YAML of ours"),
    "external_lib": refused("no module is imported beside the model", "take it out"),
    "hf_config_path": refused("the config is that of the model's folder", "write it into the config.json of a copy"),
    "tokenizer_path": to("tokenizer_name_or_path"),
    "override_config.attn_implementation": left(KERNELS),
    "override_config.*": refused("the model is what its folder says", "change the config.json of a copy"),
    **rows(refused("no further tokens are predicted while training", "set mtp.enable to false"), "mtp.enable", "mtp.enable_train"),
    "mtp.*": left("it is read with mtp.enable only"),
    **rows(left(MEMORY), "enable_activation_offload", "use_shm", "tiled_mlp.*"),
    **rows(left(PADDING), "use_remove_padding", "use_rmpad"),
    **rows(left(KERNELS), "use_liger", "use_fused_kernels", "fused_kernel_options.*"),
}  # fmt: skip

_ACTOR = "actor_rollout_ref.actor"
_ACTOR_ROWS: dict[str, KeyFate] = {
    **{f"{_ACTOR}.optim.{key}": row for key, row in _OPTIMIZER.items()},
    f"{_ACTOR}.ppo_mini_batch_size": joint("steps_per_generation"),
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": to("per_device_train_batch_size"),
    f"{_ACTOR}.ppo_micro_batch_size": changed("rows at once are counted for each process here (per_device_train_batch_size); how a step is split changes no number"),
    f"{_ACTOR}.clip_ratio": joint("epsilon"),
    f"{_ACTOR}.clip_ratio_low": to("epsilon", as_float),
    f"{_ACTOR}.clip_ratio_high": to("epsilon_high", as_float),
    f"{_ACTOR}.clip_ratio_c": joint("delta"),
    f"{_ACTOR}.policy_loss.loss_mode": joint("loss_type"),
    **{f"{_ACTOR}.policy_loss.{key}": joint(key) for key in ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef")},
    f"{_ACTOR}.policy_loss.*": left("it is read with a loss_mode that is refused"),
    f"{_ACTOR}.use_gpg_loss": refused("no such loss here", "set it to false"),
    f"{_ACTOR}.loss_agg_mode": joint("loss_type"),
    f"{_ACTOR}.entropy_coeff": joint("entropy_coef"),
    **_in(joint("beta"), _ACTOR, "use_kl_loss kl_loss_coef"),
    f"{_ACTOR}.kl_loss_type": joint("kl_estimator"),
    f"{_ACTOR}.ppo_epochs": to("num_iterations"),
    f"{_ACTOR}.shuffle": changed("prompts have the order in which they were sampled"),
    f"{_ACTOR}.tis_imp_ratio_cap": joint("importance_sampling_correction"),
    f"{_ACTOR}.grad_clip": to("max_grad_norm", as_float),
    **_in(joint("sharding"), _ACTOR, "ulysses_sequence_parallel_size fsdp_config.fsdp_size fsdp_config.reshard_after_forward"),
    **_in(changed(OFFLOAD), _ACTOR, "fsdp_config.param_offload fsdp_config.grad_offload fsdp_config.optimizer_offload fsdp_config.offload_policy"),
    f"{_ACTOR}.fsdp_config.*": left(PROCESSES),
    f"{_ACTOR}.router_replay.mode": joint("rollout"),
    **_in(left(MEMORY), _ACTOR, "use_dynamic_bsz ppo_max_token_len_per_gpu ppo_infer_max_token_len_per_gpu entropy_from_logits_with_chunking entropy_checkpointing"),
    **_in(left(KERNELS), _ACTOR, "use_torch_compile use_fused_kernels"),
    **_in(left(PADDING), _ACTOR, "use_remove_padding"),
    **_in(left(PROCESSES), _ACTOR, "strategy megatron.*"),
    **_in(left(SAVING), _ACTOR, "checkpoint.*"),
    **_in(left(OWN_LOOP), _ACTOR, "data_loader_seed rollout_n profiler.*"),
}  # fmt: skip

_ROLLOUT = "actor_rollout_ref.rollout"
_ROLLOUT_ROWS: dict[str, KeyFate] = {
    f"{_ROLLOUT}.temperature": to("temperature", as_float),
    f"{_ROLLOUT}.top_p": to("top_p", as_float),
    f"{_ROLLOUT}.top_k": to("top_k", lambda value: max(0, int(as_float(value)))),
    f"{_ROLLOUT}.n": to("num_generations"),
    f"{_ROLLOUT}.do_sample": refused("completions are sampled", "set it to true", (True,)),
    f"{_ROLLOUT}.response_length": to("max_completion_length"),
    f"{_ROLLOUT}.prompt_length": joint("sequence_len", "as long as data.max_prompt_length"),
    f"{_ROLLOUT}.ignore_eos": refused("a completion ends with its end-of-turn token", "set it to false"),
    f"{_ROLLOUT}.repetition_penalty": refused("sampling has no such penalty, and the loss would not know of it", "set 1.0", (1, 1.0)),
    f"{_ROLLOUT}.over_sample_rate": refused("no more is sampled than is trained on", "set 0"),
    f"{_ROLLOUT}.skip_rollout": refused("completions are always sampled", "set it to false"),
    f"{_ROLLOUT}.quantization": refused("the policy samples from its own weights", "take it out"),
    f"{_ROLLOUT}.multi_turn.enable": refused("its tools and interactions are classes of verl's", "write a YAML for posttrain grpo with tools or env (docs/environments.md)"),
    f"{_ROLLOUT}.multi_turn.*": left("it is read with multi_turn.enable only"),
    f"{_ROLLOUT}.agent.default_agent_loop": refused("its loops are classes of verl's", "write a YAML for posttrain grpo with tools or env", ("single_turn_agent",)),
    f"{_ROLLOUT}.agent.agent_loop_config_path": refused("its loops are classes of verl's", "write a YAML for posttrain grpo with tools or env"),
    f"{_ROLLOUT}.agent.*": left(_SAMPLER),
    f"{_ROLLOUT}.val_kwargs.*": left(_VALIDATION),
    f"{_ROLLOUT}.calculate_log_probs": left(TRACKING),
    **_in(left(_SAMPLER), _ROLLOUT,
          "name mode dtype gpu_memory_utilization enforce_eager cudagraph_capture_sizes free_cache_engine tensor_model_parallel_size data_parallel_size expert_parallel_size "
          "pipeline_model_parallel_size max_num_batched_tokens max_model_len max_num_seqs disable_log_stats multi_stage_wake_up update_weights_bucket_megabytes enable_chunked_prefill "
          "enable_prefix_caching load_format layered_summon skip_tokenizer_init scheduling_policy logprobs_mode skip_dump_dir engine_kwargs.* checkpoint_engine.* prometheus.* nnodes n_gpus_per_node"),
    **_in(left(MEMORY), _ROLLOUT, "log_prob_micro_batch_size log_prob_micro_batch_size_per_gpu log_prob_use_dynamic_bsz log_prob_max_token_len_per_gpu micro_batch_size"),
    **_in(left(TRACKING), _ROLLOUT, "trace.* profiler.*"),
    "actor_rollout_ref.ref.model": refused(_REFERENCE, "name the same model"),
    "actor_rollout_ref.ref.model.path": refused(_REFERENCE, "name the same model"),
    "actor_rollout_ref.ref.*": left(_REFERENCE),
    **rows(left(OWN_LOOP), "actor_rollout_ref.hybrid_engine", "actor_rollout_ref.nccl_timeout", "actor_rollout_ref.profiler.*"),
    **{f"actor_rollout_ref.model.{key}": row for key, row in _MODEL.items()},
}  # fmt: skip

_CORRECTION = refused(
    "a sampler's rounding is corrected by importance_sampling_correction here, and the embedded engine has none",
    "take it out, or set that key in a YAML of ours",
)
_ALGORITHM_ROWS: dict[str, KeyFate] = {
    "algorithm.adv_estimator": joint("advantage_estimator"),
    "algorithm.norm_adv_by_std_in_grpo": joint("scale_rewards"),
    "algorithm.gamma": to("gamma", as_float),
    "algorithm.lam": to("gae_lambda", as_float),
    "algorithm.use_kl_in_reward": joint("kl_in_reward"),
    "algorithm.kl_penalty": joint("kl_in_reward"),
    "algorithm.kl_ctrl.kl_coef": joint("beta"),
    "algorithm.kl_ctrl.type": joint("beta"),
    **rows(left("it is read with kl_ctrl.type adaptive only"), "algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"),
    "algorithm.use_pf_ppo": refused("samples are not drawn by their reward", "set it to false"),
    "algorithm.pf_ppo.*": left("it is read with use_pf_ppo only"),
    "algorithm.filter_groups.enable": refused("it counts generation batches in another way", "set dynamic_sampling: true in a YAML of ours"),
    "algorithm.filter_groups.*": left("it is read with filter_groups.enable only"),
    **rows(_CORRECTION, "algorithm.rollout_is", "algorithm.rollout_is_threshold", "algorithm.rollout_rs", "algorithm.rollout_correction.*"),
    **rows(left("it is read with rollout_is_threshold only"), "algorithm.rollout_is_threshold_lower", "algorithm.rollout_is_level", "algorithm.rollout_is_mode", "algorithm.rollout_is_veto_threshold"),
}  # fmt: skip

_CRITIC_ROWS: dict[str, KeyFate] = {
    "critic.optim.lr": to("critic_learning_rate", as_float),
    **_in(joint("critic_learning_rate", _SAME_CRITIC), "critic.optim", "lr_warmup_steps_ratio lr_warmup_steps warmup_style lr_scheduler_type min_lr_ratio weight_decay betas optimizer"),
    **_in(left("the policy's optimizer says it"), "critic.optim", "total_training_steps num_cycles optimizer_impl clip_grad"),
    "critic.model.path": joint("value_model"),
    "critic.model.lora_rank": refused("a critic is trained whole", "set 0"),
    **_in(left("a critic is trained whole"), "critic.model", "lora_alpha target_modules"),
    "critic.model.override_config.*": refused("the model is what its folder says", "change the config.json of a copy"),
    **_in(left(MEMORY), "critic.model", "tokenizer_path enable_gradient_checkpointing enable_activation_offload use_remove_padding use_rmpad use_shm external_lib trust_remote_code fsdp_config.*"),
    **_in(joint("critic_learning_rate", _SAME_CRITIC), "critic", "ppo_mini_batch_size ppo_epochs loss_agg_mode grad_clip"),
    "critic.cliprange_value": to("cliprange_value", as_float),
    **_in(left("there is a critic where advantages need one"), "critic", "enable"),
    **_in(left(MEMORY), "critic", "ppo_micro_batch_size ppo_micro_batch_size_per_gpu forward_micro_batch_size forward_micro_batch_size_per_gpu use_dynamic_bsz ppo_max_token_len_per_gpu forward_max_token_len_per_gpu"),
    **_in(left(PROCESSES), "critic", "strategy ulysses_sequence_parallel_size megatron.*"),
    **_in(left(OWN_LOOP), "critic", "rollout_n shuffle profiler.* checkpoint.*"),
}  # fmt: skip

_MANAGER = refused("it calls rewards in another way", "set naive", ("naive", "dapo"))
_REWARD_ROWS: dict[str, KeyFate] = {
    **{f"{place}custom_reward_function.{key}": joint("reward_kwargs" if "kwargs" in key else "reward_funcs", "a function of verl's signature is called as it stands")
       for place in ("", "reward.") for key in ("path", "name", "reward_kwargs.*")},
    **rows(joint("reward_funcs"), "reward_model.enable", "reward_model.model.path"),
    **rows(_MANAGER, "reward_model.reward_manager", "reward.reward_manager.name"),
    **_in(joint("soft_overlong_cache"), "reward_model", "overlong_buffer.enable overlong_buffer.len overlong_buffer.penalty_factor reward_kwargs.overlong_buffer_cfg.enable "
          "reward_kwargs.overlong_buffer_cfg.len reward_kwargs.overlong_buffer_cfg.penalty_factor"),
    **_in(left(TRACKING), "reward_model", "overlong_buffer.log reward_kwargs.overlong_buffer_cfg.log"),
    "reward_model.reward_kwargs.max_resp_len": left("it is data.max_response_length"),
    "reward_model.sandbox_fusion.url": refused("code is run in a sandbox of this machine", "name a reward function, or code_tests in a YAML of ours"),
    "reward_model.sandbox_fusion.*": left("it is read with sandbox_fusion.url only"),
    "reward_model.max_length": changed("a text that is longer than the reward model takes is unscored"),
    **_in(left("a reward model writes prompt and completion by its own tokenizer and template, and is loaded whole beside the policy"), "reward_model",
          "strategy model.input_tokenizer model.external_lib model.trust_remote_code model.use_shm model.use_remove_padding model.use_rmpad model.use_fused_kernels model.fsdp_config.* micro_batch_size "
          "micro_batch_size_per_gpu use_dynamic_bsz forward_max_token_len_per_gpu ulysses_sequence_parallel_size launch_reward_fn_async num_workers profiler.* enable_resource_pool n_gpus_per_node nnodes"),
}  # fmt: skip

_DATA_ROWS: dict[str, KeyFate] = {
    **_in(joint("datasets"), "data", "train_files prompt_key reward_fn_key response_key prompt_dict_keys response_dict_keys multiturn.enable multiturn.messages_key multiturn.tools_key messages_key tools_key "
          "train_max_samples max_samples"),
    **_in(joint("eval_datasets"), "data", "val_files"),
    **_in(left(_VALIDATION), "data", "val_batch_size val_max_samples validation_shuffle"),
    "data.train_batch_size": joint("num_prompts_per_step", "and in sft gradient_accumulation_steps"),
    "data.gen_batch_size": refused("as many prompts are sampled as are trained on", "take it out"),
    **_in(joint("sequence_len"), "data", "max_prompt_length max_response_length"),
    "data.max_length": to("sequence_len"),
    **_in(joint("overflow"), "data", "truncation filter_overlong_prompts"),
    **_in(joint("per_device_train_batch_size"), "data", "micro_batch_size_per_gpu"),
    "data.micro_batch_size": changed("rows at once are counted for each process here (per_device_train_batch_size); how a step is split changes no number"),
    "data.apply_chat_template_kwargs.*": joint("chat_template_kwargs"),
    "data.shuffle": to("train_sampling_strategy", shuffled),
    "data.seed": left("the order of rows follows from seed"),
    "data.tokenizer": to("tokenizer_name_or_path"),
    "data.chat_template": refused("a template written into the command", "save it as a Jinja file and set chat_template: FILE in a YAML of ours"),
    **rows(refused("rows are read by no class of another's", "write the rows to a file that docs/data-formats.md has"), "data.custom_cls.path", "data.datagen.path", "data.sampler.class_path"),
    **rows(left("it is read with a path only"), "data.custom_cls.name", "data.datagen.name", "data.sampler.class_name"),
    "data.tool_config_path": refused("its tools are classes of verl's", "write a YAML for posttrain grpo with tools (docs/environments.md)"),
    "data.enable_thinking_key": left("such a column is no part of a row here; chat_template_kwargs holds for all"),
    "data.ignore_input_ids_mismatch": left("a row that is not rendered exactly is an error here"),
    **_in(left(_MEDIA), "data", "image_key video_key return_multi_modal_inputs image_patch_size"),
    **_in(left(PADDING), "data", "pad_mode"),
    **_in(left(LOADING), "data", "use_shm return_raw_input_ids return_raw_chat return_full_prompt dataloader_num_workers num_workers filter_overlong_prompts_workers balance_dp_token need_tools_kwargs "
          "trust_remote_code use_dynamic_bsz max_token_len_per_gpu"),
}  # fmt: skip

_TRAINER_ROWS: dict[str, KeyFate] = {
    "trainer.total_epochs": to("num_train_epochs"),
    "trainer.total_training_steps": joint("max_steps", "in optimizer steps"),
    "trainer.save_freq": joint("save_steps", "in optimizer steps"),
    "trainer.test_freq": joint("eval_steps", "in optimizer steps"),
    "trainer.critic_warmup": joint("critic_warmup_steps", "in optimizer steps"),
    "trainer.logger": joint("report_to"),
    "trainer.seed": to("seed"),
    "trainer.default_local_dir": KeyFate("changed", "output_dir", "where only a shell or hydra knows it, a run is in runs/NAME", joint=True),
    **rows(to("save_total_limit"), "trainer.max_actor_ckpt_to_keep", "trainer.max_ckpt_to_keep"),
    "trainer.val_only": refused("nothing would be trained", "see posttrain eval"),
    "trainer.default_hdfs_dir": left(SAVING),
    **_in(left(SAVING), "trainer", "max_critic_ckpt_to_keep val_before_train del_local_ckpt_after_load esi_redundant_time remove_previous_ckpt_in_save"),
    **_in(left("a run that is started again goes on by itself"), "trainer", "resume_mode resume_from_path resume_path"),
    **_in(left(TRACKING), "trainer", "project_name experiment_name log_val_generations rollout_data_dir validation_data_dir profile_steps npu_profile.* worker_nsight_options.* controller_nsight_options.*"),
    **_in(left(PROCESSES), "trainer", "nnodes n_gpus_per_node balance_batch device ray_wait_register_center_timeout use_legacy_worker_impl"),
    **rows(left(PROCESSES), "ray_init.*", "ray_kwargs.*", "transfer_queue.*"),
    **rows(left(TRACKING), "global_profiler.*", "hydra.*"),
}  # fmt: skip

_SFT_ROWS: dict[str, KeyFate] = {
    **{f"optim.{key}": row for key, row in _OPTIMIZER.items()},
    "optim.warmup_steps_ratio": joint("warmup_ratio"),
    **{f"model.{key}": row for key, row in _MODEL.items()},
    "model.partial_pretrain": to("base_model"),
    **rows(changed(OFFLOAD), "model.fsdp_config.cpu_offload", "model.fsdp_config.offload_params"),
    **rows(left(PROCESSES), "model.fsdp_config.*", "model.strategy", "engine.*"),
    **rows(joint("sharding"), "ulysses_sequence_parallel_size", "engine.ulysses_sequence_parallel_size"),
    "use_remove_padding": left(PADDING),
    "checkpoint.*": left(SAVING),
}  # fmt: skip


_OWN_GROUPS = frozenset({
    "_self_", "ppo_trainer", "ppo_megatron_trainer", "sft_trainer", "sft_trainer_engine", "legacy_data", "rollout", "hf_model", "rollout_correction", "fsdp", "fsdp2", "megatron",
    *(f"{way}_{part}" for way in ("dp", "megatron") for part in ("actor", "ref", "critic", "reward_model", "reward_loop")),
})  # fmt: skip
"""Configurations that verl's trainers are put together from; what they say is its defaults."""


def _own_groups(value: Any) -> str:
    """Raises: ValueError for a group that is no default of verl's."""
    listed = value if isinstance(value, list) else [value]
    chosen = [name for entry in listed for name in (entry.values() if isinstance(entry, dict) else [entry])]
    if not all(isinstance(name, str) and name in _OWN_GROUPS for name in chosen):
        raise ValueError(value)
    return "its defaults are written out where they are not ours"


def _own_class(value: Any) -> str:
    """Raises: ValueError for a class of another's."""
    if not (isinstance(value, str) and value.startswith("verl.")):
        raise ValueError(value)
    return "the keys beside it say what it does"


VERL_ROWS: dict[str, KeyFate] = {
    SCRIPT: joint("loss_type"),
    "*._target_": noted(_own_class, "write what it does into a YAML of ours"),
    "defaults": noted(_own_groups, "import the configuration as hydra prints it (--cfg job)"),
    **_ACTOR_ROWS, **_ROLLOUT_ROWS, **_ALGORITHM_ROWS, **_CRITIC_ROWS, **_REWARD_ROWS, **_DATA_ROWS, **_TRAINER_ROWS, **_SFT_ROWS,
    **rows(left("it says which of its engines holds the model"), "engine", "optim", "model_engine", "actor@actor_rollout_ref.actor", "ref@actor_rollout_ref.ref", "critic@critic"),
}  # fmt: skip
