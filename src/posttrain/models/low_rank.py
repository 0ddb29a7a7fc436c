"""Low-rank updates side by side: the sum of two LoRA updates of one weight is a LoRA update of the sum of their ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from posttrain.errors import ModelError
from posttrain.files import read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of an adapter, as PEFT names them."""

_PARTS = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
"""How the file names the two factors, of a linear layer and of an embedding."""


def adapter_config(adapter: Path) -> dict[str, Any]:
    """What PEFT wrote beside the weights. Raises: ModelError."""
    try:
        config = read_json(adapter / CONFIG)
    except (OSError, ValueError) as error:
        raise _unreadable(adapter / CONFIG, error) from error
    if not isinstance(config, dict):
        raise _unreadable(adapter / CONFIG, f"got a {type(config).__name__}, expected an object")
    return config


def adapter_weights(adapter: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file, by the names in it. Raises: ModelError."""
    try:
        return load_file(adapter / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _unreadable(adapter / WEIGHTS, error) from error


def _unreadable(path: Path, why: object) -> ModelError:
    return ModelError(f"{path} cannot be read: {why}; expected that of a LoRA adapter, as PEFT saves it")


def split(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, tuple[str, str]], dict[str, torch.Tensor]]:
    """The names of the two factors of each module in an adapter's file, and what is saved whole beside them."""
    pairs = {
        name.removesuffix(a): (name, name.removesuffix(a) + b)
        for name in tensors
        for a, b in _PARTS
        if name.endswith(a)
    }
    factors = {name for pair in pairs.values() for name in pair}
    return pairs, {name: tensor for name, tensor in tensors.items() if name not in factors}


def side_by_side(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], experts: int, rank: int
) -> tuple[torch.Tensor, ...]:
    """A over A and B beside B, filled up with zeros to `rank`: B·A is then the sum of the parts' products, exactly.

    The factors of all experts of a layer stand in one pair: A with the expert outermost, B with it innermost.
    """
    upper = [a.reshape(experts, -1, a.shape[1]) for a, _ in parts]
    lower = [b.reshape(b.shape[0], -1, experts) for _, b in parts]
    missing = rank - sum(a.shape[1] for a in upper)
    if missing:
        upper.append(upper[0].new_zeros(experts, missing, upper[0].shape[2]))
        lower.append(lower[0].new_zeros(lower[0].shape[0], missing, experts))
    return torch.cat(upper, 1).flatten(0, 1).contiguous(), torch.cat(lower, 1).flatten(1).contiguous()


def subtract_start(folder: Path, start: Mapping[str, torch.Tensor]) -> None:
    """Make a saved adapter fit the base as it was given, where its init had moved s·B₀A₀ out of the base.

    What training changed is s·BA − s·B₀A₀, a plain LoRA of twice the rank: A over A₀, and B beside −B₀.
    """
    path = folder / WEIGHTS
    weights = load_file(path)
    first = {name.replace(".default.", "."): tensor.cpu() for name, tensor in start.items()}
    for name, tensor in weights.items():
        if ".lora_A." in name or ".lora_embedding_A" in name:
            weights[name] = torch.cat([tensor, first[name]], 0)
        elif ".lora_B." in name or ".lora_embedding_B" in name:
            weights[name] = torch.cat([tensor, -first[name]], 1)
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # Twice the rank at the same scale, which is alpha / r, or alpha / sqrt(r).
    scale = math.sqrt(2) if config["use_rslora"] else 2
    config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": scale * config["lora_alpha"]}
    config["rank_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {name: scale * alpha for name, alpha in config["alpha_pattern"].items()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
