"""torchtune's YAML and `tune run RECIPE --config FILE key=value`: the fate of every key, by its path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import (
    ImportDraft,
    KeyFate,
    Kind,
    Refusal,
    Tool,
    as_float,
    changed,
    flag,
    joint,
    left,
    refused,
    rows,
    to,
)
from posttrain.config.importers.paths import local_file
from posttrain.config.importers.sharded import OFFLOAD, SPLIT, UNIT, tokens_over
from posttrain.config.importers.torchtune_data import read_datasets, read_tokenizer
from posttrain.config.importers.trl import SCRIPT
from posttrain.config.importers.values import (
    KERNELS,
    LOADING,
    MEMORY,
    OPTIMIZERS,
    OWN_LOOP,
    PROCESSES,
    SAVING,
    TRACKING,
    adapter_defaults,
    shuffled,
)

_OTHER = "train with torchtune"
_FILES = "the weights are those of the folder, whose index names its files"
_DISTILL = "a mixture of cross-entropy and a teacher's KL is not trained here"
_TODO_DISTILL = "write a YAML for posttrain distill (loss_type: forward_kl, on_policy_share: 0)"
_TOKENIZER = "the tokenizer of the model's folder is used"
_QAT = "training as if quantised (QAT) gives other numbers"
_ENTRY_KEYS = ("_component_", "source", "split", "name", "subset", "data_files", "column", "column_map", "column_map.*", "conversation_column", "conversation_style",
               "train_on_input", "packed", "new_system_prompt", "add_eos", "split_across_pack", "filter_fn", "max_seq_len", "data_dir")  # fmt: skip

ROWS: dict[str, KeyFate] = {
    SCRIPT: joint("adapter"),
    "model._component_": joint("adapter"),
    "model.lora_attn_modules": joint("lora_target"),
    "model.apply_lora_to_mlp": joint("lora_target"),
    "model.apply_lora_to_output": joint("lora_target"),
    "model.lora_rank": to("lora_r"),
    "model.lora_alpha": to("lora_alpha"),
    "model.lora_dropout": to("lora_dropout"),
    "model.use_dora": to("use_dora", flag),
    "model.quantize_base": joint("adapter"),
    "model.encoder_trainable": refused("images are not trained here", "name a text-only model"),
    **rows(left("it is about images"), "model.decoder_trainable", "model.fusion_trainable", "model.image_size", "tokenizer.image_size"),
    "checkpointer._component_": joint("base_model"),
    "checkpointer.checkpoint_dir": joint("base_model"),
    **rows(left(_FILES), "checkpointer.checkpoint_files", "checkpointer.checkpoint_files.*", "checkpointer.model_type", "checkpointer.safe_serialization"),
    **rows(left("it is read with resume_from_checkpoint only"), "checkpointer.recipe_checkpoint", "checkpointer.adapter_checkpoint", "checkpointer.should_load_recipe_state"),
    **rows(left(SAVING), "checkpointer.output_dir", "checkpointer.enable_dcp", "checkpointer.keep_last_n_checkpoints", "save_adapter_weights_only", "enable_async_checkpointing"),
    "ref_checkpointer.*": joint("base_model", "the reference is the model the stage starts from"),
    "keep_last_n_checkpoints": to("save_total_limit"),
    "resume_from_checkpoint": left("a run that is started again goes on by itself"),
    "tokenizer._component_": joint("chat_template"),
    "tokenizer.max_seq_len": to("sequence_len"),
    "tokenizer.prompt_template": refused("a template of torchtune's own code", "save it as a Jinja file and set chat_template: FILE in a YAML of ours"),
    "tokenizer.prompt_template.*": refused("words around the turns of each role", "save them as a Jinja template and set chat_template: FILE in a YAML of ours"),
    **rows(left(_TOKENIZER), "tokenizer.path", "tokenizer.merges_file", "tokenizer.vocab_path", "tokenizer.merges_path", "tokenizer.special_tokens_path"),
    "dataset": joint("datasets"),
    **rows(joint("datasets"), *(f"dataset.{key}" for key in _ENTRY_KEYS)),
    "dataset_val": joint("eval_datasets"),
    **rows(joint("eval_datasets"), *(f"dataset_val.{key}" for key in _ENTRY_KEYS)),
    **rows(left("it says how rows are put side by side, and nothing is padded here"), "collate_fn", "dataset.pad_to_max_seq_len"),
    "batch_size_val": left("validation changes nothing that is learned"),
    "run_val_every_n_steps": to("eval_steps"),
    "save_every_n_steps": to("save_steps"),
    "shuffle": to("train_sampling_strategy", shuffled),
    "seed": to("seed"),
    "batch_size": to("per_device_train_batch_size"),
    "gradient_accumulation_steps": to("gradient_accumulation_steps"),
    "epochs": to("num_train_epochs"),
    "max_steps_per_epoch": joint("max_steps"),
    "clip_grad_norm": to("max_grad_norm", as_float),
    "optimizer._component_": to("optim", OPTIMIZERS, todo="set optim: adamw, adamw_8bit, lion, adafactor, muon or sgd"),
    "optimizer.lr": to("learning_rate", as_float),
    "optimizer.weight_decay": to("weight_decay", as_float, "on matrices only"),
    "optimizer.betas": joint("adam_beta1"),
    "optimizer.eps": to("adam_epsilon", as_float),
    **rows(left(MEMORY), "optimizer.fused", "optimizer.foreach", "optimizer.block_size", "optimizer.min_8bit_size"),
    "optimizer.momentum": refused("SGD has no momentum here", "set it to 0"),
    "optimizer.amsgrad": refused("AdamW is plain here", "set it to false"),
    "optimizer_in_bwd": left("stepping within the backward pass gives the same numbers in less memory"),
    "lr_scheduler._component_": joint("lr_scheduler_type"),
    "lr_scheduler.num_warmup_steps": to("warmup_steps"),
    "lr_scheduler.num_cycles": refused("a cosine goes down once here", "set it to 0.5", (0.5,)),
    "loss._component_": joint("loss_type"),
    "loss.beta": to("beta", as_float),
    "loss.gamma": to("beta", as_float),
    "loss.label_smoothing": joint("label_smoothing"),
    "loss.ignore_index": left("positions without a target are never trained here"),
    **rows(left(MEMORY), "loss.num_output_chunks", "loss.tiled_along_rows", "num_output_chunks"),
    "dtype": to("bf16", {"bf16": True, "fp32": False}, "what is trained keeps float32 masters here", "set bf16 or fp32; there is no float16 training here"),
    "device": to("device", {"cuda": "auto", "cpu": "cpu"}, todo="set cuda or cpu"),
    **rows(joint("gradient_checkpointing"), "enable_activation_checkpointing", "enable_activation_offloading"),
    **rows(left("which layers are recomputed changes no number"), "ac_mode", "ac_option", "activation_offloading_use_streams"),
    "compile": to("torch_compile", flag, "neither in 4 bits nor beside layer_offloading"),
    "compile.*": left(KERNELS),
    "output_dir": to("output_dir"),
    "log_every_n_steps": to("logging_steps"),
    "metric_logger._component_": joint("report_to"),
    **rows(left(TRACKING), "metric_logger.*", "log_peak_memory_stats", "log_level", "profiler.*", "profiler"),
    **rows(left(UNIT), "custom_sharded_layers", "memory_efficient_fsdp_wrap", "fsdp_modules_to_wrap"),
    **rows(changed(OFFLOAD), "fsdp_cpu_offload", "fsdp.cpu_offload"),
    "fsdp_reshard_after_forward": to("sharding", {True: {"reshard_after_forward": True}, False: {"reshard_after_forward": False}}),
    "fsdp_sharding_strategy": left("all processes share the model here unless sharding says otherwise"),
    "data_parallel_shard_dim": to("sharding", lambda size: {} if int(size) < 1 else {"dp_shard_size": int(size)}),
    "context_parallel_dim": to("sharding", tokens_over, SPLIT, "give the number of processes that share a sequence"),
    **rows(left(PROCESSES), "data_parallel_replicate_dim", "tensor_parallel_dim", "tensor_parallel_plan", "tensor_parallel_plan.*", "parallel_dims.*", "distributed_backend",
           "enable_tensor_parallel", "context_parallel_rotate_method"),
    **rows(left(LOADING), "dataloader.num_workers", "dataloader.pin_memory", "dataloader.parallel_method", "dataloader.prefetch_factor", "num_workers"),
    "enable_fp8_training": refused("training in 8-bit floats gives other numbers", "set it to false to train in bfloat16"),
    "fp8_recipe_name": left("it is read with enable_fp8_training only"),
    **rows(refused(_DISTILL, _TODO_DISTILL), "kd_loss.*", "kd_ratio", "teacher_model.*", "teacher_checkpointer.*"),
    **rows(refused(_QAT, "take it out, and train as LoRA or in full"), "quantizer._component_", "fake_quant_after_n_steps"),
    "quantizer.*": left("it is read with quantizer._component_ only"),
    "quantizer": left("it is about quantising afterwards"),
    **rows(left(OWN_LOOP), "cudnn_deterministic_mode", "low_cpu_ram", "enable_kv_cache"),
}  # fmt: skip

_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Matrices that transformers' Phi-3 and Phi-4 hold as one."""
_LOSSES = {"DPOLoss": "sigmoid", "RSOLoss": "hinge"}
_CROSS_ENTROPIES = ("CEWithChunkedOutputLoss", "LinearCrossEntropyLoss", "CrossEntropyLoss", "ChunkedCrossEntropyLoss")
_SCHEDULES = {"get_cosine_schedule_with_warmup": "cosine"}
_TRACKERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}


