"""Weights of linear layers in 8 bits with a scale a row, as compressed-tensors stores them; vLLM and transformers read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from posttrain.errors import MissingExtraError
from posttrain.forms.merging.shards import ShardWriter
from posttrain.forms.merging.vocabulary import IS_OF_TOKENS
from posttrain.forms.merging.weights import StoredModel

_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": None,
    "output_activations": None,
}


def is_in_int8(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and name.endswith(".weight") and not IS_OF_TOKENS.search(name)


def write_int8(folder: Path, source: Path, config: dict[str, Any]) -> None:
    """The tensors and the config that says how they are held. Raises: MissingExtraError."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise MissingExtraError(
            "--to int8 needs compressed-tensors; install it with: pip install 'posttrain[export]'"
        ) from error
    model, writer = StoredModel(source), ShardWriter(folder)
    for name in model.names:
        tensor = model.tensor(name)
        if not is_in_int8(name, tensor):
            writer.add(name, tensor)
            continue
        scale = _scale(tensor.float()).to(tensor.dtype)
        steps = (tensor.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
        writer.add(f"{name}_packed", pack_to_int32(steps, 8))
        writer.add(f"{name}_scale", scale)
        writer.add(f"{name}_shape", torch.tensor(tensor.shape, dtype=torch.int64))
    writer.close()
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": _GROUP}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _scale(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)


def read_int8(folder: Path, tied: bool) -> Mapping[str, torch.Tensor]:
    """The tensors in float32, dequantised by transformers and compressed-tensors."""
    read: Any = AutoModelForCausalLM
    model = read.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    found: dict[str, torch.Tensor] = model.state_dict()
    kept = {
        name: tensor
        for name, tensor in found.items()
        if not name.endswith(("_scale", "_zero_point", "_shape", "_packed"))
    }
    return {name: tensor for name, tensor in kept.items() if not (tied and name == "lm_head.weight")}


def int8_bound(name: str, tensor: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Half a step of the row's scale, and what the scale's own dtype rounds."""
    if not is_in_int8(name, tensor):
        return torch.full_like(tensor, 1e-6)
    rounding = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}[stored]
    largest = tensor.abs().amax(1, keepdim=True)
    return (largest * (0.5 / 127 + rounding) * 1.01 + 1e-8).expand_as(tensor)
