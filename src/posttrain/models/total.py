"""One adapter for the base that a pipeline was given: the adapters of all its stages side by side, proven on logits.

A merge adds s·BA to the base, so the adapters of stages that were merged one after the other add up to one whose rank is the
sum of theirs. Its scale is 1 (alpha = r, the scales are in B) and its rank the same everywhere, which all servers read alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.files import digest_tree, read_json
from posttrain.models.adapters import load_adapter
from posttrain.models.continued import ADAPTER
from posttrain.models.export import ALONE, save_tokenizer, write_folder_together
from posttrain.models.load import load_base, load_config
from posttrain.models.low_rank import CONFIG, WEIGHTS, side_by_side, split
from posttrain.models.policy import Policy
from posttrain.models.proof import HALF_ROUNDING, ROUNDING, probe_logits
from posttrain.models.provenance import PROVENANCE, recorded_bits, source_digest
from posttrain.models.read import fits_shares, read_model
from posttrain.models.reward_head import REWARD_TASKS
from posttrain.models.stored import stored_dtype
from posttrain.protocols import Ranks, Sharding

_PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""
ADAPTER_TOTAL = "adapter_total"
"""Folder beside a stage's `model`: one adapter for the base that the pipeline was given."""


@dataclass(frozen=True, slots=True)
class MergedBefore:
    """What an adapter was begun on in a pipeline: the merged model of the stage in `folder`, and, before all, `given`.

    `reason` is why that stage left no adapter for the given base, if it left none.
    """

    folder: Path
    given: ModelKeys
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TotalReport:
    """What was written to `adapter_total`, or in `refused` why nothing was.

    `max_logit_difference` from the trained policy, in float32; `rounded` are the stages whose merges were written in a
    half-precision `save_dtype`, which is what it then comes from.
    """

    digest: str = ""
    base_digest: str = ""
    rank: int = 0
    max_logit: float = 0.0
    max_logit_difference: float = 0.0
    rounded: tuple[str, ...] = ()
    refused: str = ""

    def __str__(self) -> str:
        if self.refused:
            return f"{ADAPTER_TOTAL}: none: {self.refused}"
        text = f"{ADAPTER_TOTAL}: rank {self.rank} for the given base"
        if not self.rounded:
            return text
        return (
            f"{text}; its logits are up to {self.max_logit_difference:.2e} of {self.max_logit:.2e} from the trained ones, since "
            f"the merges of {', '.join(self.rounded)} were rounded to half precision; save_dtype: float32 or adapter_start: "
            "continue makes it exact"
        )


def write_total(
    policy: Policy,
    stage: Path,
    keys: ModelKeys,
    trained: torch.Tensor,
    before: MergedBefore | None,
    ranks: Ranks = ALONE,
) -> TotalReport:
    """Write `stage/adapter_total` from `stage/adapter` and what was merged before it. Nothing is kept unproven.

    All ranks call it.
    """
    reasons = ranks.main_only(lambda: list(_reasons(policy, stage / ADAPTER, keys, trained, before)))
    if reasons:
        return TotalReport(refused="; ".join(reasons))
    given = policy.under if before is None else before.given
    earlier = None if before is None else before.folder / ADAPTER_TOTAL
    rounded = () if before is None else _rounded(before.folder)
    half = bool(rounded) or (policy.base_moved and policy.placement.autocast_dtype is not None)
    record = {
        "base_digest": source_digest(given.base_model),
        "load_in_4bit": given.load_in_4bit,
        "load_in_8bit": given.load_in_8bit,
        "rounded": rounded,
    }

    def write(folder: Path) -> int:
        tensors, config = _joined(policy, stage / ADAPTER, earlier)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        save_tokenizer(policy.tokenizer, folder)
        (folder / PROVENANCE).write_text(json.dumps(record, indent=2))
        return config["r"]

    def fill(folder: Path) -> tuple[int, float]:
        rank = ranks.main_only(lambda: write(folder))
        found = _logits_on(folder, given, policy.sharding)
        return rank, ranks.main_only(lambda: _proven(found, trained, half=half))

    try:
        rank, difference = write_folder_together(stage / ADAPTER_TOTAL, fill, ranks)
    except ModelError as refusal:
        return TotalReport(refused=str(refusal))
    digest, largest = digest_tree(stage / ADAPTER_TOTAL), float(trained.abs().max())
    return TotalReport(digest, record["base_digest"], rank, largest, difference, rounded)


def _logits_on(folder: Path, given: ModelKeys, sharding: Sharding) -> torch.Tensor:
    """The probe's logits of base and adapter, loaded by PEFT."""
    shares = sharding if fits_shares(folder) else None
    base = load_base(given, trainable=False)[0] if given.base_bits else read_model(given, torch.float32, shares)
    return probe_logits(sharding.shard(load_adapter(base, folder)))


