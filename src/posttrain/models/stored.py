"""How a checkpoint has its weights stored, where that is not plain floats: what is unpacked when it is read, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.utils.quantization_config import Mxfp4Config

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError

_READ_AS_IT_IS = ("bitsandbytes",)
"""Methods whose layers are those that `load_in_4bit` and `load_in_8bit` make."""
_UNPACKED = "mxfp4"


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype that a config says its file has; float32 where it says nothing."""
    return getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32


def refuse_quantised(keys: ModelKeys, config: Any) -> None:
    """Raises: ModelError for a base to be trained whose weights are stored in few bits and not unpacked when they are read."""
    method = _method(config)
    if method in (None, *_READ_AS_IT_IS):
        return
    if method != _UNPACKED:
        raise ModelError(
            f"base_model: {keys.base_model} holds its weights quantised ({method} in config.json); expected weights in 16 or 32 bits: name the "
            "model that it was made from"
        )
    if keys.base_bits:
        raise ModelError(
            f"base_model: {keys.base_model} holds its experts in MXFP4, which load_in_{keys.base_bits}bit cannot quantise once more; "
            "set adapter: lora, which unpacks them to bf16"
        )


def unpacking(config: Any) -> dict[str, Any]:
    """Options with which transformers reads experts in MXFP4 as floats, on a machine that could compute in MXFP4 too."""
    return {"quantization_config": Mxfp4Config(dequantize=True)} if _method(config) == _UNPACKED else {}


def as_floats(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model that was read by `unpacking`, its experts in `dtype`: they are bf16 whatever was asked for, and transformers would save
    them in its file's form, under names that no file has.
    """
    own: Any = model
    unpacked = [way for way in own._weight_conversions if _is_unpacking(way)]
    own._weight_conversions = [way for way in own._weight_conversions if way not in unpacked]
    names = [pattern for way in unpacked for pattern in way.target_patterns]
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in names):
            parameter.data = parameter.data.to(dtype)
    return model


def _is_unpacking(way: Any) -> bool:
    return isinstance(way, WeightConverter) and any(isinstance(one, Mxfp4Dequantize) for one in way.operations)


def _method(config: Any) -> str | None:
    said: Any = getattr(config, "quantization_config", None)
    if said is None:
        return None
    method: Any = said.get("quant_method") if isinstance(said, dict) else said.quant_method
    return str(getattr(method, "value", method))
