"""Low-rank updates side by side: the sum of two LoRA updates of one weight is a LoRA update of the sum of their ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of an adapter, as PEFT names them."""

_PARTS = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
"""How the file names the two factors, of a linear layer and of an embedding."""


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