def _proven(found: torch.Tensor, trained: torch.Tensor, *, half: bool) -> float:
    """How far these logits are from the trained policy's. Raises: ModelError past rounding."""
    by_token = (trained - found).abs().amax(-1)
    # After rounding the middle token is held: a router may send a single one elsewhere.
    held, bound = (float(by_token.median()), HALF_ROUNDING) if half else (float(by_token.max()), ROUNDING)
    largest = float(trained.abs().max())
    if not held <= bound * max(largest, 1e-6):
        raise ModelError(
            f"on the given base its logits are {held:.2e} of {largest:.2e} from the trained ones, more than rounding ({bound:.0e})"
        )
    return float(by_token.max())


def _reasons(
    policy: Policy, adapter: Path, keys: ModelKeys, trained: torch.Tensor, before: MergedBefore | None
) -> Iterator[str]:
    """Why the adapters do not add up to one for the given base."""
    config = read_json(adapter / CONFIG)
    if config["use_dora"]:
        yield "DoRA also rescales the weights under it, which no sum of updates does"
    given = policy.under if before is None else before.given
    if trained.shape[1] > load_config(given).get_text_config().vocab_size:
        yield "added_tokens gave the embedding rows that the given base lacks"
    if before is None:
        return
    if config["task_type"] in REWARD_TASKS:
        yield "a reward model's adapter stands on the model of the stage before, merged, and no language model is trained on"
        return
    total, name = before.folder / ADAPTER_TOTAL, before.folder.name
    if not (total / CONFIG).is_file():
        unsaid = "it was made without one" if (before.folder / ADAPTER).is_dir() else "it trained all weights"
        yield f"{name} left none: {before.reason or unsaid}"
        return
    if keys.base_bits or recorded_bits(total):
        yield f"the model of {name} was quantised or dequantised in between; adapter_start: continue trains one adapter on"
    mine, theirs = (frozenset[str](c["target_parameters"] or ()) for c in (config, read_json(total / CONFIG)))
    if mine and theirs and mine != theirs:
        yield f"lora_target names other experts than before ({_list(mine)}; before {_list(theirs)})"
    if clash := _saved_and_adapted(adapter, total):
        yield f"lora_modules_to_save: {clash} is trained whole in one stage and by low rank in another"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _saved_and_adapted(*adapters: Path) -> str:
    """A module that one adapter saves whole and another adapts."""
    parts = [split(load_file(adapter / WEIGHTS)) for adapter in adapters]
    whole = {name.rpartition(".")[0] for _, saved in parts for name in saved}
    return _list({module.removeprefix(_PREFIX) for pairs, _ in parts for module in pairs if module in whole})


def _rounded(folder: Path) -> tuple[str, ...]:
    """The stages up to the one in `folder` whose merged model was written in half precision."""
    earlier = tuple(read_json(folder / ADAPTER_TOTAL / PROVENANCE)["rounded"])
    exact = stored_dtype(AutoConfig.from_pretrained(folder / "model")) == torch.float32
    return earlier if exact else (*earlier, folder.name)


def _joined(policy: Policy, adapter: Path, earlier: Path | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and config of the adapter at `adapter` added to the one at `earlier`."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    layers: dict[str, Any] = {_PREFIX + n: m for n, m in policy.base.named_modules() if isinstance(m, LoraLayer)}
    mine, theirs = load_file(adapter / WEIGHTS), {} if earlier is None else load_file(earlier / WEIGHTS)
    config, before = read_json(adapter / CONFIG), {} if earlier is None else read_json(earlier / CONFIG)
    (own, saved), (old, kept) = split(mine), split(theirs)
    parts = {module: [(theirs[a], theirs[b])] for module, (a, b) in old.items()}
    experts = {module: theirs[a].shape[0] // before["r"] for module, (a, _) in old.items()}
    for module, (a, b) in own.items():
        parts.setdefault(module, []).append((mine[a], mine[b] * layers[module].scaling["default"]))
        experts[module] = layers[module].num_experts if isinstance(layers[module], ParamWrapper) else 1
    rank = max(sum(a.shape[0] for a, _ in pair) // experts[module] for module, pair in parts.items())
    tensors = kept | saved
    for module, pair in parts.items():
        tensors |= zip(old.get(module) or own[module], side_by_side(pair, experts[module], rank), strict=True)
    linear = [name.removeprefix(_PREFIX) for name in own if not isinstance(layers[name], ParamWrapper)]
    return tensors, _config(config, before, rank, linear)


def _config(config: Mapping[str, Any], before: Mapping[str, Any], rank: int, linear: Iterable[str]) -> dict[str, Any]:
    """PEFT's config of the sum: scale 1, one rank, every module by its whole name. It names no path."""

    def both(key: str, own: Iterable[str]) -> list[str] | None:
        return sorted({*own, *(before.get(key) or ())}) or None

    local = Path(str(config["base_model_name_or_path"])).is_dir()
    return {
        **config, "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "init_lora_weights": True, "lora_dropout": 0.0, "inference_mode": True,
        "target_modules": both("target_modules", linear) or [],
        "target_parameters": both("target_parameters", config["target_parameters"] or ()),
        "modules_to_save": both("modules_to_save", config["modules_to_save"] or ()),
        "ensure_weight_tying": config["ensure_weight_tying"] or before.get("ensure_weight_tying", False),
        "base_model_name_or_path": None if local else config["base_model_name_or_path"],
    }  # fmt: skip
