"""Values that several tools share: optimizers, schedules, and reasons that hold for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import (
    ImportDraft,
    KeyFate,
    Reading,
    as_float,
    changed,
    flag,
    is_off,
    joint,
    left,
    names,
    refused,
    rows,
    to,
)
from posttrain.config.importers.paths import local_file
from posttrain.config.importers.sharded import SHARDED, fsdp_config, fsdp_words
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.schema import keys_of

OPTIMIZERS = {
    **dict.fromkeys(
        ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "AdamW",
         "torch.optim.AdamW", "bitsandbytes.optim.AdamW"), "adamw"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit", "bitsandbytes.optim.PagedAdamW"), "paged_adamw"),
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "ao_adamw_8bit", "adamw_torch_4bit", "ao_adamw_4bit",
         "bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit"),
        "adamw_8bit"),
    **dict.fromkeys(("paged_adamw_8bit", "bitsandbytes.optim.PagedAdamW8bit"), "paged_adamw_8bit"),
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion_32bit"), "lion"),
    "lion_8bit": "lion_8bit",
    "paged_lion_8bit": "paged_lion_8bit",
    "adafactor": "adafactor",
    **dict.fromkeys(("sgd", "torch.optim.SGD"), "sgd"),
}  # fmt: skip
"""Their optimizer → ours. Fusing and where the states lie change no number; states of 4 bits are kept in 8."""

SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "cosine_with_min_lr": "cosine",
}
OVERFLOW = {"drop": "drop", "truncate": "truncate", "raise": "error"}
GRADIENT_CHECKPOINTING: Reading = {
    True: True, False: False, "true": True, "false": False, "offload": "offload", "offload_disk": "offload", "unsloth": "offload",
}  # fmt: skip
BF16 = {"auto": "auto", True: True, False: False, "full": True, "true": True, "false": False}

MEMORY = "it says where numbers lie or how they are computed, and not which"
PROCESSES = "torchrun starts the processes here, and FSDP2 shards; which process holds what changes no number"
TRACKING = "every run writes metrics.jsonl; who else is told of them changes nothing that is learned"
LOADING = "it says how fast rows are read, and not which"
SAVING = "it says what is written down, and not what is learned"
ALPACA_COLUMNS = (
    "columns `input`, `system` and `history` are read too where the rows have them; take them out of the rows"
)
PADDING = "nothing is padded here"
HUB = "a stage uploads nothing; a pipeline pushes what it registered: register: {hub_model_id: OWNER/NAME}, with HF_TOKEN in the environment"
KERNELS = "attention and kernels are chosen for the machine here"
GENERATION = "it is about answers while validating, not about training"
OWN_LOOP = "it belongs to their training loop; ours is the same for every run"

_SET = "set it in a YAML of ours if a stage here has it, or train with the other tool"
_NO_FREEZE = "train all weights (take it out), or use adapter: lora with lora_target"

_OF_PAIRS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")

_TRACKERS = ("mlflow", "wandb", "trackio", "tensorboard")


def unshuffled(value: Any) -> str:
    """Raises: KeyError."""
    return "sequential" if flag(value) else "random"


def shuffled(value: Any) -> str:
    """Raises: KeyError."""
    return "random" if flag(value) else "sequential"


def trackers(value: Any) -> list[str]:
    """Those that are here; `all` is whoever is installed there, which a configuration does not say."""
    return [name for name in names(value) if name in _TRACKERS]


TRAINER: dict[str, KeyFate] = {
    "report_to": to("report_to", trackers, "of those that are here: mlflow, wandb, trackio, tensorboard"),
    **rows(left(TRACKING), "run_name", "logging_dir", "logging_first_step", "logging_strategy", "logging_nan_inf_filter",
           "log_level", "log_level_replica", "log_on_each_node", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
           "include_num_input_tokens_seen", "include_tokens_per_second", "disable_tqdm", "skip_memory_metrics",
           "num_completions_to_print", "wandb_log_unique_prompts", "wandb_entity", "wandb_project", "wandb_run_group",
           "log_unique_prompts", "log_completions_hub_repo"),
    **rows(left(LOADING), "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
           "remove_unused_columns", "preprocessing_batch_size"),
    **rows(to("dataset_num_proc"), "dataset_num_proc", "preprocessing_num_workers"),
    **rows(left(SAVING), "save_only_model", "save_safetensors", "save_on_each_node", "overwrite_output_dir", "enable_jit_checkpoint",
           "save_total_limit_best", "include_for_metrics", "eval_on_start", "eval_delay", "eval_accumulation_steps", "prediction_loss_only",
           "batch_eval_metrics", "include_inputs_for_metrics", "per_device_eval_batch_size", "eval_batch_size", "restore_callback_states_from_checkpoint"),
    **rows(left(HUB), "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
           "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token", "push_dataset_to_hub", "hf_hub_token", "hf_use_auth_token"),
    **rows(left(PROCESSES), "deepspeed", "fsdp_version", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap",
           "ddp_timeout", "ddp_backend", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "local_rank", "accelerator_config",
           "parallelism_config", "average_tokens_across_devices", "use_cpu", "no_cuda", "use_mps_device", "ray_scope", "ray_run_name", "ray_storage_path",
           "ray_num_workers", "resources_per_worker", "placement_strategy", "ray_init_kwargs", "ds3_gather_for_generation"),
    **rows(left(MEMORY), "tf32", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "gradient_checkpointing_kwargs",
           "use_cache", "torchdynamo", "activation_offloading", "low_cpu_mem_usage", "device_map", "max_memory", "use_reentrant_gc"),
    **rows(left(KERNELS), "attn_implementation", "use_liger_kernel", "use_liger_loss", "liger_kernel_config", "flash_attn", "use_flash_attention_2"),
    **rows(left(OWN_LOOP), "do_train", "do_eval", "do_predict", "past_index", "label_names", "full_determinism", "jit_mode_eval", "debug", "tpu_num_cores",
           "ignore_data_skip", "dataloader_drop_last", "split_batches", "half_precision_backend", "fp16_backend", "fp16_opt_level", "use_legacy_prediction_loop",
           "auto_find_batch_size", "disable_dropout", "data_seed", "eval_do_concat_batches", "eval_use_gather_object",
           "dataloader_multiprocessing_context", "dataloader_in_order", "ddp_static_graph"),
    "fsdp": to("sharding", fsdp_words, SHARDED, "give full_shard, shard_grad_op, hybrid_shard or no_shard, with auto_wrap or offload"),
    "fsdp_config": to("sharding", fsdp_config, SHARDED, "give one of FSDP's strategies as its reshard_after_forward"),
    "resume_from_checkpoint": left("a run that is started again goes on by itself"),
    "train_sampling_strategy": to("train_sampling_strategy", {"random": "random", "sequential": "sequential", "group_by_length": "random"}, "nothing is padded, so sorting by length saves nothing", "set random or sequential"),
    "group_by_length": changed("rows come in a shuffled order here; nothing is padded, so sorting them by length saves nothing"),
    "length_column_name": left("rows are not sorted by length here"),
    "torch_compile": to("torch_compile", why="neither in 4 bits nor beside layer_offloading"),
    "learning_rate": to("learning_rate", as_float),
    "num_train_epochs": to("num_train_epochs"),
    "gradient_accumulation_steps": to("gradient_accumulation_steps"),
    "per_device_train_batch_size": to("per_device_train_batch_size"),
    "weight_decay": to("weight_decay", as_float),
    "adam_beta1": to("adam_beta1"),
    "adam_beta2": to("adam_beta2"),
    "adam_epsilon": to("adam_epsilon", as_float),
    "max_grad_norm": to("max_grad_norm"),
    "max_steps": to("max_steps", lambda value: -1 if as_float(value) <= 0 else int(as_float(value))),
    "lr_scheduler_type": to("lr_scheduler_type", SCHEDULES, todo="set lr_scheduler_type: cosine, cosine_with_restarts, linear, polynomial, constant or wsd"),
    "warmup_ratio": to("warmup_ratio"),
    "optim": to("optim", OPTIMIZERS, todo="set optim: adamw, adamw_8bit, lion, adafactor, muon or sgd"),
    "optim_args": refused("options of an optimizer are not passed on", "set adam_beta1, adam_beta2, adam_epsilon or weight_decay"),
    "optim_target_modules": refused("it trains these modules by another optimizer", "take it out, or set adapter: lora"),
    "log_completions": to("log_completions", why="there a few of them, here one a step"),
    "logging_steps": to("logging_steps", lambda value: max(1, int(as_float(value)))),
    "seed": to("seed"),
    "output_dir": to("output_dir"),
    "bf16": to("bf16", BF16),
    "fp16": changed("there is no float16 training here: bf16: auto takes bfloat16 where the machine has it, and float32 elsewhere"),
    "bf16_full_eval": left(GENERATION),
    "fp16_full_eval": left(GENERATION),
    "gradient_checkpointing": to("gradient_checkpointing", GRADIENT_CHECKPOINTING),
    "trust_remote_code": to("trust_remote_code"),
    **rows(to("tokenizer_name_or_path"), "tokenizer_name_or_path", "tokenizer_name"),
    "label_smoothing_factor": joint("label_smoothing_factor"),
    "neftune_noise_alpha": joint("neftune_noise_alpha"),
    "load_best_model_at_end": to("load_best_model_at_end"),
    **rows(joint("metric_for_best_model", "with load_best_model_at_end"), "metric_for_best_model", "greater_is_better"),
    **rows(joint("early_stopping_patience", "with load_best_model_at_end, which it needs"), "early_stopping_patience", "early_stopping_steps"),
    "lr_scheduler_kwargs": joint("lr_scheduler_type", "its num_cycles, power, min_lr, min_lr_rate and lr_end are read", "set min_lr_ratio, lr_num_cycles, lr_power, warmup_steps or lr_scheduler_type"),
    "save_total_limit": to("save_total_limit"),
}  # fmt: skip
"""Keys of transformers' TrainingArguments, which most tools pass on."""


