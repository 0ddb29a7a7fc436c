"""LLaMA-Factory's YAML: the fate of every key. Data names are looked up in `dataset_info.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import (
    ImportDraft,
    KeyFate,
    Kind,
    Refusal,
    Tool,
    changed,
    flag,
    joint,
    left,
    names,
    refused,
    rows,
    to,
)
from posttrain.config.importers.llamafactory_data import has_tools, read_datasets
from posttrain.config.importers.sharded import SPLIT, tokens_over
from posttrain.config.importers.templates import named_template
from posttrain.config.importers.values import (
    GENERATION,
    KERNELS,
    LOADING,
    MEMORY,
    PADDING,
    PROCESSES,
    SAVING,
    TRACKING,
    TRAINER,
    adapter_defaults,
    best_model,
    cadence,
    compiling,
    drawn_by_seed,
    eight_bits,
    schedule,
    sft_losses,
    sft_only,
    start_from_adapter,
    streaming,
    unshuffled,
    warmup,
)

_OTHER = "train with LLaMA-Factory"
_WEIGHTS = "take it out to train all weights, or set finetuning_type: lora"
_OPTIMIZER = "take it out to train with AdamW, or " + _OTHER
_IMAGES = "it is about images, video and audio, and rows are text here"

ROWS: dict[str, KeyFate] = {
    **TRAINER,
    **rows(left(TRACKING), "plot_loss", "use_swanlab", "swanlab_project", "swanlab_workspace", "swanlab_run_name", "swanlab_mode", "swanlab_api_key", "swanlab_logdir",
           "swanlab_lark_webhook_url", "swanlab_lark_secret", "include_effective_tokens_per_second", "print_param_status", "wandb_project", "trackio_project"),
    **rows(left(LOADING), "overwrite_cache", "tokenized_path", "cache_dir", "preprocessing_batch_size", "media_dir", "data_shared_file_system"),
    **rows(left(KERNELS), "flash_attn", "enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "use_v1_kernels", "use_kernels", "use_kv_cache", "fused_linear_cross_entropy"),
    **rows(left(MEMORY), "low_cpu_mem_usage", "use_reentrant_gc", "upcast_layernorm", "upcast_lmhead_output", "offload_folder", "use_kt", "kt_config", "kt_cpu_activation",
           "kt_mode", "kt_optimize_rule", "kt_maxlen", "kt_use_cuda_graph", "kt_force_think", "cpu_infer", "chunk_size", "mode"),
    **rows(left(PROCESSES), "ray_num_workers", "use_mca", "master_addr", "master_port"),
    "sequence_parallel_size": to("sharding", tokens_over, SPLIT, "give the number of processes that share a sequence"),
    "sequence_parallel_mode": left(SPLIT),
    **rows(left(GENERATION), "eval_num_beams", "predict_with_generate", "compute_accuracy", "do_sample", "temperature", "top_p", "top_k", "num_beams",
           "max_length", "max_new_tokens", "repetition_penalty", "length_penalty", "skip_special_tokens", "infer_backend", "infer_dtype", "vllm_maxlen", "vllm_gpu_util",
           "vllm_enforce_eager", "vllm_max_lora_rank", "vllm_config", "sglang_maxlen", "sglang_mem_fraction", "sglang_tp_size", "sglang_config", "sglang_lora_backend",
           "per_device_eval_batch_size", "generation_max_length", "generation_num_beams", "generation_config", "task", "task_dir", "lang", "n_shot", "save_dir"),
    **rows(left(_IMAGES), "image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches", "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen",
           "use_audio_in_video", "audio_sampling_rate", "freeze_vision_tower", "freeze_multi_modal_projector"),
    **rows(left(SAVING), "export_dir", "export_size", "export_device", "export_quantization_bit", "export_quantization_dataset", "export_quantization_nsamples",
           "export_quantization_maxlen", "export_legacy_format", "export_hub_model_id", "ms_hub_token", "om_hub_token", "pissa_convert"),
    **rows(left("the tokenizer of the model's folder is used"), "use_fast_tokenizer"),
    "ignore_pad_token_for_loss": left(PADDING),
    "sortish_sampler": left("LLaMA-Factory's trainer draws its rows by another sampler, which does not read it"),
    "model_name_or_path": to("base_model"),
    "model_revision": to("revision"),
    "adapter_name_or_path": joint("adapter_name_or_path", "its own rank, alpha and modules count there too"),
    **rows(joint("adapter_name_or_path", "with adapter_name_or_path"), "adapter_folder", "create_new_adapter"),
    "stage": joint("loss_type"),
    "finetuning_type": joint("adapter"),
    "template": joint("chat_template"),
    "dataset": joint("datasets"),
    "eval_dataset": joint("eval_datasets"),
    "eval_on_each_dataset": joint("eval_datasets", "true: each is a set of its own (eval_name)"),
    "dataset_dir": joint("datasets"),
    "max_samples": joint("datasets"),
    "mix_strategy": joint("datasets"),
    "interleave_probs": joint("datasets"),
    "cutoff_len": to("sequence_len"),
    "val_size": to("val_size"),
    "streaming": joint("streaming"),
    "buffer_size": joint("buffer_size", "with streaming"),
    "packing": joint("packing"),
    "neat_packing": joint("packing"),
    "train_on_prompt": joint("train_on"),
    "mask_history": joint("train_on"),
    "tool_format": refused("tools are written by the chat template", "take it out if the template writes them as you wish"),
    "default_system": joint("datasets"),
    "enable_thinking": joint("chat_template"),
    "preserve_thinking": refused("the chat template decides which thinking is kept", "take it out"),
    "disable_shuffling": to("train_sampling_strategy", unshuffled),
    "lora_rank": to("lora_r"),
    "lora_alpha": to("lora_alpha"),
    "lora_dropout": to("lora_dropout"),
    "lora_target": joint("lora_target"),
    "additional_target": to("lora_modules_to_save", names),
    "use_rslora": to("use_rslora", flag),
    "use_dora": to("use_dora", flag),
    "pissa_init": joint("init_lora_weights"),
    "pissa_iter": joint("init_lora_weights"),
    "loraplus_lr_ratio": to("loraplus_lr_ratio"),
    "loraplus_lr_embedding": left("only adapters on embeddings have it, and those get none here"),
    "quantization_bit": joint("adapter"),
    "quantization_method": refused("only bitsandbytes quantises here", "set bnb", ("bnb", "bitsandbytes")),
    "quantization_type": to("bnb_4bit_quant_type"),
    "double_quantization": to("bnb_4bit_use_double_quant", flag),
    "quantization_device_map": left(MEMORY),
    **rows(refused("training in 8-bit floats gives other numbers", "take it out to train in bfloat16"), "fp8"),
    **rows(left("it is read with fp8 only"), "fp8_backend", "fp8_enable_fsdp_float8_all_gather"),
    "pure_bf16": changed("what is trained keeps float32 masters, and computes in bfloat16"),
    "bf16": to("bf16", flag),
    "disable_gradient_checkpointing": joint("gradient_checkpointing"),
    "gradient_checkpointing": joint("gradient_checkpointing"),
    "learning_rate": TRAINER["learning_rate"],
    "freeze_language_model": refused("parameters are not frozen by name here", _WEIGHTS),
    "freeze_trainable_layers": joint("unfrozen_layers", "with finetuning_type: freeze"),
    "freeze_trainable_modules": joint("unfrozen_layer_modules", "with finetuning_type: freeze"),
    "freeze_extra_modules": joint("unfrozen_parameters", "with finetuning_type: freeze"),
    **rows(left("it is read with finetuning_type: oft only"), "oft_rank", "oft_block_size", "oft_target", "module_dropout"),
    "use_llama_pro": joint("unfrozen_layers_spread", "with finetuning_type: freeze, on a model that has its added layers already"),
    "mixture_of_depths": refused("a model's architecture is not changed here", "take it out"),
    "shift_attn": refused("shifted sparse attention gives other numbers than attention does", "take it out"),
    "rope_scaling": refused("positions are encoded as the model's config says", "write it into the config.json of a copy of the model"),
    "moe_aux_loss_coef": refused("the routers' loss has the weight that the model's config gives it", "set router_aux_loss_coef in the config.json of a copy"),
    "train_from_scratch": joint("init_seed", "with seed, or 42"),
    "resize_vocab": changed("only tokens that are added get rows"),
    "split_special_tokens": refused("special tokens in texts are not taken apart", "take it out"),
    "add_tokens": to("added_tokens", names),
    "add_special_tokens": to("added_tokens", names),
    "new_special_tokens_config": refused("added tokens start as the mean of the others", "set add_tokens"),
    "init_special_tokens": changed("added tokens start as the mean of the others", ("noise_init",)),
    "kt_weight_path": refused("weights that are stored in another form are not read", "name a base_model in 16 bits"),
    "kt_non_expert_weight_path": refused("weights that are stored in another form are not read", "name a base_model in 16 bits"),
    **rows(refused("there is no such optimizer here", _OPTIMIZER), "use_galore", "use_apollo", "use_badam", "use_adam_mini"),
    "neftune_alpha": joint("neftune_noise_alpha"),
    "use_muon": to("optim", {True: "muon", False: "adamw"}),
    **rows(left("it is read with use_galore only"), "galore_target", "galore_rank", "galore_update_interval", "galore_scale", "galore_proj_type", "galore_layerwise"),
    **rows(left("it is read with use_apollo only"), "apollo_target", "apollo_rank", "apollo_update_interval", "apollo_scale", "apollo_proj", "apollo_proj_type", "apollo_layerwise",
           "apollo_scale_front"),
    **rows(left("it is read with use_badam only"), "badam_mode", "badam_start_block", "badam_switch_mode", "badam_switch_interval", "badam_update_ratio", "badam_mask_mode", "badam_verbose"),
    "use_dft_loss": joint("loss_type"),
    **rows(refused("another objective than cross-entropy, DFT and EAFT", "take it out, or " + _OTHER), "use_asft_loss"),
    **rows(joint("loss_type"), "use_eaft_loss"),
    "asft_alpha": left("it is read with use_asft_loss only"),
    "eaft_alpha": joint("eaft_alpha", "with use_eaft_loss"),
    "pref_beta": to("beta"),
    "pref_loss": joint("loss_type"),
    "pref_ftx": to("rpo_alpha"),
    "pref_bco_weight": refused("a classifier's loss (BCO) is not added to DPO's", "take it out"),
    "dpo_label_smoothing": to("label_smoothing"),
    "simpo_gamma": to("simpo_gamma"),
    "kto_chosen_weight": to("desirable_weight"),
    "kto_rejected_weight": to("undesirable_weight"),
    "ld_alpha": to("ld_alpha"),
    "ref_model": refused("the reference is the model the stage starts from", "take it out"),
    **rows(left("it is read with ref_model only"), "ref_model_adapters", "ref_model_quantization_bit"),
    "reward_model": refused("a model as reward is named among the rewards here", "write a YAML for posttrain ppo or grpo with reward_funcs: [model:FOLDER]"),
    **rows(left("it is read with reward_model only"), "reward_model_adapters", "reward_model_quantization_bit", "reward_model_type"),
    **rows(left("it is read with stage: ppo only"), "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target", "ppo_whiten_rewards"),
    **rows(left(TRACKING), "enable_torch_profiler", "profile_modules", *(f"profiler_{key}" for key in ("output_dir", "wait_steps", "warmup_steps", "active_steps", "repeat", "record_shapes",
           "profile_memory", "with_stack"))),
    **rows(left(PROCESSES), "use_hyper_parallel", "hyper_parallel_args"),
    **rows(left(GENERATION), "batch_size", "download_mode"),
    "block_diag_attn": left("packed rows never see each other here"),
    "apollo_scale_type": left("it is read with use_apollo only"),
    "kt_expert_checkpoint_path": refused("weights that are stored in another form are not read", "name a base_model in 16 bits"),
    "kt_use_lora_experts": refused("experts are not added to a model here", "take it out"),
    **rows(left("it is read with kt_use_lora_experts only"), "kt_lora_expert_num", "kt_lora_expert_intermediate_size"),
    "warmup_steps": joint("warmup_steps"),
    "save_steps": joint("save_steps"),
    "save_strategy": joint("save_steps"),
    "eval_steps": joint("eval_steps"),
    "eval_strategy": joint("eval_steps"),
    "evaluation_strategy": joint("eval_steps"),
}  # fmt: skip

_LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}


def stage(source: Mapping[str, Any]) -> Kind | Refusal:
    asked = source.get("stage", "sft")
    known: dict[str, Kind] = {"pt": "sft", "sft": "sft", "rm": "reward_model", "dpo": "dpo", "kto": "dpo"}
    if asked in known:
        return known[asked]
    if asked == "ppo":
        why = "ppo: its critic is a head on the policy, its rewards are scaled as they come, and its beta follows a target, none of which is so here"
        return Refusal(
            "stage",
            why,
            "write a YAML for posttrain ppo with reward_funcs: [model:FOLDER], FOLDER from posttrain reward_model",
        )
    return Refusal("stage", f"{asked}: no such method here", f"set stage: {', '.join(known)}, or {_OTHER}")


def finish(draft: ImportDraft) -> None:
    _adapter(draft)
    read_datasets(draft)
    _template(draft)
    _default_system(draft)
    _trained(draft)
    drawn_by_seed(draft, "train_from_scratch")
    _loss(draft)
    _adapter_before(draft)
    _memory(draft)
    warmup(draft)
    schedule(draft)
    eight_bits(draft)
    compiling(draft)
    sft_only(draft)
    streaming(draft, "buffer_size", "streaming")
    best_model(draft)
    cadence(draft, "save", "save_steps", 3)
    cadence(draft, "eval", "eval_steps", 3)


def _adapter(draft: ImportDraft) -> None:
    kind, bits = draft.source.get("finetuning_type", "lora"), draft.source.get("quantization_bit")
    if kind not in ("lora", "full", "freeze"):
        draft.refuse(
            "finetuning_type", f"{kind}: weights are trained whole or by LoRA here", "set lora, full or freeze"
        )
        return
    _frozen(draft, kind)
    if bits not in (None, 4, 8):
        draft.refuse(
            "quantization_bit", f"{bits}: the frozen base is kept in 4, 8 or 16 bits", "set 4 or 8, or take it out"
        )
    adapter = "none" if kind != "lora" else "qlora" if bits == 4 else "lora"
    key = "finetuning_type" if "finetuning_type" in draft.source else "LLaMA-Factory's default"
    draft.put("adapter", adapter, key, f"{kind} there" if adapter != kind else "")
    if bits == 4:
        draft.leave("quantization_bit", "adapter: qlora says it")
    elif bits == 8:
        draft.put("load_in_8bit", True, "quantization_bit")
    target = draft.source.get("lora_target", "all")
    if adapter != "none":
        text = target if isinstance(target, list) else names(target)
        draft.put(
            "lora_target",
            "all-linear" if text == ["all"] else text,
            "lora_target",
            "all there" if text == ["all"] else "",
        )
    elif "lora_target" in draft.source:
        draft.leave("lora_target", "there is no adapter")
    _pissa(draft, adapter)


def _adapter_before(draft: ImportDraft) -> None:
    """Of several adapters all but the last are merged there, and with `create_new_adapter` the last one too."""
    adapter = draft.keys.get("adapter", "none")
    folders = names(draft.source.get("adapter_name_or_path") or [])
    for key in ("adapter_name_or_path", "adapter_folder", "create_new_adapter"):
        if key in draft.source and (not folders or not draft.asks(key)):
            draft.leave(key, "it is off" if folders else "there is no adapter to start from")
    if not folders:
        return
    if adapter == "none":
        kind = draft.source.get("finetuning_type", "lora")
        draft.refuse("adapter_name_or_path", f"{', '.join(folders)} with finetuning_type: {kind}, which LLaMA-Factory refuses too: the base would be trained without it", "set finetuning_type: lora, or merge it first (`posttrain merge`) and name the merged folder as model_name_or_path")  # fmt: skip
        return
    if len(folders) > 1 or draft.asks("create_new_adapter"):
        merged = "create_new_adapter" if draft.asks("create_new_adapter") else "adapter_name_or_path"
        draft.refuse(merged, f"{', '.join(folders)}: adapters are merged before training there", "merge them first (`posttrain merge`), and name the merged folder as model_name_or_path")  # fmt: skip
        return
    inner = draft.source.get("adapter_folder")
    start_from_adapter(draft, "adapter_name_or_path", f"{folders[0]}/{inner}" if inner else folders[0])
    if inner:
        draft.leave("adapter_folder", "it stands in adapter_name_or_path")


def _frozen(draft: ImportDraft, kind: str) -> None:
    """`freeze`: the last layers (below 0 the first, with LLaMA Pro every so many), and modules outside of them."""
    asked = [
        key
        for key in ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
        if key in draft.source
    ]
    if kind != "freeze":
        for key in asked:
            draft.leave(key, "it is read with finetuning_type: freeze only")
        if draft.asks("use_llama_pro") and kind == "lora":
            draft.refuse("use_llama_pro", "true: an adapter stands in all layers here, or in those that lora_target names", "write lora_target as a regular expression with the layers in it")  # fmt: skip
        elif "use_llama_pro" in draft.source:
            draft.leave("use_llama_pro", "it is read with finetuning_type: freeze and lora only")
        return
    layers = draft.number("freeze_trainable_layers")
    if layers == 0:
        draft.refuse(
            "freeze_trainable_layers", "0: no layer would be trained", "set how many, or finetuning_type: full"
        )
        return
    draft.put(
        "unfrozen_layers",
        2 if layers is None else int(layers),
        "freeze_trainable_layers" if asked[:1] else "finetuning_type",
    )
    modules = names(draft.source.get("freeze_trainable_modules", "all"))
    if modules != ["all"]:
        draft.put("unfrozen_layer_modules", modules, "freeze_trainable_modules")
    if draft.asks("freeze_extra_modules"):
        extra = [f".*{re.escape(name)}" for name in names(draft.source["freeze_extra_modules"])]
        draft.put("unfrozen_parameters", extra, "freeze_extra_modules", "anywhere in a parameter's name there")
    if "use_llama_pro" in draft.source:
        draft.put("unfrozen_layers_spread", draft.asks("use_llama_pro"), "use_llama_pro")


def _pissa(draft: ImportDraft, adapter: str) -> None:
    if draft.asks("pissa_init") and adapter != "none":
        rounds = draft.source.get("pissa_iter", 16)
        draft.put("init_lora_weights", "pissa" if rounds == -1 else f"pissa_niter_{rounds}", "pissa_init")
    elif "pissa_init" in draft.source:
        draft.leave("pissa_init", "it is off")
    if "pissa_iter" in draft.source:
        draft.leave("pissa_iter", "it is read with pissa_init only, and then stands in init_lora_weights")


def _template(draft: ImportDraft) -> None:
    name, thinking = draft.source.get("template"), draft.source.get("enable_thinking")
    if thinking is not None:
        draft.put("chat_template_kwargs", {"enable_thinking": thinking}, "enable_thinking")
    if draft.source.get("stage") == "pt":
        _text_ends(draft, name)
    elif name is None:
        draft.change("template", "none is named, so the tokenizer's own is used")
    else:
        named_template(draft, "template", str(name), has_tools(draft))


def _default_system(draft: ImportDraft) -> None:
    """A text goes to the rows of each dataset; an empty one takes away what the template says by itself."""
    text = draft.source.get("default_system")
    if text == "" and draft.keys.get("chat_template"):
        draft.put("chat_template_kwargs", {"default_system": ""}, "default_system")
    elif text is not None and (not text or draft.source.get("stage") == "pt"):
        draft.leave("default_system", "running text is no conversation" if text else "it is empty")


def _text_ends(draft: ImportDraft, template: Any) -> None:
    """Running text is no conversation; of all templates one says what it ends with."""
    if template == "llama3":
        draft.put("special_tokens", {"eos_token": "<|end_of_text|>"}, "template", "llama3 ends a text so")
    elif template is not None:
        draft.leave("template", "running text is no conversation, so nothing is rendered by it")


def _blocks(draft: ImportDraft) -> None:
    """Running text is joined and cut into blocks unless `packing: false` says that each text is a row."""
    if draft.asks("neat_packing"):
        draft.refuse("neat_packing", "true: there it is for stage: sft only", "take it out")
    elif "neat_packing" in draft.source:
        draft.leave("neat_packing", "it is off")
    if draft.source.get("packing") is not None and not draft.asks("packing"):
        draft.leave("packing", "false: each text is a row of its own")
        return
    key = "packing" if "packing" in draft.source else "stage"
    draft.put("packing", True, key, "" if key == "packing" else "pt packs unless it is told not to")
    draft.put(
        "packing_strategy",
        "wrapped",
        key,
        "what is left over of 1,000 texts is dropped there, and joined to the next here",
    )


def _trained(draft: ImportDraft) -> None:
    for key, ours in (("train_on_prompt", "all"), ("mask_history", "last")):
        if draft.asks(key) and draft.kind == "sft":
            draft.put("train_on", ours, key)
        elif key in draft.source:
            draft.leave(key, "it is off" if not draft.asks(key) else f"it plays no part in {draft.kind}")
    if draft.source.get("stage") == "pt":
        return _blocks(draft)
    for key in ("packing", "neat_packing"):
        if draft.asks(key) and draft.kind == "sft":
            note = (
                "" if key == "neat_packing" or draft.asks("neat_packing") else "packed rows never see each other here"
            )
            draft.put("packing", True, key, note)
        elif key in draft.source:
            draft.leave(key, "it is off" if not draft.asks(key) else f"it plays no part in {draft.kind}")


def _loss(draft: ImportDraft) -> None:
    asked, loss = draft.source.get("stage", "sft"), draft.source.get("pref_loss", "sigmoid")
    if asked == "kto":
        draft.put("loss_type", "kto", "stage")
    elif asked == "dpo" and loss not in _LOSSES:
        draft.refuse("pref_loss", f"{loss} has no counterpart here", "set one of " + ", ".join(_LOSSES))
    elif asked == "dpo":
        draft.put("loss_type", _LOSSES[loss], "pref_loss" if "pref_loss" in draft.source else "stage")
    elif "stage" in draft.source:
        draft.leave("stage", f"{asked}: it is run by `posttrain {draft.kind}`")
    if asked == "rm":
        draft.change(
            "stage",
            "rm: the head reads the last token's state as it is, where theirs drops a tenth of it (dropout) while training",
        )
    if asked != "dpo" and "pref_loss" in draft.source:
        draft.leave("pref_loss", f"it plays no part in {asked}")
    sft_losses(draft, {"use_dft_loss": "dft", "use_eaft_loss": "eaft"})


def _memory(draft: ImportDraft) -> None:
    off = draft.asks("disable_gradient_checkpointing")
    if off or "disable_gradient_checkpointing" in draft.source:
        draft.put("gradient_checkpointing", not off, "disable_gradient_checkpointing")
    elif "gradient_checkpointing" in draft.source:
        draft.put("gradient_checkpointing", flag(draft.source["gradient_checkpointing"]), "gradient_checkpointing")
        return
    if "gradient_checkpointing" in draft.source:
        draft.leave("gradient_checkpointing", "disable_gradient_checkpointing decides")


def defaults(draft: ImportDraft) -> Mapping[str, Any]:
    """What LLaMA-Factory does where its file is silent."""
    return {
        "overflow": "truncate", "learning_rate": 5e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 8, "gradient_checkpointing": True, "bf16": False, "beta": 0.1,
        **({"buffer_size": 16_384} if draft.keys.get("streaming") else {}), **adapter_defaults(draft, 8, lambda rank: 2 * rank),
    }  # fmt: skip


LLAMAFACTORY = Tool(
    "LLaMA-Factory", ROWS, stage, finish,
    frozenset({"finetuning_type", "template", "cutoff_len", "stage", "dataset_dir", "do_train", "plot_loss", "overwrite_cache", "pref_beta", "lora_rank"}),
    defaults,
)  # fmt: skip
