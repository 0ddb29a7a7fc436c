"""Axolotl's YAML: the fate of every key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.axolotl_data import read_datasets, read_template
from posttrain.config.importers.fates import (
    Draft,
    Kind,
    Refusal,
    Row,
    Tool,
    changed,
    flag,
    is_off,
    joint,
    left,
    number,
    refused,
    rows,
    to,
)
from posttrain.config.importers.values import (
    BF16,
    GENERATION,
    GRADIENT_CHECKPOINTING,
    HUB,
    KERNELS,
    LOADING,
    MEMORY,
    OPTIMIZERS,
    OVERFLOW,
    OWN_LOOP,
    PADDING,
    PROCESSES,
    SAVING,
    SCHEDULES,
    TRACKING,
    TRAINER,
    adapter_defaults,
    cadence,
    warmup,
)

_OTHER = "train with Axolotl"
_LORA = "take it out to train the adapter as PEFT starts it, or train with Axolotl"
_HARMLESS_PLUGINS = ("CutCrossEntropyPlugin", "LigerPlugin", "KernelsPlugin", "ExpertParallelPlugin", "SwanLabPlugin", "NemoGymTrackingPlugin",
                     "MegatronCorePlugin", "DenseMLPPlugin")  # fmt: skip
_QUANT = {"nf4": "nf4", "fp4": "fp4"}

ROWS: dict[str, Row] = {
    **TRAINER,
    **rows(left(KERNELS), "flash_attention", "sdp_attention", "xformers_attention", "flex_attention", "eager_attention", "sage_attention",
           "flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp", "flash_optimum", "attn_implementation",
           "flex_attn_compile_kwargs", "fused_attn_kernel", "gemma4_hybrid_attn_impl", "use_kernels", "use_scattermoe", "use_sonicmoe", "use_dsv4_kernels",
           "experts_implementation", "cut_cross_entropy", "cut_cross_entropy_impl", "chunked_cross_entropy", "chunked_cross_entropy_num_chunks",
           "liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm", "liger_glu_activation", "liger_cross_entropy", "liger_swiglu",
           "liger_fused_linear_cross_entropy", "liger_use_token_scaling", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel",
           "unsloth_cross_entropy_loss", "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o", "unsloth_rms_norm", "unsloth_rope",
           "tiled_mlp", "tiled_mlp_num_shards", "tiled_mlp_use_original_mlp", "llama4_linearized_experts", "scaling_softmax_kernel", "batch_flattening",
           "kernels_auto_fix", "mamba_kernel"),
    **rows(left(PROCESSES), "ddp", "device_map", "device", "world_size", "fsdp_final_state_dict_type", "dp_shard_size", "dp_replicate_size",
           "tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "expert_parallel_size", "expert_parallel_backend",
           "heads_k_stride", "ring_attn_func", "use_ray", "ray_run_name", "ray_num_workers", "resources_per_worker", "torchdistx_path",
           "qlora_sharded_model_loading", "experimental_skip_move_to_device", "lora_on_cpu", "single_gpu_mode"),
    **rows(left(MEMORY), "max_memory", "gpu_memory_limit", "gc_steps", "gc_collect_steps", "embeddings_skip_upcast", "torch_compile", "layer_offloading",
           "low_cpu_mem_usage", "bfloat16", "float32", "relora_cpu_offload", "expert_quant_backend", "pytorch_cuda_alloc_conf"),
    **rows(left(LOADING), "dataset_prepared_path", "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory", "skip_prepare_dataset", "num_dataset_shards_to_save",
           "dataset_shard_num", "preprocess_iterable", "is_preprocess", "total_num_tokens", "total_supervised_tokens", "axolotl_config_path", "dataset_exact_sharding",
           "streaming_multipack_buffer_size", "pretrain_multipack_buffer_size", "sample_packing_eff_est", "sample_packing_group_size", "sample_packing_mp_start_method",
           "max_packed_sequence_len", "sample_packing_seq_len_multiplier", "eval_sample_packing", "pretrain_multipack_attn"),
    **rows(left(PADDING), "pad_to_sequence_len", "shrink_embeddings", "pad_to_multiple_of"),
    **rows(left(SAVING), "strict", "auto_resume_from_checkpoints", "save_first_step", "dynamic_checkpoint", "merge_lora", "merge_method", "tokenizer_save_jinja_files",
           "gradio_title", "gradio_share", "gradio_server_name", "gradio_server_port", "gradio_max_new_tokens", "gradio_temperature", "profiler_steps",
           "profiler_steps_start", "debug_text_only", "debug_num_examples", "debug"),
    **rows(left(TRACKING), "wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "wandb_watch", "wandb_log_model", "wandb_mode", "wandb_run_group", "use_wandb",
           "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name", "mlflow_run_id", "hf_mlflow_log_artifacts", "use_mlflow", "comet_api_key", "comet_workspace",
           "comet_project_name", "comet_experiment_key", "comet_mode", "comet_online", "comet_experiment_config", "use_comet", "use_tensorboard", "use_swanlab",
           "swanlab_project", "swanlab_experiment_name", "swanlab_mode", "swanlab_workspace", "use_trackio", "trackio_project_name", "trackio_run_name", "trackio_space_id",
           "use_otel_metrics", "otel_metrics_host", "otel_metrics_port", "include_tkps", "loss_watchdog_callback", "logging_first_step"),
    **rows(left(GENERATION), "eval_table_size", "eval_max_new_tokens", "eval_batch_size", "do_causal_lm_eval", "eval_causal_lm_metrics", "do_bench_eval", "bench_dataset",
           "bench_split", "bench_source_max_len", "generate_samples", "num_generation_samples", "default_system_message_eval"),
    **rows(left("it is read from the model"), "model_type", "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy", "is_falcon_derived_model", "is_llama_derived_model",
           "is_mistral_derived_model", "is_qwen_derived_model", "base_model_ignore_patterns", "cls_model_config", "is_multimodal", "type_of_model"),
    "tokenizer_use_mistral_common": changed("the tokenizer of the model's folder is used; `posttrain data` shows the rows as it renders them"),
    "base_model": to("base_model"),
    "base_model_config": joint("base_model"),
    "tokenizer_config": joint("base_model"),
    "revision_of_model": to("revision"),
    "sequence_len": to("sequence_len"),
    "excess_length_strategy": to("overflow", OVERFLOW),
    "sample_packing": to("packing", flag),
    "sample_packing_bin_size": changed("packing looks at the whole epoch's order (packing_window) and splits no row"),
    "sample_packing_sequentially": refused("rows are packed best-fit here", "take it out"),
    "curriculum_sampling": refused("rows come in a shuffled order here", "take it out"),
    "shuffle_merged_datasets": joint("datasets", "rows are always shuffled here"),
    "shuffle_before_merging_datasets": left("rows are shuffled once more when they are taken, so this shuffle is not seen"),
    "dataset_exact_deduplication": refused("rows are not dropped without a word here", "run `posttrain data CONFIG --write-clean DIR` and train on what it writes"),
    "min_sample_len": refused("short rows are not dropped here", "filter the data once", (0, 1, 2)),
    "max_prompt_len": left("it is about their RL trainer's prompts; sequence_len limits the prompt with its answer here"),
    "datasets": joint("datasets"),
    "test_datasets": joint("eval_datasets"),
    "val_set_size": to("val_size"),
    "pretraining_dataset": refused("streaming pre-training is not done here", "write the text as JSONL and train it with type: text"),
    "streaming": refused("rows are not streamed here", "take it out: the rows are read whole"),
    "dataset_shard_idx": refused("a shard of a dataset is not taken", "write the rows that you want to a file"),
    "micro_batch_size": to("per_device_train_batch_size"),
    "batch_size": joint("gradient_accumulation_steps"),
    "num_epochs": to("num_train_epochs"),
    "optimizer": to("optim", OPTIMIZERS, todo="set optim: adamw or adamw_8bit"),
    "lr_scheduler": to("lr_scheduler_type", SCHEDULES, todo="set lr_scheduler_type: cosine, linear, constant or wsd"),
    "cosine_min_lr_ratio": to("min_lr_ratio"),
    "cosine_constant_lr_ratio": refused("the cosine runs to the last step here", "take it out, or set lr_scheduler_type: wsd"),
    "lr_quadratic_warmup": refused("warmup is linear here", "take it out"),
    "eta_min": joint("min_lr_ratio", "only schedules of its optimizers read it"),
    "lr_groups": refused("all weights have one learning rate here", "take it out"),
    "lr_div_factor": refused("there is no one-cycle schedule here", "set lr_scheduler_type: cosine"),
    "embedding_lr": refused("all weights have one learning rate here", "take it out"),
    "embedding_lr_scale": refused("all weights have one learning rate here", "take it out"),
    "jagged_restart_steps": refused("the schedule has no restarts here", "take it out"),
    **rows(left("it shapes restarts that jagged_restart_steps asks for"), "jagged_restart_warmup_steps", "jagged_restart_anneal_steps", "jagged_restarts_warmup_steps"),
    "adam_eps": joint("adam_epsilon"),
    "adam_beta3": refused("AdamW has two betas", "take it out"),
    "adam_epsilon2": refused("AdamW has one epsilon", "take it out"),
    "warmup_steps": joint("warmup_steps"),
    "train_on_inputs": joint("train_on"),
    "roles_to_train": joint("train_on"),
    "train_on_eos": joint("train_on"),
    "bf16": to("bf16", BF16),
    "float16": changed("there is no float16 training here: bf16: auto takes bfloat16 where the machine has it, and float32 elsewhere"),
    "gradient_checkpointing": to("gradient_checkpointing", GRADIENT_CHECKPOINTING),
    "adapter": to("adapter", {"lora": "lora", "qlora": "qlora", "none": "none", "": "none"}, todo="set adapter: lora or qlora, or leave it out"),
    "load_in_4bit": to("load_in_4bit", flag),
    "load_in_8bit": changed("the frozen base stays in 16 bits, which 8 bits approximate; it takes twice the memory (adapter: qlora takes a half)"),
    "lora_model_dir": refused("a stage does not start from an adapter", "merge it first (`posttrain merge`) and name the merged folder as base_model"),
    "lora_r": to("lora_r"),
    "lora_alpha": to("lora_alpha"),
    "lora_dropout": to("lora_dropout"),
    "lora_target_modules": joint("lora_target"),
    "lora_target_linear": joint("lora_target"),
    "lora_target_parameters": refused("an adapter on single parameters (fused experts) is not made here", "name modules in lora_target_modules"),
    "lora_modules_to_save": to("lora_modules_to_save"),
    "lora_fan_in_fan_out": left("PEFT finds the layout of a layer by itself"),
    "peft_use_rslora": to("use_rslora", flag),
    "peft_use_dora": to("use_dora", flag),
    "peft_init_lora_weights": to("init_lora_weights"),
    "lora_rank_pattern": to("rank_pattern"),
    "lora_alpha_pattern": to("alpha_pattern"),
    "peft": refused("PEFT's nested options are not passed on", _LORA),
    **rows(refused("not every layer gets an adapter there, and lora_target names modules in all of them", "write lora_target_modules as a regular expression with the layers in it"),
           "peft_layers_to_transform", "peft_layers_pattern"),
    "peft_layer_replication": refused("layers are not repeated here", _LORA),
    "peft_trainable_token_indices": refused("single rows of the embedding are not trained", "set added_tokens or lora_modules_to_save"),
    "peft_ensure_weight_tying": left("tied weights stay tied here"),
    "peft_autocast_adapter_dtype": left("what is trained has float32 masters here"),
    "bnb_config_kwargs": joint("bnb_4bit_use_double_quant"),
    "loraplus_lr_ratio": refused("both matrices of the adapter have one learning rate here (no LoRA+)", "take it out"),
    "loraplus_lr_embedding": left("it is read with loraplus_lr_ratio only"),
    "quantize_moe_experts": changed("fused experts stay in 16 bits, which 4 bits approximate; they take more memory"),
    **rows(refused("its base is quantised in another way than bitsandbytes' 4 bits", "name the unquantised base_model, with adapter: qlora"), "gptq", "awq", "fp8", "qat",
           "quantization", "dsv4_fp4_grouped_mode", "nvfp4", "fp8_enable_fsdp_float8_all_gather"),
    **rows(left("it is read with gptq only"), "gptq_groupsize", "gptq_model_v1", "gptq_bits", "gptq_disable_exllama"),
    "model_quantization_config": refused("weights that are stored quantised are not unpacked here", "name a base_model whose weights are stored in 16 bits"),
    "model_quantization_config_kwargs": left("it is read with model_quantization_config only"),
    "relora": refused("ReLoRA merges the adapter while it trains, which is not done here", "take it out"),
    "relora_steps": refused("ReLoRA merges the adapter while it trains, which is not done here", "take it out"),
    **rows(left("it is read with relora only"), "relora_prune_ratio", "relora_prune_method", "relora_warmup_steps", "relora_anneal_steps"),
    "unfrozen_parameters": refused("parameters are not frozen by name here, so all would be trained", "take it out to train all, or use adapter: lora with lora_target"),
    **rows(refused("layers are not frozen by turns (LISA) here", "use adapter: lora"), "lisa_n_layers", "lisa_step_interval", "lisa_layers_attr"),
    "spectrum_top_fraction": refused("parameters are not frozen by name here", "use adapter: lora"),
    "spectrum_model_name": left("it is read with spectrum_top_fraction only"),
    "llama_pro": refused("layers are not added to a model here", _OTHER),
    "reinit_weights": refused("training starts from the weights of base_model", _OTHER),
    "model_config": joint("base_model", todo="write it into the config.json of a copy of the model"),
    "overrides_of_model_config": refused("the model's config is taken as it is", "write it into the config.json of a copy of the model"),
    "overrides_of_model_kwargs": refused("the model is loaded in one way here", "take it out"),
    **rows(refused("positions are not stretched (PoSE) here", "take it out"), "use_pose", "pose_max_context_len"),
    **rows(left("it is read with use_pose only"), "pose_split_on_token_ids", "pose_num_chunks"),
    "s2_attention": refused("shifted sparse attention gives other numbers than attention does", "take it out"),
    "noisy_embedding_alpha": refused("noise on the embeddings (NEFTune) is not added here", "take it out"),
    "fix_untrained_tokens": refused("rows of the embedding are not set anew", "set added_tokens, which gives missing rows the mean of the others"),
    "mean_resizing_embeddings": left("added rows always start as the mean of those there are"),
    "resize_token_embeddings_to_32x": changed("no rows are added for speed; only added_tokens get rows"),
    "added_tokens_overrides": refused("tokens of the tokenizer are not renamed", "set added_tokens"),
    "special_tokens": joint("special_tokens"),
    "tokens": to("added_tokens"),
    "eot_tokens": left("a turn is trained through the end-of-turn token that the chat template writes"),
    "chat_template": joint("chat_template"),
    "chat_template_jinja": joint("chat_template"),
    "chat_template_kwargs": to("chat_template_kwargs"),
    "default_system_message": refused("no system message is added to rows", "write it into the rows"),
    "loss_watchdog_threshold": changed("the health rules watch the loss here (docs/failure-modes.md)"),
    "loss_watchdog_patience": left("it is read with loss_watchdog_threshold only"),
    "processor_type": refused("images, audio and video are not trained here", "name a text-only model and data"),
    **rows(left("it is about images"), "image_size", "image_resize_algorithm"),
    "plugins": joint("datasets"),
    **rows(refused("another objective than cross-entropy, preferences or rewards", _OTHER), "diffusion", "ebft", "kd_trainer", "gdpo", "center_rewards_coefficient", "use_dynamic_finetuning"),
    **rows(left("it is read with kd_trainer only"), "kd_ce_alpha", "kd_alpha", "kd_temperature", "kd_beta", "kd_zscore_base_temp", "kd_top_k_before_softmax", "kd_normalize_topk"),
    "num_labels": refused("classification and reward models are not trained here", _OTHER),
    "reward_model": refused("reward models are not trained here", _OTHER),
    "process_reward_model": refused("reward models are not trained here", _OTHER),
    "rl": joint("loss_type"),
    "trl": joint("reward_funcs"),
    "vllm": left("rollouts use the embedded engine, which samples from the policy's own weights"),
    "rl_beta": to("beta"),
    "dpo_beta": to("beta"),
    "dpo_label_smoothing": to("label_smoothing"),
    "dpo_loss_type": joint("loss_type"),
    "dpo_norm_loss": refused("this loss is not divided by length here", "set loss_type: sigmoid_norm"),
    "dpo_use_weighting": refused("pairs have one weight here", "take it out"),
    "dpo_use_logits_to_keep": left(MEMORY),
    "dpo_padding_free": left(PADDING),
    "precompute_ref_log_probs": to("precompute_ref_log_probs", flag),
    "orpo_alpha": to("beta"),
    "rpo_alpha": to("rpo_alpha"),
    "simpo_gamma": to("simpo_gamma"),
    "cpo_alpha": to("cpo_alpha"),
    "kto_desirable_weight": to("desirable_weight"),
    "kto_undesirable_weight": to("undesirable_weight"),
    **rows(left(HUB), "hub_model_id", "hub_strategy", "hub_revision", "hf_use_auth_token", "push_dataset_to_hub"),
    **rows(left(OWN_LOOP), "capabilities", "env_capabilities", "use_eager_scheduling", "remove_unused_columns", "trainer_cls"),
    "save_steps": joint("save_steps"),
    "saves_per_epoch": joint("save_steps"),
    "save_strategy": joint("save_steps"),
    "eval_steps": joint("eval_steps"),
    "evals_per_epoch": joint("eval_steps"),
    "eval_strategy": joint("eval_steps"),
    "evaluation_strategy": joint("eval_steps"),
}  # fmt: skip

_PREFERENCES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
_DPO_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "apo_zero", "apo_down", "discopop", "sigmoid_norm")  # fmt: skip


def stage(source: Mapping[str, Any]) -> Kind | Refusal:
    rl = source.get("rl")
    if source.get("reward_model") or source.get("process_reward_model"):
        key = "reward_model" if source.get("reward_model") else "process_reward_model"
        return Refusal(key, "true: reward models are not trained here", _OTHER)
    if is_off(rl):
        return "sft"
    if rl in _PREFERENCES:
        return "dpo"
    if rl == "grpo":
        return "grpo"
    return Refusal("rl", f"{rl}: no such method here", "set rl: dpo, ipo, kto, orpo, simpo or grpo, or " + _OTHER)


def finish(draft: Draft) -> None:
    _method(draft)
    read_datasets(draft)
    read_template(draft)
    warmup(draft)
    _batch(draft)
    _adapter(draft)
    _model(draft)
    _training(draft)
    best = draft.asks("load_best_model_at_end")
    cadence(draft, "save", "save_steps", best)
    cadence(draft, "eval", "eval_steps", best)


def _method(draft: Draft) -> None:
    rl, source = draft.source.get("rl"), draft.source
    if draft.kind == "dpo":
        loss = _PREFERENCES[str(rl)]
        asked = source.get("dpo_loss_type")
        if asked is not None and rl == "dpo":
            loss = asked[0] if isinstance(asked, list) and len(asked) == 1 else asked
        if isinstance(loss, str) and loss in (*_DPO_LOSSES, *_PREFERENCES.values()):
            draft.put("loss_type", loss, "rl")
        else:
            draft.refuse("dpo_loss_type", f"{loss} has no counterpart here", "set one of " + ", ".join(_DPO_LOSSES))
    elif "rl" in source and is_off(rl):
        draft.leave("rl", "it is supervised fine-tuning")
    if draft.kind == "grpo":
        _grpo(draft)
    elif "trl" in source:
        draft.leave("trl", f"it plays no part in {draft.kind}")


_GRPO: dict[str, Any] = {
    "beta": "beta", "num_generations": "num_generations", "max_completion_length": "max_completion_length", "temperature": "temperature",
    "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "epsilon": "epsilon", "epsilon_high": "epsilon_high", "delta": "delta", "loss_type": "loss_type",
    "num_iterations": "num_iterations", "reward_weights": "reward_weights", "mask_truncated_completions": "mask_truncated_completions",
    "importance_sampling_level": "importance_sampling_level",
}  # fmt: skip
_GRPO_LEFT = ("use_vllm", "log_completions", "use_liger_loss", "ref_model_mixup_alpha", "ref_model_sync_steps", "num_completions_to_print", "generation_batch_size_hint",
              "rollout_func")  # fmt: skip


def _grpo(draft: Draft) -> None:
    trl = draft.source.get("trl") or {}
    funcs = trl.get("reward_funcs")
    if not funcs:
        draft.refuse("trl.reward_funcs", "missing: RL needs a reward", "name reward functions, as file.py:function")
    else:
        files = [_reward(str(name)) for name in funcs]
        draft.put("reward_funcs", files, "trl.reward_funcs", "module.function there, file.py:function here")
    for key, value in trl.items():
        if value is None or key in ("reward_funcs",):
            continue
        if key in _GRPO:
            draft.put(_GRPO[key], value, f"trl.{key}")
        elif key == "scale_rewards":
            draft.put("scale_rewards", {True: "group", False: "none"}.get(value, value), f"trl.{key}")
        elif key in _GRPO_LEFT or key.startswith("vllm_"):
            draft.leave(
                f"trl.{key}", "it says where completions are sampled or logged; the embedded engine samples here"
            )
        elif not is_off(value):
            draft.refuse(f"trl.{key}", f"{value}: it has no counterpart here", "take it out")
    draft.assume("loss_type", "bnpo")
    draft.assume("beta", 0.0)


def _reward(name: str) -> str:
    module, _, function = name.rpartition(".")
    return f"{module.replace('.', '/')}.py:{function}" if module else name


def _batch(draft: Draft) -> None:
    total = draft.source.get("batch_size")
    if not total:
        return
    micro = draft.source.get("micro_batch_size", 1)
    if "gradient_accumulation_steps" in draft.source:
        draft.leave("batch_size", "micro_batch_size and gradient_accumulation_steps say it")
    elif total % micro:
        draft.refuse(
            "batch_size", f"{total} is no multiple of micro_batch_size {micro}", "set gradient_accumulation_steps"
        )
    else:
        draft.put("gradient_accumulation_steps", total // micro, "batch_size", "batch_size / micro_batch_size")


def _adapter(draft: Draft) -> None:
    modules, linear = draft.source.get("lora_target_modules"), draft.source.get("lora_target_linear")
    if draft.keys.get("adapter", "none") == "none":
        for key in ("lora_target_modules", "lora_target_linear", "bnb_config_kwargs"):
            if key in draft.source:
                draft.leave(key, "there is no adapter")
        return
    if linear:
        draft.put("lora_target", "all-linear", "lora_target_linear")
        if modules:
            draft.change("lora_target_modules", "lora_target_linear takes every linear layer, these among them")
    elif modules:
        text = (
            modules[0] if isinstance(modules, list) and len(modules) == 1 and not modules[0].isidentifier() else modules
        )
        draft.put("lora_target", "all-linear" if text in ("all-linear", "all_linear") else text, "lora_target_modules")
        if "lora_target_linear" in draft.source:
            draft.leave("lora_target_linear", "false: the modules are named")
    elif "lora_target_parameters" not in draft.source:
        draft.refuse(
            "lora_target_modules",
            "missing: PEFT then takes modules that depend on the family",
            "set lora_target_linear: true or name them",
        )
    for key, value in (draft.source.get("bnb_config_kwargs") or {}).items():
        if key in ("bnb_4bit_use_double_quant", "bnb_4bit_quant_type"):
            draft.put(key, value, f"bnb_config_kwargs.{key}")
        elif key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            draft.leave(f"bnb_config_kwargs.{key}", "bf16 says in which type is computed")
        elif not is_off(value):
            draft.refuse(f"bnb_config_kwargs.{key}", f"{value}: it has no counterpart here", "take it out")


def _model(draft: Draft) -> None:
    for key in ("tokenizer_config", "base_model_config"):
        other = draft.source.get(key)
        if other is None:
            continue
        if other == draft.source.get("base_model"):
            draft.leave(key, "it is the model's own")
        else:
            draft.refuse(key, f"{other}: config and tokenizer are those of base_model", "put both into one folder")
    config = draft.source.get("model_config")
    if config == {"output_router_logits": True}:
        draft.leave("model_config", "the routers' balancing loss of a mixture of experts is always trained here")
    elif config:
        draft.refuse("model_config", "the model's config is taken as it is", "write it into the config.json of a copy")
    tokens = draft.source.get("special_tokens") or {}
    kept = {name: token for name, token in tokens.items() if token and name in ("bos_token", "eos_token", "unk_token")}
    if tokens.get("pad_token"):
        draft.leave("special_tokens.pad_token", "nothing is padded here")
    if tokens.get("additional_special_tokens"):
        draft.put("added_tokens", tokens["additional_special_tokens"], "special_tokens.additional_special_tokens")
    if kept:
        draft.put("special_tokens", kept, "special_tokens")
    elif "special_tokens" in draft.source and not tokens:
        draft.leave("special_tokens", "it is empty")
    for name in draft.source.get("plugins") or []:
        if str(name).rpartition(".")[2] in _HARMLESS_PLUGINS:
            draft.leave(f"plugins {name}", "it makes the same numbers faster or in less memory")
        else:
            draft.refuse("plugins", f"{name}: what it does to training is not known here", "take it out, or " + _OTHER)


def _training(draft: Draft) -> None:
    if "shuffle_merged_datasets" in draft.source:
        if draft.source["shuffle_merged_datasets"]:
            draft.leave("shuffle_merged_datasets", "rows are always shuffled here")
        else:
            draft.refuse("shuffle_merged_datasets", "false: rows are always shuffled here", "take it out")
    if "eta_min" in draft.source:
        floor, peak = number(draft.source["eta_min"]), draft.keys.get("learning_rate")
        if draft.source.get("optimizer") in OPTIMIZERS:
            draft.leave("eta_min", "Axolotl's cosine does not read it")
        elif peak:
            draft.put("min_lr_ratio", floor / number(peak), "eta_min")
    if "adam_eps" in draft.source:
        draft.leave("adam_eps", "Axolotl reads adam_epsilon, and ignores this name")


def defaults(draft: Draft) -> Mapping[str, Any]:
    """What Axolotl does where its file is silent."""
    filled: dict[str, Any] = {"per_device_train_batch_size": 1, **adapter_defaults(draft, 8, 8)}
    if not {"warmup_steps", "warmup_ratio"} & set(draft.keys):
        filled["warmup_ratio"] = 0.03
    if draft.kind == "sft":
        filled["lr_scheduler_type"] = "cosine"
    if draft.kind == "dpo":
        filled |= {"lr_scheduler_type": "cosine", "beta": 0.1, "loss_type": "sigmoid"}
    if draft.kind == "grpo":
        filled["lr_scheduler_type"] = "cosine"
    return filled


AXOLOTL = Tool(
    "Axolotl", ROWS, stage, finish,
    frozenset({"micro_batch_size", "sample_packing", "val_set_size", "num_epochs", "lora_target_linear", "dataset_prepared_path", "evals_per_epoch",
               "saves_per_epoch", "wandb_watch", "flash_attention", "lora_model_dir", "pad_to_sequence_len", "train_on_inputs"}),
    defaults,
)  # fmt: skip