def warmup(draft: ImportDraft, key: str = "warmup_steps") -> None:
    """Below 1 it is a share of the steps, as in transformers."""
    value = draft.source.get(key)
    if "constant" in (draft.source.get("lr_scheduler"), draft.source.get("lr_scheduler_type")):
        # transformers' `constant` has no warmup, whatever is asked for; ours has the one that is.
        draft.drop("warmup_ratio", "lr_scheduler constant has no warmup there")
        if value is not None:
            draft.leave(key, "lr_scheduler constant has no warmup there")
        draft.put("warmup_ratio", 0.0, "lr_scheduler", "no warmup there")
        return
    amount = draft.number(key)
    if amount is None:
        return
    if 0 < amount < 1:
        draft.put("warmup_ratio", amount, key, "below 1 it is a share of the steps")
    else:
        draft.put("warmup_steps", int(amount), key)


def schedule(draft: ImportDraft) -> None:
    """`lr_scheduler_kwargs`: what transformers' schedules take beside the steps."""
    kind = draft.keys.get("lr_scheduler_type")
    for option, value in (draft.source.get("lr_scheduler_kwargs") or {}).items():
        key = f"lr_scheduler_kwargs.{option}"
        if option == "num_cycles" and kind == "cosine_with_restarts":
            draft.put("lr_num_cycles", int(value), key)
        elif option == "power" and kind == "polynomial":
            draft.put("lr_power", as_float(value), key)
        elif option == "min_lr_rate":
            draft.put("min_lr_ratio", as_float(value), key)
        elif option in ("min_lr", "lr_end"):
            draft.put(
                "min_lr_ratio", as_float(value) / as_float(draft.keys["learning_rate"]), key, "a share of the peak"
            )
        elif (option, value) in (("num_cycles", 0.5), ("power", 1), ("power", 1.0)):
            draft.leave(key, "it is what this schedule does by itself")
        else:
            draft.refuse(key, f"{value}: the schedule {kind} has no such option here", "take it out")


