"""Low-rank updates side by side: the sum of two LoRA updates of one weight is a LoRA update of the sum of their ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of an adapter, as PEFT names them."""


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
