"""Weights out: folders that transformers, PEFT and vLLM load with nothing of ours installed."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from posttrain.config.stages import ModelKeys
from posttrain.files import write_folder
from posttrain.models import generation
from posttrain.models.adapters import dequantized_weights, load_adapter
from posttrain.models.continued import ADAPTER, OF_THE_BASE
from posttrain.models.load import load_base, load_config, load_tokenizer, stored_dtype
from posttrain.models.low_rank import subtract_start
from posttrain.models.policy import Policy
from posttrain.models.proof import (
    HALF_ROUNDING,
    QUANTISATION,
    ROUNDING,
    ExportReport,
    compared,
    compared_folder,
    probe_logits,
    relative_difference,
)
from posttrain.models.provenance import PROVENANCE, check_base, source_digest
from posttrain.models.read import read_model
from posttrain.models.vocabulary import grow

log = logging.getLogger(__name__)

_OF_THE_PROCESS = frozenset({"local_files_only", "is_local", "name_or_path"})
"""Keys that would give the same model another digest when it was made offline, or elsewhere."""


def save_policy(
    policy: Policy, folder: Path, keys: ModelKeys, *,
    state: Mapping[str, torch.Tensor] | None = None, logits: torch.Tensor | None = None,
) -> ExportReport:  # fmt: skip
    """Write `folder`: the whole model, merged where it was trained as an adapter, then also `folder/../adapter`.

    `state` and `logits` are the gathered state and `probe_logits` of a sharded model, which only all ranks can compute.
    Raises: ModelError if what is written is not the trained model.
    """
    trained = probe_logits(policy.model) if logits is None else logits
    under, record = policy.under, {"base_digest": source_digest(policy.source)}
    keys = keys.model_copy(update={name: getattr(under, name) for name in OF_THE_BASE})
    if not policy.has_adapter:
        report = compared(trained, trained, "", ROUNDING)
        return _save(policy.base, policy.tokenizer, folder, record, keys, trained, report, state)
    adapter = folder.parent / ADAPTER
    of_base = record if under.base_model == policy.source else {"base_digest": source_digest(under.base_model)}
    if keys.load_in_4bit:  # for whoever merges it later, away from the stage's own record
        of_base = of_base | {name: getattr(keys, name) for name in OF_THE_BASE if "4bit" in name}
    write_folder(adapter, lambda temporary: _save_adapter(policy, temporary, of_base, state))
    merged, report = merge_adapter(under.base_model, adapter, keys, policy=policy, trained=trained)
    return _save(merged, policy.tokenizer, folder, record | {"merged_onto": report.base}, keys, trained, report)


def _save_adapter(
    policy: Policy, folder: Path, record: Mapping[str, Any], state: Mapping[str, torch.Tensor] | None
) -> None:
    options: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
    # "auto" would look the base up on the hub, or ask on stdin whether to run its code.
    policy.model.save_pretrained(str(folder), save_embedding_layers=False, **options)  # pyright: ignore
    if policy.base_moved:
        assert policy.start is not None
        subtract_start(folder, policy.start)
    save_tokenizer(policy.tokenizer, folder)
    (folder / PROVENANCE).write_text(json.dumps(dict(record), indent=2))


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, record: Mapping[str, Any],
    keys: ModelKeys, trained: torch.Tensor, report: ExportReport, state: Mapping[str, torch.Tensor] | None = None,
) -> ExportReport:  # fmt: skip
    """Write the folder in `save_dtype`, read it back as transformers does, and compare it with the trained policy."""
    generation.complete(model, tokenizer, str(folder))
    dtype = saved_dtype(keys)
    proven: list[ExportReport] = []

    def fill(temporary: Path) -> None:
        saved = copy.copy(model.config)
        model.config._attn_implementation_internal = None
        model.config.use_cache = True
        try:
            model.save_pretrained(str(temporary), state_dict=_cast(state or model.state_dict(), dtype))
        finally:
            model.config._attn_implementation_internal = saved._attn_implementation_internal
            model.config.use_cache = False
        _name_dtype(temporary / "config.json", dtype)
        save_tokenizer(tokenizer, temporary)
        (temporary / PROVENANCE).write_text(json.dumps(dict(record), indent=2))
        written = probe_logits(
            read_model(keys.model_copy(update={"base_model": str(temporary), "revision": None}), dtype)
        )
        proven.append(compared_folder(trained, written, report, dtype))

    write_folder(folder, fill)
    return proven[0]


def saved_dtype(keys: ModelKeys) -> torch.dtype:
    """The dtype that the exported model is written in: `save_dtype`, by default the base's own."""
    return stored_dtype(load_config(keys)) if keys.save_dtype == "auto" else getattr(torch, keys.save_dtype)