def drawn_by_seed(draft: ImportDraft, key: str) -> None:
    """Weights by the family's own initialisation. Which numbers a seed gives depends on the library there, too."""
    if draft.asks(key) and draft.keys.get("adapter", "none") != "none":
        draft.refuse(
            key, "true beside an adapter: the random weights under it would stay as they are", "take one of them out"
        )
    elif draft.asks(key):
        seed = draft.number("seed")
        draft.put(
            "init_seed",
            42 if seed is None else int(seed),
            key,
            "drawn by the seed of the run; other numbers than there, as random",
        )
    elif key in draft.source:
        draft.leave(key, "it is off")


def start_from_adapter(draft: ImportDraft, key: str, folder: str) -> None:
    """The adapter at `folder` is trained on. Their preferences have the base without it for a reference."""
    pulled = draft.kind == "dpo" and draft.keys.get("loss_type", "sigmoid") not in ("orpo", "simpo")
    if pulled or (STAGE_KINDS[draft.kind].samples and draft.keys.get("beta")):
        draft.refuse(key, f"{folder}: the reference is the base without it there, and the model with it here", "merge it first (`posttrain merge`) and name the merged folder as base_model for ours")  # fmt: skip
        return
    draft.put("adapter_name_or_path", local_file(draft, folder), key)
    draft.change(key, "lora_dropout is that of the file here, and the adapter's own there")


