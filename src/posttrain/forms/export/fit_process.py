# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Weights in 4 bits, fitted by llm-compressor to the answers on given texts: `python -I fit_process.py JOB.json`.

Run by the python of an environment of its own (`make setup-export`): imports nothing of posttrain, and is imported by nothing of it.
The job: `source`, `method`, `group_size`, `rows` (token ids), `out`, the folder to write, and `unrounded`, a file for the weights as
they were scaled and before they were rounded, or null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig

_OWN = ("_scale", "_zero_point", "_g_idx", "_shape")
"""What the quantiser adds to a layer."""


def _recipe(method: str, group_size: int) -> list[Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    how: dict[str, Any] = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
    }  # fmt: skip
    return [GPTQModifier(**how)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**how)]


def _save_unrounded(model: Any, path: Path) -> None:
    """AWQ leaves its scaled weights as they are until they are saved quantised."""
    kept = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if not name.endswith(_OWN)}
    save_file(kept, path, metadata={"format": "pt"})


def main(job: dict[str, Any]) -> None:
    if not torch.accelerator.is_available():
        # It pins what it keeps between layers, which torch refuses where there is no accelerator.
        IntermediatesCache.pin_memory = lambda *given, **named: None
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32)
    rows: list[list[int]] = job["rows"]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model, dataset=data, recipe=_recipe(job["method"], job["group_size"]), num_calibration_samples=len(rows),
        max_seq_length=max(map(len, rows)), shuffle_calibration_samples=False,
    )  # fmt: skip
    if job["unrounded"]:
        _save_unrounded(model, Path(job["unrounded"]))
    model.generation_config = (
        GenerationConfig()
    )  # the source's is copied as it stands; one that contradicts itself is not saved
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
