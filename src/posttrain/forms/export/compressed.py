"""Weights of linear layers in 8 bits with a scale a row, as compressed-tensors stores them; vLLM and transformers read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from posttrain.data.sources import first_line
from posttrain.errors import MissingExtraError, ModelError
from posttrain.files import read_json
from posttrain.forms.merging.shards import ShardWriter
from posttrain.forms.merging.vocabulary import IS_OF_TOKENS
from posttrain.forms.merging.weights import StoredModel


@dataclass(frozen=True)
class CompressedForm:
    """`format` and `config` in compressed-tensors' words. `largest`: what a row's largest number becomes.

    `tensors`: name, numbers in steps of their row's scale → what is stored. `rounds`: those numbers → what each may be off, in steps.
    """

    format: str
    config: Mapping[str, Any]
    largest: float
    tensors: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]
    rounds: Callable[[torch.Tensor], torch.Tensor]


def is_compressed(name: str, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and not IS_OF_TOKENS.search(name)


def write_compressed(folder: Path, source: Path, config: dict[str, Any], kind: str) -> None:
    """The tensors and the config that says how they are held. Raises: MissingExtraError."""
    form, model, writer = COMPRESSED_FORMS[kind], StoredModel(source), ShardWriter(folder)
    for name in model.names:
        tensor = model.tensor(name)
        if not is_compressed(name, tensor.shape):
            writer.add(name, tensor)
            continue
        scale = _scale(tensor.float(), form.largest).to(tensor.dtype)
        for stored, held in form.tensors(name, tensor.float() / scale.float()).items():
            writer.add(stored, held)
        writer.add(f"{name}_scale", scale)
    writer.close()
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": form.format, "quantization_status": "compressed",
        "config_groups": {"group_0": form.config}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _scale(tensor: torch.Tensor, largest: float) -> torch.Tensor:
    return (tensor.abs().amax(1, keepdim=True) / largest).clamp(min=1e-8)


def read_compressed(folder: Path, tied: bool) -> Mapping[str, torch.Tensor]:
    """The tensors in float32, dequantised by transformers and compressed-tensors. Raises: ModelError if these cannot."""
    read: Any = AutoModelForCausalLM
    try:
        model = read.from_pretrained(
            folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    except (RuntimeError, ValueError, TypeError) as error:  # NotImplementedError is a RuntimeError
        kind = read_json(folder / "config.json").get("model_type")
        raise ModelError(
            f"a {kind} in this form is not read back by transformers ({first_line(error)}); export it --to safetensors"
        ) from error
    found: dict[str, torch.Tensor] = model.state_dict()
    kept = {
        name: tensor.float()
        for name, tensor in found.items()
        if not name.endswith(("_scale", "_zero_point", "_shape", "_packed"))
    }
    return {name: tensor for name, tensor in kept.items() if not (tied and name == "lm_head.weight")}


def compressed_bound(kind: str, name: str, tensor: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """What the form rounds, and what the scale's own dtype rounds."""
    if not is_compressed(name, tensor.shape):
        return torch.full_like(tensor, 1e-6)
    form = COMPRESSED_FORMS[kind]
    rounding = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}[stored]
    scale = _scale(tensor, form.largest)
    return (form.rounds(tensor / scale) * scale + tensor.abs().amax(1, keepdim=True) * rounding) * 1.01 + 1e-8


def _packed(name: str, steps: torch.Tensor) -> Mapping[str, torch.Tensor]:
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise MissingExtraError(
            "--to int8 needs compressed-tensors; install it with: pip install 'posttrain[export]'"
        ) from error
    whole = steps.round().clamp(-128, 127).to(torch.int8)
    shape = torch.tensor(steps.shape, dtype=torch.int64)
    return {f"{name}_packed": pack_to_int32(whole, 8), f"{name}_shape": shape}


_E4M3 = torch.finfo(torch.float8_e4m3fn)


def _in_fp8(name: str, steps: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {name: steps.clamp(_E4M3.min, _E4M3.max).to(torch.float8_e4m3fn)}


def _fp8_rounds(steps: torch.Tensor) -> torch.Tensor:
    """Half of the last of three bits behind the point; below the smallest normal number, half of what that bit is there."""
    return (steps.abs() * 2**-4).clamp(min=_E4M3.tiny * 2**-4)


def _group(kind: str, activations: Mapping[str, Any] | None) -> Mapping[str, Any]:
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
    return {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}


_TOKEN_BY_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}

COMPRESSED_FORMS: Mapping[str, CompressedForm] = {
    "int8": CompressedForm(
        "pack-quantized", _group("int", None), 127.0, _packed, lambda steps: torch.full_like(steps, 0.5)
    ),
    "fp8": CompressedForm("float-quantized", _group("float", _TOKEN_BY_TOKEN), _E4M3.max, _in_fp8, _fp8_rounds),
}
"""Engines read int8 as weights alone; in fp8 they compute, with each token's activations scaled as it comes."""
