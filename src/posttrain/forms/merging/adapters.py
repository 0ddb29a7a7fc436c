"""Adapters in a merge: the base that each was trained on, and the result as one adapter, factored by SVD."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from posttrain.config.kinds import stage_kind
from posttrain.config.load import detect_kind
from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.files import read_json
from posttrain.models.continued import ADAPTER, OF_THE_BASE, base_keys, stage_keys
from posttrain.models.low_rank import CONFIG, WEIGHTS, adapter_config
from posttrain.models.provenance import PROVENANCE, bits_in
from posttrain.models.total import ADAPTER_TOTAL


@dataclass(frozen=True, slots=True)
class Factored:
    """How much of the merged update an adapter of this rank holds: shares of Σ squares, in all and of the worst module."""

    rank: int
    energy: float
    least: float
    least_module: str


def trained_on(adapter: Path) -> ModelKeys | None:
    """How the base under this adapter loads, if it is that of one of our stages in its place."""
    path = adapter.resolve().parent / "config.yaml"
    if not path.is_file() or detect_kind(path) == "pipeline":
        return None
    if adapter.resolve().name == ADAPTER_TOTAL:
        # The base that the pipeline was given is that of its first stage on the line; a reward model stands beside it.
        stages = sorted(folder for folder in path.parent.parent.glob("*-*") if _is_of_a_policy(folder / "config.yaml"))
        return base_keys(stage_keys(stages[0] if path.parent in stages else path.parent))
    return base_keys(stage_keys(path.parent)) if adapter.resolve().name == ADAPTER else None


def _is_of_a_policy(config: Path) -> bool:
    return config.is_file() and not stage_kind(detect_kind(config)).keys.is_reward_model


def record_of(adapter: Path) -> Mapping[str, Any]:
    """What a stage wrote beside the adapter: the base's digest, whether that was in 4 bits. Empty for one that is not ours."""
    path = adapter / PROVENANCE
    return read_json(path) if path.is_file() else {}


def bits_of(adapter: Path) -> Mapping[str, Any]:
    """The keys of a quantised base that the adapter was trained on, as its stage wrote them; empty for any other base."""
    keys = trained_on(adapter)
    said = record_of(adapter) if keys is None else {name: getattr(keys, name) for name in OF_THE_BASE}
    return bits_in(said)


def base_of(adapter: Path) -> str:
    """The base that an adapter names, by its stage's record or by PEFT's. Raises: ModelError where it names none."""
    keys = trained_on(adapter)
    named = keys.base_model if keys is not None else adapter_config(adapter).get("base_model_name_or_path")
    if not named:
        raise ModelError(f"{adapter} does not name its base; add base_model")
    return str(named)


def write_factored(
    folder: Path, updates: Iterable[tuple[str, torch.Tensor]], rank: int, configs: Sequence[Mapping[str, Any]]
) -> Factored:
    """Factor each merged ΔW (named by its weight) by SVD to at most `rank`; all modules get the same rank, as servers want.

    A is S½Vᵀ and B is US½ with alpha = rank, so that the scale is 1.
    """
    tensors: dict[str, torch.Tensor] = {}
    kept, whole, least = 0.0, 0.0, (1.0, "")
    for name, update in updates:
        module = name.removesuffix(".weight")
        u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
        count = min(rank, len(s))
        held, total = float(s[:count].square().sum()), float(s.square().sum())
        kept, whole = kept + held, whole + total
        if total and held / total < least[0]:
            least = (held / total, module)
        root = s[:count].sqrt()
        a, b = torch.zeros(rank, update.shape[1]), torch.zeros(update.shape[0], rank)
        a[:count], b[:, :count] = (root[:, None] * vh[:count]).float(), (u[:, :count] * root).float()
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    targets = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors})
    config = {
        **configs[0], "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "init_lora_weights": True, "lora_dropout": 0.0, "inference_mode": True, "target_modules": targets,
        "base_model_name_or_path": None,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return Factored(rank, kept / whole if whole else 1.0, least[0], least[1])
