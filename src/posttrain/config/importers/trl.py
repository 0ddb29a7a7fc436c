"""TRL's YAML and command lines (`trl sft --config …`, `python sft.py --…`): the fate of every key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import (
    ImportDraft,
    KeyFate,
    Kind,
    Refusal,
    Tool,
    changed,
    choices,
    flag,
    is_off,
    joint,
    left,
    names,
    refused,
    rows,
    to,
)
from posttrain.config.importers.groups import Devices, generation_batches
from posttrain.config.importers.paths import local_file, reward_file
from posttrain.config.importers.values import (
    GENERATION,
    LOADING,
    MEMORY,
    OWN_LOOP,
    PADDING,
    TRACKING,
    TRAINER,
    adapter_defaults,
    best_model,
    cadence,
    compiling,
    eight_bits,
    schedule,
    sft_only,
    shuffled,
    streaming,
    warmup,
)

_OTHER = "train with TRL"
_SAMPLER = "the embedded engine samples here, from the policy's own weights"
SCRIPT = "posttrain_stage"
"""The key under which a command line's script (sft, dpo, grpo, …) stands."""

ROWS: dict[str, KeyFate] = {
    **TRAINER,
    **rows(left(OWN_LOOP), "ignore_bias_buffers", "lora_task_type", "dataset_kwargs", "generate_during_eval", "model_adapter_name", "ref_adapter_name", "is_encoder_decoder", "config"),
    **rows(left(LOADING), "dataset_batch_size", "precompute_ref_batch_size"),
    **rows(left(PADDING), "padding_free", "pad_to_multiple_of", "pad_token", "label_pad_token_id", "padding_value", "use_logits_to_keep"),
    **rows(left(MEMORY), "activation_offloading", "cast_lm_head_to_fp32", "bnb_4bit_quant_storage", "dtype", "torch_dtype", "gradient_checkpointing_use_reentrant",
           "bnb_4bit_compute_dtype", "cache_implementation"),
    **rows(left(GENERATION), "eval_packing", "num_generations_eval"),
    **rows(left(TRACKING), "log_multimodal", "num_completions_to_print", "log_unique_prompts", "trackio_project"),
    **rows(left(_SAMPLER), "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
           "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
           "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap", "use_transformers_paged", "use_transformers_continuous_batching",
           "transformers_continuous_batching_config"),
    SCRIPT: joint("loss_type"),
    "model_name_or_path": to("base_model"),
    "model": to("base_model"),
    "model_revision": to("revision"),
    "use_peft": joint("adapter"),
    "load_in_4bit": joint("adapter"),
    "load_in_8bit": to("load_in_8bit", flag),
    "lora_r": joint("lora_r"),
    "lora_alpha": joint("lora_alpha"),
    "lora_dropout": joint("lora_dropout"),
    "lora_target_modules": joint("lora_target"),
    "lora_target_parameters": refused("an adapter on single parameters (fused experts) is not made here", "name modules in lora_target_modules"),
    "lora_modules_to_save": to("lora_modules_to_save", names),
    "use_rslora": to("use_rslora", flag),
    "use_dora": to("use_dora", flag),
    "bnb_4bit_quant_type": to("bnb_4bit_quant_type"),
    "use_bnb_nested_quant": to("bnb_4bit_use_double_quant", flag),
    "model_init_kwargs": refused("the model is loaded in one way here", "take it out"),
    "router_aux_loss_coef": refused("the routers' loss has the weight that the model's config gives it", "set router_aux_loss_coef in the config.json of a copy"),
    "dataset_name": joint("datasets"),
    "dataset_config": joint("datasets"),
    "dataset_train_split": joint("datasets"),
    "dataset_test_split": joint("eval_datasets"),
    "datasets": joint("datasets"),
    "test_split_size": to("val_size"),
    **rows(joint("streaming"), "dataset_streaming", "streaming"),
    "dataset_text_field": joint("datasets"),
    "chat_template_path": joint("chat_template"),
    "chat_template_kwargs": to("chat_template_kwargs"),
    "eos_token": joint("special_tokens"),
    "max_length": to("sequence_len"),
    "max_seq_length": to("sequence_len"),
    "truncation_mode": refused("a row that is too long keeps its beginning here", "set keep_start", ("keep_start",)),
    "max_prompt_length": changed("sequence_len limits the prompt together with its answer"),
    "shuffle_dataset": to("train_sampling_strategy", shuffled),
    "packing": to("packing", flag),
    "packing_strategy": joint("packing_strategy", "with packing; bfd_split asks for overflow: split"),
    "completion_only_loss": joint("train_on"),
    "assistant_only_loss": joint("train_on"),
    "loss_type": joint("loss_type"),
    "loss_weights": to("loss_weights"),
    "center_rewards_coefficient": to("center_rewards_coefficient"),
    "beta": to("beta", lambda value: float(*value) if isinstance(value, list) else value),
    "label_smoothing": to("label_smoothing"),
    "f_divergence_type": to("f_divergence_type"),
    "f_alpha_divergence_coef": to("f_alpha_divergence_coef"),
    "reference_free": refused("the loss has its reference", "set loss_type: simpo or cpo for one without"),
    "ld_alpha": to("ld_alpha"),
    "use_weighting": to("use_weighting", flag),
    "discopop_tau": to("discopop_tau"),
    "rpo_alpha": to("rpo_alpha"),
    "simpo_gamma": to("simpo_gamma"),
    "cpo_alpha": to("cpo_alpha"),
    "desirable_weight": to("desirable_weight"),
    "undesirable_weight": to("undesirable_weight"),
    "precompute_ref_log_probs": to("precompute_ref_log_probs", flag),
    "sync_ref_model": to("sync_ref_model", flag),
    "ref_model_mixup_alpha": to("ref_model_mixup_alpha"),
    "ref_model_sync_steps": to("ref_model_sync_steps"),
    "reward_funcs": joint("reward_funcs"),
    "reward_model_name_or_path": refused("a model as reward is named among the rewards here", "write reward_funcs: [model:FOLDER]"),
    "reward_model_path": joint("reward_funcs", "model:FOLDER"),
    "judge": refused("a judge stands in a file of its own here", "write reward_funcs: [judge:FILE.yaml]"),
    "reward_weights": to("reward_weights"),
    "num_generations": to("num_generations"),
    "generation_batch_size": joint("num_prompts_per_step"),
    "steps_per_generation": joint("num_prompts_per_step"),
    "num_iterations": to("num_iterations"),
    "max_completion_length": to("max_completion_length"),
    "max_new_tokens": to("max_completion_length"),
    "missing_eos_penalty": to("missing_eos_penalty"),
    "temperature": to("temperature"),
    "top_p": to("top_p"),
    "top_k": to("top_k"),
    "min_p": to("min_p"),
    "repetition_penalty": refused("sampling has no such penalty, and the loss would not know of it", "set 1.0", (1, 1.0)),
    "generation_kwargs": refused("options of a sampler are not passed on", "set temperature, top_p, top_k, min_p or stop"),
    "vllm_structured_outputs_regex": refused("completions are sampled freely", "take it out"),
    "epsilon": to("epsilon"),
    "epsilon_high": to("epsilon_high"),
    "delta": to("delta"),
    "sapo_temperature_pos": to("sapo_temperature_pos"),
    "sapo_temperature_neg": to("sapo_temperature_neg"),
    **rows(left("it is read with loss_type: vespo only"), "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
    "importance_sampling_level": to("importance_sampling_level"),
    "multi_objective_aggregation": to("multi_objective_aggregation"),
    "scale_rewards": to("scale_rewards", {True: "group", False: "none", "group": "group", "batch": "batch", "none": "none"}),
    "mask_truncated_completions": to("mask_truncated_completions", flag),
    "top_entropy_quantile": to("top_entropy_quantile"),
    "normalize_advantages": refused("leave-one-out advantages are not normalised over the batch here", "take it out, or train with TRL"),
    "reward_clip_range": refused("a reward counts as it is returned", "clip it in the reward function"),
    "entropy_coef": to("entropy_coef"),
    "use_adaptive_entropy": refused("its controller is another one than entropy_target's", "set entropy_target in a YAML of ours"),
    **rows(left("it is read with use_adaptive_entropy only"), "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    "max_tool_calling_iterations": refused("tools are not called while sampling", "take it out"),
    "off_policy_mask_threshold": to("off_policy_mask_threshold"),
    "use_bias_correction_kl": to("use_bias_correction_kl", flag),
    "warmup_steps": joint("warmup_steps"),
    "save_steps": joint("save_steps"),
    "save_strategy": joint("save_steps"),
    "eval_steps": joint("eval_steps"),
    "eval_strategy": joint("eval_steps"),
    "evaluation_strategy": joint("eval_steps"),
}  # fmt: skip
_LORA_KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


def stage(source: Mapping[str, Any]) -> Kind | Refusal:
    script = source.get(SCRIPT)
    known: dict[str, Kind] = {
        "sft": "sft",
        "dpo": "dpo",
        "grpo": "grpo",
        "rloo": "grpo",
        "kto": "dpo",
        "orpo": "dpo",
        "cpo": "dpo",
        "online_dpo": "online_dpo",
        "reward": "reward_model",
    }
    if script is not None:
        todo = f"known are {', '.join(known)}; posttrain ppo and grpo learn from a reward model while they sample"
        return known.get(script) or Refusal(SCRIPT, f"{script}: no such method here", todo)
    if "reward_model_path" in source:
        return "online_dpo"
    if {"reward_funcs", "num_generations", "max_completion_length"} & set(source):
        return "grpo"
    if "center_rewards_coefficient" in source:
        return "reward_model"
    preference = {"beta", "precompute_ref_log_probs", "label_smoothing", "rpo_alpha", "max_prompt_length"} & set(source)
    asked = source.get("loss_type")
    if (
        preference
        or isinstance(asked, list)
        or (asked not in (None, "nll", "dft") and str(asked) in choices("loss_type", "dpo"))
    ):
        return "dpo"
    return "sft"


def finish(draft: ImportDraft) -> None:
    _adapter(draft)
    _datasets(draft)
    _loss(draft)
    if draft.kind == "grpo":
        _rewards(draft)
        _sampling(draft)
    elif draft.kind == "online_dpo":
        _rewards(draft)
        _pairs(draft)
    else:
        for key in ("reward_funcs", "reward_model_path", "generation_batch_size", "steps_per_generation"):
            if key in draft.source:
                draft.leave(key, f"it plays no part in {draft.kind}")
    template = draft.source.get("chat_template_path")
    if template:
        draft.put("chat_template", local_file(draft, str(template)), "chat_template_path")
    eos = draft.source.get("eos_token")
    if eos:
        draft.put("special_tokens", {"eos_token": eos}, "eos_token")
    warmup(draft)
    schedule(draft)
    eight_bits(draft)
    compiling(draft)
    sft_only(draft)
    streaming(draft, "", "dataset_streaming", "streaming")
    _packing(draft)
    best_model(draft)
    cadence(draft, "save", "save_steps", 3)
    cadence(draft, "eval", "eval_steps", 3)


def _packing(draft: ImportDraft) -> None:
    asked = draft.source.get("packing_strategy")
    if asked is None:
        return
    if draft.kind != "sft" or not draft.keys.get("packing"):
        draft.leave("packing_strategy", "nothing is packed")
    elif asked in ("bfd", "wrapped"):
        draft.put("packing_strategy", asked, "packing_strategy")
    elif asked in ("bfd_split", "bfd-requeue"):
        draft.put("overflow", "split", "packing_strategy", f"{asked} there: parts of a long text are rows")
    else:
        draft.refuse("packing_strategy", f"{asked} has no counterpart here", "set bfd, bfd_split or wrapped")


def _adapter(draft: ImportDraft) -> None:
    if not draft.asks("use_peft"):
        for key in ("use_peft", "load_in_4bit", *_LORA_KEYS):
            if key in draft.source and key == "load_in_4bit" and draft.asks(key):
                draft.refuse(key, "true without use_peft would train nothing", "set use_peft: true")
            elif key in draft.source:
                draft.leave(key, "there is no adapter")
        return
    draft.put("adapter", "qlora" if draft.asks("load_in_4bit") else "lora", "use_peft")
    if "load_in_4bit" in draft.source:
        draft.leave("load_in_4bit", "adapter says it")
    for key in _LORA_KEYS[:3]:
        if key in draft.source:
            draft.put(key, draft.source[key], key)
    modules = draft.source.get("lora_target_modules")
    if modules is None:
        draft.refuse(
            "lora_target_modules",
            "missing: PEFT then takes modules that depend on the family",
            "name them, or all-linear",
        )
    else:
        listed = names(modules)
        draft.put("lora_target", "all-linear" if listed == ["all-linear"] else listed, "lora_target_modules")


def _datasets(draft: ImportDraft) -> None:
    name, mixture = draft.source.get("dataset_name"), draft.source.get("datasets")
    if not name and not mixture:
        draft.refuse("dataset_name", "missing: a run needs rows", "name the data")
    text = draft.source.get("dataset_text_field")
    extra: dict[str, Any] = {"columns": {"text": text}} if text and text != "text" else {}
    if text == "text":
        draft.leave("dataset_text_field", "text: so it is here")
    if mixture:
        draft.put(
            "datasets",
            [one for place, entry in enumerate(mixture) for one in _entry(draft, entry, place, extra)],
            "datasets",
        )
        for key in ("dataset_name", "dataset_config"):
            if key in draft.source:
                draft.leave(key, "datasets names the data")
    elif name:
        entry = {"path": local_file(draft, str(name)), **extra}
        if draft.source.get("dataset_config"):
            entry["name"] = draft.source["dataset_config"]
        if draft.source.get("dataset_train_split", "train") != "train":
            entry["split"] = draft.source["dataset_train_split"]
        draft.put("datasets", [entry], "dataset_name")
    if str(draft.source.get("eval_strategy", "no")) != "no" and name and not mixture:
        held = {key: value for key, value in entry.items() if key != "split"}
        draft.put(
            "eval_datasets", [{**held, "split": draft.source.get("dataset_test_split", "test")}], "dataset_test_split"
        )
    elif "dataset_test_split" in draft.source:
        draft.leave("dataset_test_split", "eval_strategy is no, so nothing is validated")


def _entry(draft: ImportDraft, entry: Mapping[str, Any], place: int, extra: dict[str, Any]) -> list[dict[str, Any]]:
    odd = {
        key: value
        for key, value in entry.items()
        if key not in ("path", "name", "split", "columns") and not is_off(value)
    }
    for key, value in odd.items():
        draft.refuse(f"datasets.{place + 1}.{key}", f"{value}: it has no counterpart here", "take it out")
    # `columns` chooses columns there; those that no format reads are not read here either.
    kept = {key: entry[key] for key in ("name", "split") if entry.get(key) and entry[key] != "train"}
    return [{"path": local_file(draft, str(entry.get("path"))), **kept, **extra}]


def _loss(draft: ImportDraft) -> None:
    asked, script = draft.source.get("loss_type"), draft.source.get(SCRIPT)
    if isinstance(asked, list) and len(asked) == 1:
        asked = asked[0]
    if script == "rloo":
        draft.put("loss_type", "rloo", SCRIPT)
    elif script in ("kto", "orpo", "cpo"):
        asked = script if script != "cpo" or asked in (None, "sigmoid") else asked
        draft.put("loss_type", asked, SCRIPT)
    elif (draft.kind == "dpo" and isinstance(asked, list) and set(asked) <= set(choices("loss_type", "dpo"))) or (
        asked is not None and str(asked) in choices("loss_type", draft.kind)
    ):
        draft.put("loss_type", asked, "loss_type")
    elif asked is not None:
        known = ", ".join(choices("loss_type", draft.kind))
        draft.refuse("loss_type", f"{asked} has no counterpart here", f"set one of {known}")
    for key in ("assistant_only_loss", "completion_only_loss"):
        if key not in draft.source:
            continue
        if draft.kind != "sft":
            draft.leave(key, f"it plays no part in {draft.kind}")
        else:
            draft.put("train_on", "assistant" if flag(draft.source[key]) else "all", key)


def _rewards(draft: ImportDraft) -> None:
    model = draft.source.get("reward_model_path")
    if model:
        draft.put("reward_funcs", [f"model:{local_file(draft, str(model))}"], "reward_model_path")
        if "reward_funcs" in draft.source:
            draft.refuse(
                "reward_funcs", "beside reward_model_path: one of them is not read there", "keep one of the two"
            )
        return
    funcs = draft.source.get("reward_funcs")
    listed = names(funcs) if funcs else []
    if not listed:
        draft.refuse(
            "reward_funcs", "missing: RL needs a reward", "name reward functions, as file.py:function or of the library"
        )
    elif any("." not in name for name in listed):
        odd = next(name for name in listed if "." not in name)
        draft.refuse(
            "reward_funcs",
            f"{odd}: a reward of TRL's own",
            "write it as a function in a file and name file.py:function, or take one of docs/rewards.md",
        )
    else:
        draft.put("reward_funcs", [reward_file(draft, name) for name in listed], "reward_funcs")


def _pairs(draft: ImportDraft) -> None:
    """A row there is a prompt with its two completions."""
    accumulated = int(draft.source.get("gradient_accumulation_steps", 1))
    prompts = int(draft.source.get("per_device_train_batch_size", 8)) * accumulated
    draft.put(
        "num_prompts_per_step",
        prompts,
        "per_device_train_batch_size",
        f"{prompts} prompts of one process; multiply it by the number of processes",
    )
    if accumulated > 1:
        draft.change(
            "gradient_accumulation_steps", "the gradients of its micro-batches are averaged here; they add up there"
        )
    if draft.keys.get("loss_type") == "ipo":
        draft.change(
            "loss_type",
            "ipo compares means over tokens here, as in TRL's DPOTrainer; its OnlineDPOTrainer compares sums",
        )
    for name in ("generation_batch_size", "steps_per_generation"):
        if name in draft.source:
            draft.leave(name, "it plays no part in online_dpo")


def _sampling(draft: ImportDraft) -> None:
    rows, accumulated = draft.size("per_device_train_batch_size", 8), draft.size("gradient_accumulation_steps", 1)
    generation_batches(
        draft, draft.source, Devices("per_device_train_batch_size", rows, accumulated), group=_group(draft)
    )
    synced = draft.asks("sync_ref_model")
    if synced and draft.keys.get("beta"):
        draft.refuse("sync_ref_model", "true: the reference of grpo stays where the stage begins", "take it out, or set beta: 0, which needs no reference")  # fmt: skip


def _group(draft: ImportDraft) -> int:
    """Completions of a prompt where nothing is said."""
    return 2 if draft.source.get(SCRIPT) == "rloo" else 8


def defaults(draft: ImportDraft) -> Mapping[str, Any]:
    """What TRL does where nothing is said."""
    filled: dict[str, Any] = {
        "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "gradient_checkpointing": True, "overflow": "truncate",
        "per_device_train_batch_size": 8, **adapter_defaults(draft, 16, 32, 0.05),
    }  # fmt: skip
    filled |= {"sft": {"learning_rate": 2e-5, "train_on": "all", "sequence_len": 1024},
               "dpo": {"learning_rate": 1e-6, "beta": 0.1, "sequence_len": 1024},
               "reward_model": {"learning_rate": 1e-4, "sequence_len": 1024, "overflow": "drop"},
               "online_dpo": {"learning_rate": 5e-7, "max_steps": -1, "max_completion_length": 64, "sequence_len": 512, "temperature": 0.9},
               "grpo": {"learning_rate": 1e-6, "max_steps": -1, "max_completion_length": 512}}[draft.kind]  # fmt: skip
    if draft.source.get(SCRIPT) == "rloo":
        filled |= {"num_generations": _group(draft), "beta": 0.05, **({"kl_in_reward": True} if draft.keys.get("beta", 0.05) else {})}  # fmt: skip
    if draft.keys.get("adapter") == "qlora":
        filled["bnb_4bit_use_double_quant"] = False
    return filled


TRL = Tool(
    "TRL", ROWS, stage, finish,
    frozenset({SCRIPT, "dataset_name", "dataset_train_split", "dataset_test_split", "assistant_only_loss", "use_peft", "model_name_or_path", "dataset_config",
               "max_length", "lora_task_type", "generation_batch_size", "eval_strategy"}),
    defaults,
)  # fmt: skip