def compiling(draft: ImportDraft) -> None:
    """Where layers are not compiled here, which changes no more than roundings, they run as they are."""
    for key in ("load_in_4bit", "load_in_8bit", "layer_offloading"):
        if draft.keys.get(key) or (key == "load_in_4bit" and draft.keys.get("adapter") == "qlora"):
            draft.drop("torch_compile", f"with {key}: true layers are not compiled here")


def eight_bits(draft: ImportDraft) -> None:
    """A base in 8 bits, which is had under LoRA where nothing is sampled; elsewhere it stays in 16, which 8 bits approximate."""
    if not draft.keys.get("load_in_8bit"):
        return
    if draft.keys.get("adapter") != "lora":
        why = f"adapter is {draft.keys.get('adapter', 'none')}, and 8 bits lie under lora only"
    elif STAGE_KINDS[draft.kind].samples:
        why = f"{draft.kind} samples from a base in 4 bits or in 16; this one stays in 16, which 8 bits approximate"
    elif draft.keys.get("layer_offloading"):
        why = "offloaded layers stay in 16 bits, which 8 bits approximate"
    else:
        return
    theirs = draft.came_from.pop("load_in_8bit")
    del draft.keys["load_in_8bit"], draft.notes["load_in_8bit"]
    draft.change(theirs, why)


def sft_only(draft: ImportDraft) -> None:
    """Label smoothing, which the losses of other stages do not read there, and NEFTune, which they do."""
    for key in ("label_smoothing_factor", "neftune_noise_alpha", "neftune_alpha", "noisy_embedding_alpha"):
        if key not in draft.source:
            continue
        smooths = key == "label_smoothing_factor"
        if not draft.asks(key):
            draft.leave(key, f"{draft.source[key]} asks for nothing that is not so here")
        elif draft.kind == "sft" and (amount := draft.number(key)) is not None:
            ours = key if smooths else "neftune_noise_alpha"
            draft.put(
                ours,
                amount,
                key,
                "" if smooths else "a row's length is its own here, not the batch's",
            )
        elif draft.kind == "sft":
            continue
        elif smooths:
            draft.leave(key, f"the losses of {draft.kind} do not read it there")
        else:
            draft.refuse(key, f"{draft.source[key]}: noise on the embeddings is added in sft only", "take it out")


def sft_losses(draft: ImportDraft, switches: Mapping[str, str]) -> None:
    """Their switches of a loss in `sft`, with EAFT's knobs, which none but it reads."""
    for key, loss_type in switches.items():
        if key not in draft.source:
            continue
        if draft.asks(key) and draft.kind == "sft":
            draft.put("loss_type", loss_type, key)
        else:
            draft.leave(key, f"it plays no part in {draft.kind}" if draft.asks(key) else "it is off")
    for key in ("eaft_alpha", "eaft_k"):
        if key in draft.source and draft.keys.get("loss_type") == "eaft":
            draft.put(key, draft.source[key], key)
        elif key in draft.source:
            draft.leave(key, "only EAFT reads it")


def best_model(draft: ImportDraft) -> None:
    """Early stopping, and by which metric the best checkpoint is told."""
    _early_stopping(draft)
    for key in ("metric_for_best_model", "greater_is_better"):
        value = draft.source.get(key)
        if value is None:
            continue
        if not draft.asks("load_best_model_at_end") and "load_best_model_at_end" not in draft.keys:
            draft.leave(key, "load_best_model_at_end is off, so nothing is chosen by it")
        elif key == "greater_is_better":
            draft.put(key, flag(value), key)
        elif _is_measured(metric := f"eval_{str(value).removeprefix('eval_')}", draft):
            draft.put(key, metric, key)
        else:
            draft.refuse(
                key,
                f"{value} is not measured here under this name",
                "set eval_loss, or a metric that a run's metrics.jsonl has",
            )


def _is_measured(metric: str, draft: ImportDraft) -> bool:
    """Whether the validation of this kind of stage has it; other tools count tokens that are right, too."""
    kind = STAGE_KINDS[draft.kind]
    if kind.samples:
        return metric == "eval_reward"
    of_pairs = kind.pairs and draft.keys.get("loss_type") != "kto"
    return metric.endswith("loss") or (of_pairs and metric.endswith(_OF_PAIRS))


