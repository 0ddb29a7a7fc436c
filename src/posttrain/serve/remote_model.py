"""What this process knows of a model that a server elsewhere has: its text and its ends; and adapters as files for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from posttrain.config.stages import ModelKeys
from posttrain.models.generation import stored_stop_token_ids
from posttrain.models.load import load_config, load_tokenizer
from posttrain.models.slots import Factors
from posttrain.serve.backends import StartedEngine
from posttrain.serve.codec import ServedCodec
from posttrain.serve.pool import RowEngine


@dataclass(frozen=True)
class RemoteModel:
    folder: Path
    config: Any
    tokenizer: Any

    @staticmethod
    def of(folder: Path) -> RemoteModel:
        source = ModelKeys(base_model=str(folder))
        return RemoteModel(folder, load_config(source), load_tokenizer(source))

    def started(self, rows: RowEngine, window: int, max_model_len: int | None) -> StartedEngine:
        """`window`: tokens of prompt and answer that its server takes; `max_model_len`: that are to be taken."""
        window = min(window, max_model_len or window)

        def codec_of(tokenizer: Any) -> ServedCodec:
            stops = stored_stop_token_ids(str(self.folder), None, self.config, tokenizer)
            return ServedCodec(tokenizer, frozenset(stops), window, self.config.get_text_config().vocab_size)

        return StartedEngine(rows, self.tokenizer, codec_of)


def write_factors(within: Path, name: str, factors: Factors) -> Path:
    """As PEFT writes an adapter; the scale of each module is in its B, so that the one scale for all is 1."""
    folder = within / f"adapter-{name.rpartition(':')[2]}"
    folder.mkdir(exist_ok=True)
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": part.contiguous()
        for module, pair in factors.items()
        for side, part in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = max(a.shape[0] for a, _ in factors.values())
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
