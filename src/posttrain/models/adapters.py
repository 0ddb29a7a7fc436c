"""LoRA and QLoRA through PEFT: what is adapted is checked and said, and a merge is proven before it is kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

ATTENTION_NAMES = re.compile(r"(q_proj|k_proj|v_proj|o_proj|qkv_proj|query_key_value|c_attn|Wqkv|out_proj|dense)$")


def attach_adapter(model: PreTrainedModel, keys: ModelKeys) -> PeftModel:
    """A fresh LoRA adapter on a frozen base; a no-op until it is trained."""
    from peft import LoraConfig, TaskType, get_peft_model

    matches = check_targets(model, keys.lora_target)
    total = sum(matches.values())
    log.info("adapter: %d modules (%s)", total, ", ".join(f"{name} ×{count}" for name, count in matches.items()))
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=keys.lora_r,
        lora_alpha=keys.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=keys.lora_dropout,
        target_modules=_targets_in(_linear_names(model), keys.lora_target),
        target_parameters=_expert_targets(model, keys) or None,
        modules_to_save=keys.lora_modules_to_save or None,
        use_rslora=keys.use_rslora,
        use_dora=keys.use_dora,
        init_lora_weights=keys.init_lora_weights,  # pyright: ignore[reportArgumentType]
        rank_pattern=dict(keys.rank_pattern),
        alpha_pattern=dict(keys.alpha_pattern),
    )
    return get_peft_model(model, config)  # pyright: ignore[reportReturnType]


def check_targets(model: PreTrainedModel, target: list[str] | str) -> Mapping[str, int]:
    """Modules matched per entry of `lora_target`.

    Raises: ModelError naming the entry that matches nothing, with the module names there are.
    """
    names = _linear_names(model)
    if target == "all-linear":
        return {"all-linear": len(names)}
    if not isinstance(target, str):
        names += _expert_names(model)
    entries = [target] if isinstance(target, str) else target
    matches: dict[str, int] = {}
    for entry in entries:
        if isinstance(target, str):
            matched = [name for name in names if re.fullmatch(entry, name)]
        else:
            matched = [name for name in names if _named(name, entry)]
        if not matched:
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ModelError(
                f"lora_target: {entry!r} matches no module of {type(model).__name__}; it has {', '.join(known)}"
            )
        matches[entry] = len(matched)
    if not any(ATTENTION_NAMES.search(entry) or isinstance(target, str) for entry in entries):
        log.warning(
            "lora_target leaves out the attention projections (%s); that usually learns less", ", ".join(entries)
        )
    return matches


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Adaptable modules, the output head left out as PEFT's `all-linear` does."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _expert_names(model: PreTrainedModel) -> list[str]:
    """Weights of all experts of a layer in one tensor, which are no modules of their own."""
    return [
        name for name, parameter in model.named_parameters() if parameter.ndim == 3 and not name.endswith(".weight")
    ]


def _expert_targets(model: PreTrainedModel, keys: ModelKeys) -> list[str]:
    """Raises: ModelError if experts are to be adapted with dropout, which PEFT cannot do."""
    found = [] if isinstance(keys.lora_target, str) else _targets_in(_expert_names(model), keys.lora_target)
    if found and keys.lora_dropout:
        raise ModelError(
            f"lora_dropout={keys.lora_dropout} with experts in lora_target ({', '.join(found)}); set it to 0"
        )
    return list(found)


def _targets_in(names: list[str], target: list[str] | str) -> list[str] | str:
    return (
        target if isinstance(target, str) else [entry for entry in target if any(_named(name, entry) for name in names)]
    )


def _named(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def dequantized_weights(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """The 4-bit linears of the base as float32 matrices, keyed by module name in the base model."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore
    weights: dict[str, torch.Tensor] = {}
    for name, module in base.named_modules():
        if isinstance(module, Linear4bit):
            clean = name.removesuffix(".base_layer")
            packed: Any = module.weight
            weights[clean] = dequantize_4bit(packed.data, packed.quant_state).float()
    return weights