def _early_stopping(draft: ImportDraft) -> None:
    for key in ("early_stopping_patience", "early_stopping_steps"):
        amount = draft.number(key)
        if amount:
            draft.put("early_stopping_patience", int(amount), key)
            if "load_best_model_at_end" not in draft.keys:
                draft.put("load_best_model_at_end", True, key, "it ends with the best checkpoint")
        elif amount is not None:
            draft.leave(key, "it asks for nothing")


def streaming(draft: ImportDraft, buffer: str, *switches: str) -> None:
    """Rows that are read as they are trained on. `buffer` says of how many at a time the order is drawn."""
    for key in switches:
        if draft.asks(key) and "streaming" in keys_of(STAGE_KINDS[draft.kind].keys):
            draft.put("streaming", True, key)
        elif draft.asks(key):
            draft.change(key, f"{draft.kind} reads the same rows whole")
        elif key in draft.source:
            draft.leave(key, "it is off")
    if buffer in draft.source and draft.keys.get("streaming"):
        draft.put("buffer_size", draft.source[buffer], buffer)
    elif buffer in draft.source:
        draft.leave(buffer, "rows that are not streamed are shuffled whole")
    if not draft.keys.get("streaming"):
        return
    if draft.keys.get("max_steps", -1) < 1:
        draft.refuse("max_steps", "missing: how many rows are streamed is not known", "set it")
    if draft.keys.get("val_size"):
        draft.refuse(
            draft.came_from["val_size"],
            "rows that are streamed are not held out",
            "name rows for the validation, and set it to 0",
        )


def cadence(draft: ImportDraft, what: str, ours: str, epochs: float) -> None:
    """`save_steps` and `eval_steps`, or how often per epoch, which is a share of the run's steps. `epochs` is the tool's default."""
    steps, strategy, per_epoch = f"{what}_steps", f"{what}_strategy", f"{what}s_per_epoch"
    if what == "eval" and strategy not in draft.source and "evaluation_strategy" in draft.source:
        strategy = "evaluation_strategy"  # its older name
    told = draft.source.get(strategy, "steps")
    chosen = "no" if is_off(told) else str(told)
    value, often = draft.number(steps), draft.number(per_epoch)
    epochs = _epochs(draft) or epochs
    if strategy in draft.source and chosen != "epoch":
        draft.leave(strategy, f"{ours} says when, and at the end it is always done")
    if often == 0:
        draft.leave(per_epoch, "it asks for nothing")
    elif often is not None:
        _share(draft, ours, 1 / (often * epochs), per_epoch)
    if chosen == "epoch" and draft.keys.get("max_steps", -1) > 0:
        draft.refuse(
            strategy, "epoch with max_steps: the steps of an epoch are known only with the data", f"set {steps}"
        )
    elif chosen == "epoch":
        _share(draft, ours, 1 / epochs, strategy)
    if value is not None and chosen in ("no", "epoch", "best"):
        draft.leave(steps, f"{strategy} is {chosen}")
    elif value is not None and 0 < value < 1:
        _share(draft, ours, value, steps)
    elif value is not None:
        draft.put(ours, max(0, int(value)), steps)


def _epochs(draft: ImportDraft) -> float:
    """Of the run; 0 where there is no such number, which our own reading of the key refuses."""
    try:
        epochs = as_float(draft.keys.get("num_train_epochs", 0))
    except (TypeError, ValueError):
        return 0.0
    return epochs if 0 < epochs < math.inf else 0.0


def _share(draft: ImportDraft, ours: str, share: float, key: str) -> None:
    short = round(share, 6)
    if share < 1:
        # Never more than the share: a hair above a sixth of six steps would be rounded up to two of them.
        draft.put(ours, short if short <= share else round(short - 1e-6, 6), key, "a share of the run's steps")
    else:
        draft.leave(key, "once an epoch of one is at the end, where it is always done")


def adapter_defaults(draft: ImportDraft, rank: int, alpha: Any, dropout: float = 0.0) -> dict[str, Any]:
    """Rank, alpha and dropout where there is an adapter and nothing is said of them."""
    if draft.keys.get("adapter", "none") == "none":
        return {}
    scale = alpha(draft.keys.get("lora_r", rank)) if callable(alpha) else alpha
    return {"lora_r": rank, "lora_alpha": scale, "lora_dropout": dropout}
