"""What starts and shards processes elsewhere: accelerate's configuration file and DeepSpeed's JSON.

They say nothing of model and data, so what they become is a part of a stage's YAML and the line that starts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config.importers.fates import (
    ImportDraft,
    KeyFate,
    Tool,
    as_float,
    changed,
    convert,
    joint,
    left,
    noted,
    refused,
    rows,
    to,
)
from posttrain.config.importers.nested import by_path
from posttrain.config.importers.sharded import (
    OFFLOAD,
    SHARDED,
    SPLIT,
    STAGES,
    STRATEGIES,
    UNIT,
    count_shards_together,
    tokens_over,
)
from posttrain.config.importers.values import LOADING, MEMORY, TRACKING
from posttrain.config.importers.write import as_comment
from posttrain.config.yaml_lines import dump_yaml

FSDP2 = "FSDP2 is the only way to shard here, and what it does by itself"
_OWN = "that is not done here"
_TAKE_OUT = "take it out, or train with the other tool"

_PRECISION = {"bf16": True, "no": False}
_ONE = (1, "1")


_REDUCED = {"fp32": "float32", "bf16": "bfloat16", "bfp16": "bfloat16"}


def _shards(size: Any) -> dict[str, Any]:
    """Raises: ValueError."""
    return {} if int(size) < 0 else {"dp_shard_size": int(size)}


def _flag(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


_FSDP: dict[str, KeyFate] = {
    **rows(to("sharding", STRATEGIES, todo="give one of FSDP's strategies"), "fsdp_sharding_strategy", "fsdp_reshard_after_forward"),
    **rows(left(UNIT), "fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params"),
    **rows(left(FSDP2), "fsdp_version", "fsdp_backward_prefetch", "fsdp_backward_prefetch_policy", "fsdp_forward_prefetch",
           "fsdp_use_orig_params", "fsdp_sync_module_states"),
    **rows(left(LOADING), "fsdp_cpu_ram_efficient_loading"),
    "fsdp_state_dict_type": left("checkpoints and the exported model load under any number of processes here"),
    "fsdp_offload_params": changed(OFFLOAD),
    "fsdp_activation_checkpointing": to("gradient_checkpointing", _flag),
    "fsdp_activation_cpu_offload": changed(OFFLOAD),
    "fsdp_ignored_modules": refused(_OWN, _TAKE_OUT),
}  # fmt: skip
_ZERO: dict[str, KeyFate] = {
    "zero_stage": to("sharding", STAGES, SHARDED, "give a stage from 0 to 3"),
    **rows(changed(OFFLOAD, off=("none", "cpu none")), "offload_optimizer_device", "offload_param_device"),
    **rows(left(FSDP2), "zero3_init_flag", "offload_optimizer_nvme_path", "offload_param_nvme_path", "deepspeed_moe_layer_cls_names"),
    "zero3_save_16bit_model": left("save_dtype says what the exported model is written in"),
    "gradient_accumulation_steps": to("gradient_accumulation_steps"),
    "gradient_clipping": to("max_grad_norm", as_float),
    "deepspeed_config_file": refused("its keys are in that file", "give that file to posttrain import"),
    **rows(changed("torchrun starts the processes"), "deepspeed_multinode_launcher", "deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter"),
}  # fmt: skip
_ACCELERATE: dict[str, KeyFate] = {
    "compute_environment": refused(_OWN, "start posttrain on the machine itself", off=("LOCAL_MACHINE",)),
    "distributed_type": noted(
        {"NO": "one process needs no launcher", **dict.fromkeys(("FSDP", "DEEPSPEED", "MULTI_GPU", "MULTI_CPU"), "torchrun starts the processes, and FSDP2 shards")},
        "it has no counterpart here: set FSDP"),
    "mixed_precision": to("bf16", _PRECISION, todo="set bf16: true, or bf16: false for float32; there is no float16 and no fp8 here"),
    "use_cpu": to("device", {True: "cpu", False: "auto"}),
    "num_processes": to("num_processes"),
    **rows(joint("num_processes", "it is in the line that starts the processes"), "num_machines", "machine_rank", "main_process_ip", "main_process_port",
           "rdzv_backend", "same_network"),
    "gpu_ids": changed("CUDA_VISIBLE_DEVICES says which GPUs", off=("all",)),
    **rows(left(MEMORY), "main_training_function", "enable_cpu_affinity", "debug", "downcast_bf16", "tpu_use_cluster", "tpu_use_sudo", "tpu_env"),
    **rows(refused(_OWN, _TAKE_OUT), "tpu_name", "tpu_zone", "tpu_vm", "commands", "command_file"),
    **{f"fsdp_config.{key}": row for key, row in _FSDP.items()},
    **{f"deepspeed_config.{key}": row for key, row in _ZERO.items()},
    **rows(left(MEMORY), *(f"dynamo_config.dynamo_{key}" for key in ("backend", "mode", "use_dynamic", "use_fullgraph", "use_regional_compilation"))),
    "parallelism_config.parallelism_config_dp_shard_size": to("sharding", _shards),
    "parallelism_config.parallelism_config_dp_replicate_size": joint("sharding", "copies are what processes are left over dp_shard_size"),
    "parallelism_config.parallelism_config_sp_size": to("sharding", tokens_over, SPLIT, "give the number of processes that share a sequence"),
    **rows(refused(_OWN, "set it to 1", off=_ONE), *(f"parallelism_config.parallelism_config_{kind}_size" for kind in ("tp", "cp"))),
}  # fmt: skip

_BUCKETS = ("overlap_comm", "contiguous_gradients", "reduce_bucket_size", "reduce_scatter", "allgather_bucket_size", "allgather_partitions", "sub_group_size",
            "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance", "round_robin_gradients",
            "ignore_unused_parameters", "elastic_checkpoint", "memory_efficient_linear", "stage3_model_persistence_threshold")  # fmt: skip
_DEEPSPEED: dict[str, KeyFate] = {
    "train_batch_size": joint("gradient_accumulation_steps"),
    "train_micro_batch_size_per_gpu": to("per_device_train_batch_size"),
    "gradient_accumulation_steps": to("gradient_accumulation_steps"),
    "gradient_clipping": to("max_grad_norm", as_float),
    "bf16.enabled": to("bf16", _flag),
    "fp16.enabled": refused("there is no float16 training here", "set it to false, and bf16.enabled: true where the machine has it"),
    **rows(left("it is read with fp16 only"), *(f"fp16.{key}" for key in ("auto_cast", "loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale", "consecutive_hysteresis"))),
    "zero_optimization.stage": to("sharding", STAGES, SHARDED, "give a stage from 0 to 3"),
    "zero_optimization.mics_shard_size": to("sharding", _shards, "copies of shards are MiCS"),
    **rows(left(FSDP2), *(f"zero_optimization.{key}" for key in _BUCKETS)),
    **rows(left("save_dtype says what the exported model is written in"), "zero_optimization.stage3_gather_16bit_weights_on_model_save",
           "zero_optimization.stage3_gather_fp16_weights_on_model_save"),
    **rows(changed(OFFLOAD), "zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device", "zero_optimization.cpu_offload"),
    **rows(left("it is read with offloading only"), *(f"zero_optimization.offload_{what}.{key}" for what in ("optimizer", "param") for key in
           ("pin_memory", "nvme_path", "buffer_count", "buffer_size", "fast_init", "max_in_cpu", "pipeline_read", "pipeline_write", "ratio"))),
    "optimizer.type": to("optim", {"AdamW": "adamw", "Adam": "adamw", "FusedAdam": "adamw"}, "DeepSpeed's Adam decays weights as AdamW does", todo="set optim: adamw"),
    "optimizer.params.lr": to("learning_rate", as_float),
    "optimizer.params.betas": joint("adam_beta1"),
    "optimizer.params.eps": to("adam_epsilon", as_float),
    "optimizer.params.weight_decay": to("weight_decay", as_float),
    **rows(left(FSDP2), "optimizer.params.torch_adam", "optimizer.params.adam_w_mode", "optimizer.params.fused"),
    "scheduler.type": to("lr_scheduler_type", {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}, todo="set lr_scheduler_type: cosine, linear, constant or wsd"),
    "scheduler.params.warmup_num_steps": to("warmup_steps"),
    "scheduler.params.warmup_max_lr": to("learning_rate", as_float),
    "scheduler.params.warmup_min_lr": refused("a warmup starts at 0 here", "set it to 0"),
    "scheduler.params.total_num_steps": to("max_steps"),
    "scheduler.params.warmup_type": refused("a warmup is linear here", "set it to linear", off=("linear",)),
    **rows(changed("gradient_checkpointing: true recomputes activations"), *(f"activation_checkpointing.{key}" for key in
           ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "number_checkpoints", "synchronize_checkpoint_boundary", "profile"))),
    **rows(left(TRACKING), "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", *(f"{what}.enabled" for what in ("tensorboard", "wandb", "csv_monitor", "comms_logger", "flops_profiler"))),
    **rows(left(FSDP2), "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients", "gradient_predivide_factor",
           "data_types.grad_accum_dtype", "disable_allgather"),
    "communication_data_type": to("sharding", {name: {"reduce_dtype": dtype} for name, dtype in _REDUCED.items()}, todo="give fp32 or bf16"),
}  # fmt: skip


def _finish_accelerate(draft: ImportDraft) -> None:
    """Its keys on where processes run are in the line that starts them."""
    for key in ("num_machines", "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "same_network"):
        if key in draft.source:
            draft.change(key, "it is in the line that starts the processes")
    count_shards_together(draft)
    copies = "parallelism_config.parallelism_config_dp_replicate_size"
    processes, number = draft.source.get("num_processes"), draft.source.get(copies, 1)
    if int(number) > 1 and isinstance(processes, int) and processes % int(number) == 0:
        draft.put(
            "sharding", {"dp_shard_size": processes // int(number)}, copies, f"{processes} processes in {number} copies"
        )
    elif copies in draft.source:
        draft.change(copies, "copies are what processes are left over dp_shard_size")


def _finish_deepspeed(draft: ImportDraft) -> None:
    total, micro = draft.source.get("train_batch_size"), draft.source.get("train_micro_batch_size_per_gpu")
    accumulated = draft.source.get("gradient_accumulation_steps", 1)
    if isinstance(total, int):
        if isinstance(micro, int) and isinstance(accumulated, int) and total % (micro * accumulated) == 0:
            draft.put(
                "num_processes",
                total // (micro * accumulated),
                "train_batch_size",
                "what is left of it by micro-batch and accumulation",
            )
        else:
            draft.refuse(
                "train_batch_size",
                f"{total} is not told apart into micro-batch, accumulation and processes",
                "set train_micro_batch_size_per_gpu and gradient_accumulation_steps, and take it out",
            )
    betas = draft.source.get("optimizer.params.betas")
    if isinstance(betas, list) and len(betas) == 2:
        draft.put("adam_beta1", betas[0], "optimizer.params.betas")
        draft.put("adam_beta2", betas[1], "optimizer.params.betas")


LAUNCHERS: dict[str, Tool] = {
    "accelerate": Tool("accelerate", _ACCELERATE, lambda values: "sft", _finish_accelerate, frozenset({"distributed_type", "compute_environment"})),
    "deepspeed": Tool("DeepSpeed", _DEEPSPEED, lambda values: "sft", _finish_deepspeed, frozenset({"zero_optimization", "train_micro_batch_size_per_gpu"})),
}  # fmt: skip
"""Name → a launcher's file; marks are keys by which it is known."""


