"""The functions of other packages that posttrain calls, asked for one by one: a new version that lost one is named here.

What they compute is tried elsewhere (`doctor.py`: attention, 4-bit weights); here it is only asked whether they are
there and take the arguments that they are given.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.cli.findings import Diagnosis
from posttrain.numerics import installed_version


@dataclass(frozen=True, slots=True)
class ForeignUse:
    """`where` is `module:attribute`, `takes` the arguments that are given by name, `user` the part of ours that calls it."""

    package: str
    where: str
    user: str
    takes: tuple[str, ...] = ()


# fmt: off
SURFACE: tuple[ForeignUse, ...] = (
    ForeignUse("torch", "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu", "models/varlen.py"),
    ForeignUse("torch", "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "models/varlen.py"),
    ForeignUse("torch", "torch:ops.aten._flash_attention_forward", "models/varlen.py"),
    ForeignUse("torch", "torch:ops.aten._flash_attention_backward", "models/varlen.py"),
    ForeignUse("torch", "torch:ops.aten._efficient_attention_forward", "models/varlen.py"),
    ForeignUse("torch", "torch:ops.aten._efficient_attention_backward", "models/varlen.py"),
    ForeignUse("torch", "torch.nn.attention.flex_attention:BlockMask.from_kv_blocks", "models/capped.py", ("BLOCK_SIZE", "mask_mod", "seq_lengths")),
    ForeignUse("torch", "torch.nn.attention.flex_attention:flex_attention", "models/capped.py", ("score_mod", "block_mask", "scale", "enable_gqa")),
    ForeignUse("torch", "torch.autograd.graph:save_on_cpu", "models/offload.py", ("pin_memory",)),
    ForeignUse("torch", "torch:UntypedStorage.resize_", "models/offload.py"),
    ForeignUse("torch", "torch.nn.utils:clip_grad_norm_", "distributed/sharding.py", ("parameters", "max_norm")),
    ForeignUse("torch", "torch.distributed.fsdp:fully_shard", "distributed/sharding.py"),
    ForeignUse("torch", "torch.distributed.tensor:distribute_tensor", "distributed/sharding.py"),
    ForeignUse("transformers", "transformers:AttentionInterface.register", "models/attention.py", ("key", "value")),
    ForeignUse("transformers", "transformers:PreTrainedModel.set_attn_implementation", "models/load.py"),
    ForeignUse("transformers", "transformers:PreTrainedModel.gradient_checkpointing_enable", "models/offload.py", ("gradient_checkpointing_kwargs",)),
    ForeignUse("transformers", "transformers:PreTrainedModel.maybe_distribute_model", "models/read.py"),
    ForeignUse("transformers", "transformers.conversion_mapping:get_model_conversion_mapping", "models/read.py"),
    ForeignUse("torch", "torch.distributed.fsdp:FSDPModule.reset_iter_state", "distributed/sharding.py"),
    ForeignUse("torch", "torch.distributed.fsdp:FSDPModule.set_requires_gradient_sync", "distributed/sharding.py"),
    ForeignUse("torch", "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup._init_mp_dtypes", "distributed/precision.py"),
    ForeignUse("torch", "torch.distributed.tensor.debug:_clear_sharding_prop_cache", "distributed/ranks.py"),
    ForeignUse("torch", "torch.distributed.tensor._redistribute:clear_redistribute_planner_cache", "distributed/ranks.py"),
    ForeignUse("torch", "torch.distributed.tensor._redistribute:_gen_transform_infos.cache_clear", "distributed/ranks.py"),
    ForeignUse("torch", "torch.distributed.tensor._collective_utils:MeshTopoInfo.build_from_mesh.cache_clear", "distributed/ranks.py"),
    ForeignUse("transformers", "transformers:PreTrainedModel.save_pretrained", "models/export.py", ("state_dict",)),
    ForeignUse("transformers", "transformers:AutoModelForCausalLM.from_config", "cli/doctor.py"),
    ForeignUse("transformers", "transformers:BitsAndBytesConfig", "models/load.py", ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")),
    ForeignUse("transformers", "transformers.utils.chat_template_utils:render_jinja_template", "data/template.py"),
    ForeignUse("transformers", "transformers.pytorch_utils:Conv1D", "models/adapters.py"),
    ForeignUse("peft", "peft:LoraConfig", "models/adapters.py", ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern")),
    ForeignUse("peft", "peft:get_peft_model", "models/adapters.py"),
    ForeignUse("peft", "peft:PeftModel.disable_adapter", "models/policy.py"),
    ForeignUse("peft", "peft:PeftModel.from_pretrained", "models/adapters.py"),
    ForeignUse("peft", "peft:get_peft_model_state_dict", "models/adapters.py"),
    ForeignUse("safetensors", "safetensors.torch:save_file", "recipes/run/train_state.py"),
    ForeignUse("safetensors", "safetensors.torch:load_file", "recipes/run/train_state.py"),
    ForeignUse("datasets", "datasets:load_dataset", "data/sources.py", ("split",)),
    ForeignUse("datasets", "datasets.config:HF_HUB_OFFLINE", "data/sources.py"),
    ForeignUse("huggingface_hub", "huggingface_hub.constants:HF_HUB_OFFLINE", "config/hub.py"),
    ForeignUse("huggingface_hub", "huggingface_hub.constants:ENDPOINT", "config/hub.py"),
    ForeignUse("bitsandbytes", "bitsandbytes.nn:Linear4bit", "models/load.py", ("compute_dtype", "quant_type")),
    ForeignUse("bitsandbytes", "bitsandbytes.nn:Linear8bitLt.init_8bit_state", "models/eight_bit.py"),
    ForeignUse("bitsandbytes", "bitsandbytes.autograd._functions:MatMul8bitFp", "models/eight_bit.py"),
    ForeignUse("bitsandbytes", "bitsandbytes.functional:dequantize_4bit", "models/adapters.py"),
    ForeignUse("bitsandbytes", "bitsandbytes.optim:AdamW8bit", "recipes/optimizers.py"),
    ForeignUse("mlflow-skinny", "mlflow:MlflowClient.log_batch", "tracking/trackers/mlflow_run.py", ("metrics", "params")),
    ForeignUse("mlflow-skinny", "mlflow:MlflowClient.create_run", "tracking/trackers/mlflow_run.py", ("tags", "run_name")),
    ForeignUse("wandb", "wandb.proto.wandb_internal_pb2:Record", "tracking/trackers/wandb_run.py"),
    ForeignUse("wandb", "wandb:init", "tracking/trackers/wandb_run.py", ("project", "id", "name", "resume", "config", "dir", "settings")),
    ForeignUse("trackio", "trackio:init", "tracking/trackers/trackio_run.py", ("project", "name", "resume", "config", "embed", "auto_log_gpu", "auto_log_cpu")),
    ForeignUse("tensorboard", "tensorboard.backend.event_processing.event_file_loader:LegacyEventFileLoader", "tracking/trackers/tensorboard_run.py"),
    ForeignUse("mlflow-skinny", "mlflow:MlflowClient.set_registered_model_alias", "registry/mirror.py"),
    ForeignUse("math-verify", "math_verify:parse", "rewards/math_verify.py", ("parsing_timeout",)),
    ForeignUse("math-verify", "math_verify:verify", "rewards/math_verify.py", ("timeout_seconds",)),
)
"""A row for every function outside of ours that is private, was renamed before, or is called with arguments by name."""
# fmt: on


def surface(table: Sequence[ForeignUse] = SURFACE) -> Iterator[Diagnosis]:
    """One line for each row that does not hold, and one for all that do. Packages that are not installed are left out."""
    asked = [use for use in table if installed_version(use.package)]
    wrong = [(use, problem) for use in asked if (problem := missing(use))]
    for use, problem in wrong:
        version, mend = installed_version(use.package), f"pip install --constraint constraints.txt {use.package}"
        yield Diagnosis(f"{use.package} api", "broken", f"{problem} ({version}), which {use.user} needs; {mend}")
    packages = len({use.package for use in asked})
    yield Diagnosis(
        "api", "ok", f"{len(asked) - len(wrong)} of {len(asked)} functions of {packages} packages are as expected"
    )


def missing(use: ForeignUse) -> str:
    """What of a row does not hold, or nothing."""
    module, _, path = use.where.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for step in path.split("."):
            found = getattr(found, step)
    except (ImportError, AttributeError) as error:
        return f"{use.where} is not there: {error}"
    lacking = [name for name in use.takes if not _takes(found, name)]
    return f"{use.where} does not take {', '.join(lacking)}" if lacking else ""


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