def _cast(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The floating tensors in `dtype`; tied ones stay one tensor, so that they are written once."""
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            done.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype))
    return {name: done.get((tensor.data_ptr(), tensor.shape), tensor) for name, tensor in state.items()}


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    """A config's dtype is that of the file, not of the float32 masters that were trained."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As transformers writes it, less what it remembers of how this process happened to load it."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in _OF_THE_PROCESS}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def merge_adapter(
    base: str, adapter: Path, keys: ModelKeys, *, policy: Policy | None = None, trained: torch.Tensor | None = None
) -> tuple[PreTrainedModel, ExportReport]:
    """Base plus adapter as one float32 model, compared with the trained policy's logits before it is returned.

    Without a policy, it is compared with the base as it was trained on, the saved adapter in place. A QLoRA adapter goes
    onto the dequantised weights it was trained on, or onto the original ones (`merge_onto`), which differ by what
    quantising lost. Raises: ModelError if the adapter was made for another base, or if the two differ by more than they may.
    """
    check_base(adapter, Path(base))
    keys = keys.model_copy(update={"base_model": base})
    onto = keys.merge_onto if keys.load_in_4bit else "base"
    quantised: Any = None if policy is None else policy.model
    tokenizer = adapter_tokenizer(base, adapter, keys) if policy is None else policy.tokenizer
    if keys.load_in_4bit and policy is None:
        quantised = load_base(keys, trainable=False)[0]
        grow(quantised, tokenizer, keys)
        quantised = load_adapter(quantised, adapter)
        trained = probe_logits(quantised)
    model = read_model(keys, torch.float32)
    grow(model, tokenizer, keys)
    bound = ROUNDING
    if onto == "dequantized":
        _load_dequantized(model, quantised)
    elif onto == "original":
        # Training did not undo what quantising did to the base: the merged model may be off by as much, and some more.
        with quantised.disable_adapter():
            bound = QUANTISATION * relative_difference(probe_logits(model), probe_logits(quantised))
    elif policy is not None and policy.base_moved and policy.placement.autocast_dtype is not None:
        bound = HALF_ROUNDING  # what its init left of the base was rounded to the base's own dtype
    adapted = load_adapter(model, adapter)
    trained = probe_logits(adapted) if trained is None else trained
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    return merged, compared(trained, probe_logits(merged), onto, bound)


def merge_into(folder: Path, base: str, adapter: Path, keys: ModelKeys) -> ExportReport:
    """`merge`, written to `folder` with the adapter's tokenizer, or the base's where the adapter has none."""
    merged, report = merge_adapter(base, adapter, keys)
    keys = keys.model_copy(update={"base_model": base})
    tokenizer = adapter_tokenizer(base, adapter, keys)
    record = {"base_digest": source_digest(base), "merged_onto": report.base}
    return _save(merged, tokenizer, folder, record, keys, probe_logits(merged), report)


def adapter_tokenizer(base: str, adapter: Path, keys: ModelKeys) -> PreTrainedTokenizerBase:
    """The tokenizer saved with an adapter, or the base's where it has none."""
    source = str(adapter) if (adapter / "tokenizer_config.json").exists() else base
    return load_tokenizer(keys.model_copy(update={"base_model": source, "chat_template": None}))


def _load_dequantized(model: PreTrainedModel, quantised: Any) -> None:
    """Replace the linears by what the 4-bit model really computes with."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, weight in dequantized_weights(quantised).items():
            module: Any = modules[name]
            # GPT-2's linears hold their matrix the other way round, and 4 bits turn it.
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