def launcher_of(values: Mapping[str, Any]) -> Tool | None:
    return next((tool for tool in LAUNCHERS.values() if tool.marks & values.keys()), None)


def convert_launcher(tool: Tool, values: Mapping[str, Any]) -> ImportDraft:
    """Every key, inner ones by their path, with its fate. Refusals are in the draft."""
    flat = dict(by_path(values))
    nothing = [key for key, value in flat.items() if value in (None, "auto")]
    return convert(tool, {key: value for key, value in flat.items() if key not in nothing}, nothing, (Path(),))


def torchrun_of(values: Mapping[str, Any]) -> str:
    """The line that starts what accelerate's file describes, without the verb."""
    machines, processes = int(values.get("num_machines", 1)), values.get("num_processes")
    each = "N" if not isinstance(processes, int) or processes < 1 else max(1, processes // machines)
    line = f"torchrun --nproc-per-node {each}"
    if machines > 1:
        place = f"{values.get('main_process_ip', 'HOST')}:{values.get('main_process_port', 29500)}"
        line += f" --nnodes {machines} --rdzv-backend c10d --rdzv-endpoint {place} --rdzv-id run"
    return f"{line} --no-python posttrain"


def launcher_yaml(draft: ImportDraft, source: Path) -> str:
    """What to put into a stage's YAML, a comment per key, and the line that starts it."""
    lines = [
        f"# {draft.tool}'s {as_comment(source.name)}: put this into the YAML of a stage, and start it with:",
        f"#   {torchrun_of(draft.source)} sft stage.yaml",
    ]
    for key, value in draft.keys.items():
        lines.append(f"{dump_yaml({key: value}).rstrip()}  # {as_comment('; '.join(draft.notes[key]))}")
    return (
        "\n".join(
            [
                *lines,
                "",
                "# The other keys of the file:",
                *(f"# {as_comment(f'{key}: {text}')}" for key, text in draft.other),
            ]
        )
        + "\n"
    )