def last_part(component: Any) -> str:
    """The last part of a dotted path."""
    return str(component or "").rpartition(".")[2]


def stage(source: Mapping[str, Any]) -> Kind | Refusal:
    recipe, loss = str(source.get(SCRIPT, "")), last_part(source.get("loss._component_"))
    if loss == "PPOLoss" or "ppo" in recipe:
        return Refusal(
            "loss._component_", "PPO with a critic is not imported", "write a YAML for posttrain grpo, or " + _OTHER
        )
    if "knowledge_distillation" in recipe:
        return Refusal("kd_loss", _DISTILL, _TODO_DISTILL)
    if recipe.startswith("qat"):
        return Refusal("quantizer", _QAT, "use a recipe without qat")
    if not any(key.startswith(("loss.", "optimizer.")) for key in source):
        return Refusal("optimizer", "missing: this file trains nothing", "import the file of a training recipe")
    return "dpo" if loss in _LOSSES or "dpo" in recipe else "sft"


def finish(draft: ImportDraft) -> None:
    _model(draft)
    _reference(draft)
    _adapter(draft)
    read_datasets(draft)
    read_tokenizer(draft)
    _loss(draft)
    _optimizer(draft)
    _memory(draft)
    _tracker(draft)


def _model(draft: ImportDraft) -> None:
    reader, folder = (
        last_part(draft.source.get("checkpointer._component_")),
        draft.source.get("checkpointer.checkpoint_dir"),
    )
    key = "checkpointer.checkpoint_dir"
    draft.leave("checkpointer._component_", "the weights are read from the folder as transformers writes it")
    if not folder:
        draft.refuse(key, "missing: a run needs a model", "name the model's folder")
        return
    place = str(folder).rstrip("/")
    if reader == "FullModelMetaCheckpointer" and place.endswith("/original"):
        draft.put(
            "base_model",
            local_file(draft, place.removesuffix("/original")),
            key,
            "the folder above holds the same weights as transformers reads them",
        )
    elif reader == "FullModelHFCheckpointer":
        draft.put("base_model", local_file(draft, place), key)
    else:
        draft.refuse(
            "checkpointer._component_",
            f"{reader}: its weights are not in transformers' form",
            "name a folder of transformers' with FullModelHFCheckpointer",
        )


