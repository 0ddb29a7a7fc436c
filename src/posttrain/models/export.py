"""Weights out: folders that transformers, PEFT and vLLM load with nothing of ours installed."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.files import digest_tree, read_json, write_folder
from posttrain.models import attention, generation
from posttrain.models.adapters import dequantized_weights
from posttrain.models.policy import Policy

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

PROVENANCE = "posttrain.json"
"""Beside the weights: what they were made from, by digest. It names no path, so the same model is the same anywhere."""


_OF_THE_PROCESS = frozenset({"local_files_only", "is_local", "name_or_path"})
"""Keys that would give the same model another digest when it was made offline, or elsewhere."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """How far the merged model is from base plus adapter, on real tokens."""

    max_logit_difference: float
    max_logit: float
    base: str

    @property
    def relative(self) -> float:
        return self.max_logit_difference / max(self.max_logit, 1e-6)


def save_policy(
    policy: Policy, folder: Path, keys: ModelKeys, *, state: Mapping[str, torch.Tensor] | None = None
) -> MergeReport | None:
    """Write `folder`: the whole model, merged where it was trained as an adapter, then also `folder/../adapter`.

    `state` is the gathered state of a sharded model. Raises: ModelError if the merged model is not the trained one.
    """
    if not policy.has_adapter:
        _save(policy.base, policy.tokenizer, folder, {"base_digest": source_digest(policy.source)}, state=state)
        return None
    adapter_folder = folder.parent / "adapter"
    record = {"base_digest": source_digest(policy.source)}
    write_folder(adapter_folder, lambda temporary: _save_adapter(policy, temporary, record, state))
    merged, report = merge(policy.source, adapter_folder, keys, trained=policy)
    _save(merged, policy.tokenizer, folder, record | {"merged_onto": report.base})
    return report


def _save_adapter(
    policy: Policy, folder: Path, record: Mapping[str, Any], state: Mapping[str, torch.Tensor] | None
) -> None:
    options: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
    policy.model.save_pretrained(str(folder), **options)  # pyright: ignore[reportArgumentType]
    _save_tokenizer(policy.tokenizer, folder)
    (folder / PROVENANCE).write_text(json.dumps(dict(record), indent=2))


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, record: Mapping[str, Any],
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    generation.complete(model, tokenizer, str(folder))

    def fill(temporary: Path) -> None:
        saved = copy.copy(model.config)
        model.config._attn_implementation_internal = None
        model.config.use_cache = True
        try:
            model.save_pretrained(str(temporary), state_dict=None if state is None else dict(state))
        finally:
            model.config._attn_implementation_internal = saved._attn_implementation_internal
            model.config.use_cache = False
        _save_tokenizer(tokenizer, temporary)
        (temporary / PROVENANCE).write_text(json.dumps(dict(record), indent=2))

    write_folder(folder, fill)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As transformers writes it, less what it remembers of how this process happened to load it."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in _OF_THE_PROCESS}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_digest(folder: Path) -> str:
    """Digest of a model folder: weights, config, tokenizer, template and our record of what it was made from."""
    return digest_tree(folder)


def source_digest(source: str) -> str:
    """Digest of a local base model; a hub id stands for itself."""
    return model_digest(Path(source)) if Path(source).is_dir() else f"hub:{source}"


def was_tuned_by_us(source: str) -> bool:
    """Whether our record says that a stage made this model."""
    return (Path(source) / PROVENANCE).is_file()


def merge(
    base: str, adapter: Path, keys: ModelKeys, *, trained: Policy | None = None
) -> tuple[PreTrainedModel, MergeReport]:
    """Base plus adapter as one model, compared with the adapter in place on real logits before it is returned.

    A QLoRA adapter goes onto the dequantised weights it was trained on, or onto the original ones (`merge_onto`).
    Raises: ModelError if the adapter was made for another base, or if the two differ by more than rounding.
    """
    check_base(adapter, Path(base))
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=None if keys.load_in_4bit else "auto")
    onto = "base"
    if keys.load_in_4bit:
        onto = keys.merge_onto
        model = model.float()
        if onto == "dequantized":
            _load_dequantized(model, base, keys, trained)
    adapted = load_adapter(model, adapter).eval()
    probe = torch.arange(1, min(65, model.config.get_text_config().vocab_size))[None]
    with torch.no_grad():
        before = adapted(input_ids=probe, use_cache=False).logits.float()
        merged: Any = adapted.merge_and_unload(safe_merge=True)
        after = merged(input_ids=probe, use_cache=False).logits.float()
    report = MergeReport(float((before - after).abs().max()), float(before.abs().max()), onto)
    tolerance = 1e-4 if next(merged.parameters()).dtype == torch.float32 else 3e-2
    if not report.relative <= tolerance:
        raise ModelError(
            f"merging {adapter} onto {base} changes the logits by {report.max_logit_difference:.2e} of {report.max_logit:.2e}, "
            f"more than rounding ({tolerance:.0e} relative); the adapter is kept, the merged model is not"
        )
    return merged, report


def merge_into(folder: Path, base: str, adapter: Path, keys: ModelKeys) -> MergeReport:
    """`merge`, written to `folder` with the adapter's tokenizer, or the base's where the adapter has none."""
    from posttrain.models.load import load_tokenizer

    merged, report = merge(base, adapter, keys)
    source = str(adapter) if (adapter / "tokenizer_config.json").exists() else base
    tokenizer = load_tokenizer(keys.model_copy(update={"base_model": source, "chat_template": None}))
    _save(merged, tokenizer, folder, {"base_digest": source_digest(base), "merged_onto": report.base})
    return report


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Attach a saved adapter. Raises: ModelError if its weights do not fill the adapter (PEFT only warns)."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    adapted = PeftModel.from_pretrained(model, str(adapter))
    saved = load_file(str(adapter / "adapter_model.safetensors"))
    expected = get_peft_model_state_dict(adapted)  # pyright: ignore[reportArgumentType]
    missing, unexpected = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    if missing or unexpected:
        raise ModelError(
            f"{adapter}: adapter and model do not fit: {len(missing)} weights missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])}); was it trained on another base?"
        )
    return adapted  # pyright: ignore[reportReturnType]


def check_base(adapter: Path, base: Path) -> None:
    """Raises: ModelError if the adapter's record names other base weights than these."""
    record_path = adapter / PROVENANCE
    if not record_path.exists() or not base.is_dir():
        return
    recorded = read_json(record_path).get("base_digest")
    if recorded and recorded != (found := model_digest(base)):
        raise ModelError(
            f"{adapter} was trained on a base with digest {recorded[:19]}…, but {base} has {found[:19]}…; "
            "give the base it was trained on"
        )


def _load_dequantized(model: PreTrainedModel, base: str, keys: ModelKeys, trained: Policy | None) -> None:
    """Replace the linears by what the 4-bit model really computes with."""
    if trained is None:
        from posttrain.models.load import load_policy

        trained = load_policy(keys.model_copy(update={"base_model": base}), trainable=False)
    weights = dequantized_weights(trained.model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, weight in weights.items():
            module: Any = modules[name]
            module.weight.copy_(weight.reshape(module.weight.shape))
