"""Adapters on their way to vLLM: which of them it serves by name, and the folder that one is read from."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from posttrain.config.stages import ModelKeys
from posttrain.protocols import Weights
from posttrain.rollout.vllm.options import serves_rank

_PLAIN_INITS = ("gaussian", "orthogonal")


def served_rank(keys: ModelKeys) -> int | None:
    """The rank that vLLM must be ready for; None where it cannot serve such an adapter, which is then pushed merged.

    It has no DoRA and no modules trained in full, and its base is the file's: not one that an init moved, or 4 bits round.
    """
    rank = max([keys.lora_r, *keys.rank_pattern.values()])
    plain = not isinstance(keys.init_lora_weights, str) or keys.init_lora_weights in _PLAIN_INITS
    beside = keys.use_dora or keys.lora_modules_to_save or keys.added_tokens or keys.base_bits
    return rank if keys.adapter == "lora" and plain and not beside and serves_rank(rank) else None


def write_adapter(weights: Weights, folder: Path) -> int:
    """The adapter as PEFT writes it. Returns its bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.weights("adapter")}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(weights.adapter_config()))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