def _reference(draft: ImportDraft) -> None:
    key = "ref_checkpointer.checkpoint_dir"
    folder = draft.source.get(key)
    if folder is not None and folder != draft.source.get("checkpointer.checkpoint_dir"):
        draft.refuse(key, f"{folder}: the reference is the model the stage starts from", "name the same folder")
    elif folder is not None:
        draft.leave("ref_checkpointer", "the reference is the model the stage starts from")


def _adapter(draft: ImportDraft) -> None:
    builder = last_part(draft.source.get("model._component_"))
    if not builder:
        draft.refuse("model._component_", "missing: it says how the model is trained", "name one of torchtune's models")
        return
    if any(part in builder for part in ("vision", "clip")):
        draft.refuse("model._component_", f"{builder}: images are not trained here", "name a text-only model")
    if builder.endswith("classifier") or "classifier" in builder:
        draft.refuse("model._component_", f"{builder}: classification is not trained here", _OTHER)
    lora = builder.startswith(("lora_", "qlora_"))
    four = builder.startswith("qlora_") or draft.asks("model.quantize_base")
    draft.put(
        "adapter",
        "qlora" if four else "lora" if lora else "none",
        "model._component_",
        f"{builder} there; the weights are those of checkpointer.checkpoint_dir",
    )
    if "model.quantize_base" in draft.source:
        draft.leave("model.quantize_base", "adapter says it")
    keys = ("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output")
    if not lora:
        for key in (*keys, "model.lora_rank", "model.lora_alpha", "model.lora_dropout"):
            if key in draft.source:
                draft.refuse(
                    key, f"{builder} has no adapter", "take it out, or name the builder that begins with lora_"
                )
        return
    _target(draft, builder, keys)


def _target(draft: ImportDraft, builder: str, keys: tuple[str, str, str]) -> None:
    attention = draft.source.get(keys[0]) or []
    odd = [name for name in attention if name not in _ATTENTION]
    if odd or not attention:
        draft.refuse(keys[0], f"{odd[0] if odd else 'missing'}: expected some of {', '.join(_ATTENTION)}", "name them")
        return
    modules = [_ATTENTION[name] for name in attention]
    modules += _MLP if draft.asks(keys[1]) else ()
    modules += ("lm_head",) if draft.asks(keys[2]) else ()
    if "phi" in builder and set(modules) & _FUSED.keys():
        modules = list(dict.fromkeys(_FUSED.get(name, name) for name in modules))
        draft.change(
            keys[0], f"transformers holds them as one matrix each, so that they share an adapter: {', '.join(modules)}"
        )
    draft.put("lora_target", modules, keys[0], "with apply_lora_to_mlp and apply_lora_to_output")
    for key in keys[1:]:
        if key in draft.source:
            draft.leave(key, "it stands in lora_target")


def _loss(draft: ImportDraft) -> None:
    loss = last_part(draft.source.get("loss._component_"))
    smoothing = draft.number("loss.label_smoothing")
    if draft.kind == "dpo" and loss in _LOSSES:
        draft.put("loss_type", _LOSSES[loss], "loss._component_", f"{loss} there")
    elif draft.kind == "sft" and (loss in _CROSS_ENTROPIES or not loss):
        draft.leave("loss._component_", "cross-entropy over the trained tokens: so it is here")
    else:
        known = ", ".join((*_LOSSES, *_CROSS_ENTROPIES))
        draft.refuse("loss._component_", f"{loss or 'missing'}: no such loss here", f"known are {known}")
    if smoothing is not None:
        draft.put(
            "label_smoothing" if draft.kind == "dpo" else "label_smoothing_factor", smoothing, "loss.label_smoothing"
        )


def _optimizer(draft: ImportDraft) -> None:
    betas = draft.source.get("optimizer.betas")
    if betas is not None:
        first, second = betas
        draft.put("adam_beta1", first, "optimizer.betas")
        draft.put("adam_beta2", second, "optimizer.betas")
    schedule = draft.source.get("lr_scheduler._component_")
    if schedule is not None and last_part(schedule) not in _SCHEDULES:
        draft.refuse(
            "lr_scheduler._component_",
            f"{schedule} has no counterpart here",
            f"set {', '.join(_SCHEDULES)}, or take lr_scheduler out",
        )
    elif schedule is not None:
        draft.put("lr_scheduler_type", _SCHEDULES[last_part(schedule)], "lr_scheduler._component_")
    steps, epochs = draft.number("max_steps_per_epoch"), draft.keys.get("num_train_epochs", 1)
    if steps and epochs == 1:
        draft.put(
            "max_steps", int(steps), "max_steps_per_epoch", "of the one epoch; data with fewer steps ends earlier there"
        )
    elif steps:
        draft.refuse(
            "max_steps_per_epoch",
            f"{int(steps)} with {epochs} epochs begins the rows anew before they are through",
            "set epochs: 1, or take it out",
        )
    elif steps is not None:
        draft.leave("max_steps_per_epoch", "it asks for nothing")


def _memory(draft: ImportDraft) -> None:
    recompute, offload = "enable_activation_checkpointing", "enable_activation_offloading"
    if draft.asks(recompute):
        draft.put("gradient_checkpointing", "offload" if draft.asks(offload) else True, recompute)
    elif recompute in draft.source:
        draft.put("gradient_checkpointing", False, recompute)
    if offload in draft.source:
        draft.leave(
            offload,
            "it stands in gradient_checkpointing, without which nothing is offloaded"
            if draft.asks(offload)
            else "it is off",
        )
    if draft.keys.get("torch_compile") and draft.keys.get("adapter") == "qlora":
        draft.drop("torch_compile", "in 4 bits layers are not compiled here")


def _tracker(draft: ImportDraft) -> None:
    logger = last_part(draft.source.get("metric_logger._component_"))
    if logger in _TRACKERS:
        draft.put("report_to", [_TRACKERS[logger]], "metric_logger._component_")
    elif logger:
        draft.leave("metric_logger._component_", TRACKING)


def defaults(draft: ImportDraft) -> Mapping[str, Any]:
    """What torchtune does where its file is silent."""
    filled: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "overflow": "truncate",
        **adapter_defaults(draft, 8, 16),
    }
    if "sequence_len" not in draft.keys:
        # It has no limit there: a longer row stops the run rather than being cut in silence.
        filled["overflow"] = "error"
    if draft.keys.get("optim") in ("adamw", "paged_adamw", "adamw_8bit", "paged_adamw_8bit"):
        filled["weight_decay"] = 0.01
    if draft.kind == "dpo":
        filled |= {"beta": 0.1}
    return filled


TORCHTUNE = Tool(
    "torchtune", ROWS, stage, finish,
    frozenset({"model._component_", "tokenizer._component_", "checkpointer._component_", "dataset._component_", "optimizer._component_", "loss._component_",
               "checkpointer.checkpoint_dir", "metric_logger._component_", "max_steps_per_epoch"}),
    defaults, nested=True,
)  # fmt: skip
