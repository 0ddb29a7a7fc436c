"""Weights out: folders that transformers, PEFT and vLLM load with nothing of ours installed."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.process_reward import ProcessRewardModelKeys
from posttrain.config.stages import ModelKeys
from posttrain.distributed.ranks import SingleProcess
from posttrain.distributed.whole import Whole
from posttrain.files import begin_folder, digest_json, finish_folder, read_json, write_folder
from posttrain.models import generation
from posttrain.models.adapters import dequantized_weights, load_adapter
from posttrain.models.continued import ADAPTER, OF_THE_BASE
from posttrain.models.load import load_base, load_config, load_tokenizer
from posttrain.models.low_rank import CONFIG, adapter_config, subtract_start
from posttrain.models.merged import MergedByLayer, Unpack, as_held
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
from posttrain.models.provenance import PROVENANCE, STEP_SEPARATOR, check_base, recorded_separator, source_digest
from posttrain.models.read import fits_shares, read_as_filed, read_model
from posttrain.models.reward_head import REWARD_TASKS
from posttrain.models.stored import stored_dtype
from posttrain.models.vocabulary import grow
from posttrain.models.write import write_weights
from posttrain.protocols import Ranks, Sharding

log = logging.getLogger(__name__)

T = TypeVar("T")

ALONE = SingleProcess()

_OF_THE_PROCESS = frozenset({"local_files_only", "is_local", "name_or_path"})
"""Keys that would give the same model another digest when it was made offline, or elsewhere."""
_NAMES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")


def save_policy(
    policy: Policy, folder: Path, keys: ModelKeys, *, ranks: Ranks = ALONE, trained: torch.Tensor | None = None,
    between: Callable[[], None] = lambda: None,
) -> ExportReport:  # fmt: skip
    """Write `folder`: the whole model, merged where it was trained as an adapter, then also `folder/../adapter`.

    All ranks call it, and none holds the model whole. `trained` are the policy's `probe_logits`. `between` is called now and then, by all
    ranks at the same places, and may end it: nothing of `folder` is left then.
    Raises: ModelError if what is written is not the trained model.
    """
    trained = probe_logits(policy.model) if trained is None else trained
    under, record = policy.under, _origin_of(policy) | _cutting(keys)
    keys = keys.model_copy(update={name: getattr(under, name) for name in OF_THE_BASE})
    if not policy.has_adapter:
        export = _Export(policy.base, policy.tokenizer, keys, trained, compared(trained, trained, "", ROUNDING))
        return _save(export, folder, record, policy.sharding, ranks, between)
    adapter = folder.parent / ADAPTER
    of_base = record if under.base_model == policy.source else record | {"base_digest": source_digest(under.base_model)}
    if keys.base_bits:  # for whoever merges it later, away from the stage's own record
        of_base = of_base | {name: getattr(keys, name) for name in OF_THE_BASE if "bit" in name}
    # What PEFT looks for: all but the frozen base, tied tensors under each of their names.
    own = policy.model.state_dict(keep_vars=True)
    kept = {id(parameter) for _, parameter in policy.trainable()} | {id(buffer) for buffer in policy.model.buffers()}
    state = {name: policy.sharding.whole(tensor) for name, tensor in own.items() if id(tensor) in kept}
    start = {name: policy.sharding.whole(tensor) for name, tensor in (policy.start or {}).items()}
    ranks.main_only(
        lambda: write_folder(adapter, lambda temporary: _save_adapter(policy, temporary, of_base, state, start))
    )
    between()
    merged = merge_adapter(under.base_model, adapter, keys, policy=policy, trained=trained)
    export = _Export(merged.model, policy.tokenizer, keys, trained, merged.report)
    return _save(export, folder, record | {"merged_onto": merged.report.base}, merged.sharding, ranks, between)


def _cutting(keys: ModelKeys) -> dict[str, str]:
    """What cuts answers into steps, of a model that rates these."""
    return {STEP_SEPARATOR: keys.step_separator} if isinstance(keys, ProcessRewardModelKeys) else {}


def _origin_of(policy: Policy) -> dict[str, Any]:
    """What the model was made from: another, or its config and a seed."""
    seed = policy.under.init_seed
    if seed is None:
        return {"base_digest": source_digest(policy.source)}
    config = load_config(policy.under).to_diff_dict()
    config.pop("transformers_version", None)
    return {"drawn": {"seed": seed, "config_digest": digest_json(config)}}


def _save_adapter(
    policy: Policy, folder: Path, record: Mapping[str, Any], state: Mapping[str, Any], start: Mapping[str, torch.Tensor]
) -> None:
    # "auto" would look the base up on the hub, or ask on stdin whether to run its code.
    policy.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=dict(state))  # pyright: ignore
    config = read_json(folder / CONFIG)
    # PEFT holds them as sets, whose order is another one in every process.
    config |= {name: sorted(config[name]) for name in _NAMES if isinstance(config[name], list)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    if policy.base_moved:
        subtract_start(folder, start)
    save_tokenizer(policy.tokenizer, folder)
    (folder / PROVENANCE).write_text(json.dumps(dict(record), indent=2))


@dataclass(frozen=True, slots=True)
class _Export:
    """A model that is about to be written, and how far it is from the trained one, whose probe's logits are `trained`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    keys: ModelKeys
    trained: torch.Tensor
    report: ExportReport


def _save(
    export: _Export, folder: Path, record: Mapping[str, Any], sharding: Sharding, ranks: Ranks = ALONE,
    between: Callable[[], None] = lambda: None,
) -> ExportReport:  # fmt: skip
    """Write the folder in `save_dtype`, read it back as transformers does, and compare it with the trained policy."""
    generation.complete(export.model, export.tokenizer, str(folder))
    dtype = saved_dtype(export.keys)

    def fill(temporary: Path) -> ExportReport:
        failed = write_weights(export.model, temporary, dtype, sharding, is_main=ranks.is_main, between=between)

        def finish() -> None:
            if failed is not None:
                raise failed
            _write_beside_weights(export, temporary, dtype, record)

        ranks.main_only(finish)
        between()
        back = export.keys.model_copy(update={"base_model": str(temporary), "revision": None, "init_seed": None})
        written = probe_logits(sharding.shard(read_model(back, dtype, sharding)))
        return ranks.main_only(lambda: compared_folder(export.trained, written, export.report, dtype))

    return write_folder_together(folder, fill, ranks)


def write_folder_together(folder: Path, fill: Callable[[Path], T], ranks: Ranks) -> T:
    """`write_folder`, where all ranks take part in filling a folder of rank 0's. Returns what `fill` does."""
    temporary = ranks.main_only(lambda: begin_folder(folder))
    try:
        filled = fill(temporary)
        ranks.barrier()  # ranks that hold another copy of the model read the folder at their own pace
        ranks.main_only(lambda: finish_folder(temporary, folder))
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return filled


def _write_beside_weights(export: _Export, folder: Path, dtype: torch.dtype, record: Mapping[str, Any]) -> None:
    model = export.model
    attention = model.config._attn_implementation_internal
    model.config._attn_implementation_internal = None
    model.config.use_cache = True
    try:
        model.save_pretrained(str(folder), state_dict={})
    finally:
        model.config._attn_implementation_internal = attention
        model.config.use_cache = False
    _name_dtype(folder / "config.json", dtype)
    save_tokenizer(export.tokenizer, folder)
    (folder / PROVENANCE).write_text(json.dumps(dict(record), indent=2))


def saved_dtype(keys: ModelKeys) -> torch.dtype:
    """The dtype that the exported model is written in: `save_dtype`, by default the base's own."""
    return stored_dtype(load_config(keys)) if keys.save_dtype == "auto" else getattr(torch, keys.save_dtype)


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


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model whose tensors `sharding.whole` gives, the probe's logits of it, and how far these are from the trained policy's."""

    model: PreTrainedModel
    sharding: Sharding
    logits: torch.Tensor
    report: ExportReport


def merge_adapter(
    base: str, adapter: Path, keys: ModelKeys, *, policy: Policy | None = None, trained: torch.Tensor | None = None
) -> Merged:
    """Base plus adapter, merged in float32 and compared with the trained policy's logits before it is returned.

    Under a sharded policy, whose ranks all call it, in float32 shares, modules merged one at a time; else a layer at a time, while it
    runs or is written, onto a base in its file's dtype.

    Without a policy, it is compared with the base as it was trained on, the saved adapter in place. A QLoRA adapter goes
    onto the dequantised weights it was trained on, or onto the original ones (`merge_onto`), which differ by what
    quantising lost. Raises: ModelError if the adapter was made for another base, or if the two differ by more than they may.
    """
    check_base(adapter, Path(base))
    keys = keys.model_copy(update={"base_model": base})
    onto = keys.merge_onto if keys.base_bits else "base"
    quantised: Any = None if policy is None else policy.model
    tokenizer = adapter_tokenizer(base, adapter, keys) if policy is None else policy.tokenizer
    if keys.base_bits and policy is None:
        quantised = load_base(keys, trainable=False)[0]
        grow(quantised, tokenizer, keys)
        quantised = load_adapter(quantised, adapter)
        trained = probe_logits(quantised)
    sharding = Whole() if policy is None else policy.sharding

    def read() -> PreTrainedModel:
        shares = sharding if fits_shares(adapter) and not keys.added_tokens else None
        # What is trained whole is a copy in the base's dtype, which float32 would be rounded to.
        is_whole = keys.added_tokens or adapter_config(adapter).get("modules_to_save")
        model = None if sharding.is_sharded or is_whole else read_as_filed(keys)
        model = read_model(keys, torch.float32, shares) if model is None else model
        grow(model, tokenizer, keys)
        return model

    bound = ROUNDING
    if onto == "original":
        # Training did not undo what quantising did to the base: the merged model may be off by as much, and some more.
        original = probe_logits(sharding.shard(read()))
        with quantised.disable_adapter():
            bound = QUANTISATION * relative_difference(original, probe_logits(quantised))
    elif onto == "base" and policy is not None and policy.base_moved and policy.placement.autocast_dtype is not None:
        bound = HALF_ROUNDING  # what its init left of the base was rounded to the base's own dtype
    unpack = {}
    if onto == "dequantized":
        unpack = dequantized_weights(quantised, None if policy is None else policy.offloaded)
    adapted = load_adapter(read(), adapter)
    trained = probe_logits(adapted) if trained is None else trained
    if sharding.is_sharded:
        model = sharding.shard(_merged_in_shares(adapted, unpack, sharding))
        logits = probe_logits(model)
    else:
        sharding = MergedByLayer(adapted, unpack)
        with sharding.running() as model:
            logits = probe_logits(model)
    return Merged(model, sharding, logits, compared(trained, logits, onto, bound))


def _merged_in_shares(adapted: Any, unpack: Mapping[str, Unpack], sharding: Sharding) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    linears = {name.removesuffix(".base_layer"): module for name, module in adapted.get_base_model().named_modules()}
    with torch.no_grad():
        for name, weight in unpack.items():
            sharding.fill(linears[name].weight, as_held(linears[name], weight()))
    for module in [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
        with sharding.gathered(module):
            module.merge(safe_merge=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return adapted.merge_and_unload(safe_merge=True)


def merge_into(folder: Path, base: str, adapter: Path, keys: ModelKeys) -> ExportReport:
    """`merge`, written to `folder` with the adapter's tokenizer, or the base's where the adapter has none."""
    asked = REWARD_TASKS.get(adapter_config(adapter).get("task_type", ""))
    if asked is not None:
        keys = asked.model_validate(keys.model_dump(by_alias=True))
    merged = merge_adapter(base, adapter, keys)
    keys = keys.model_copy(update={"base_model": base})
    tokenizer = adapter_tokenizer(base, adapter, keys)
    separator = recorded_separator(adapter)
    record = {"base_digest": source_digest(base), "merged_onto": merged.report.base}
    record |= {} if separator is None else {STEP_SEPARATOR: separator}
    return _save(_Export(merged.model, tokenizer, keys, merged.logits, merged.report), folder, record, merged.sharding)


def adapter_tokenizer(base: str, adapter: Path, keys: ModelKeys) -> PreTrainedTokenizerBase:
    """The tokenizer saved with an adapter, or the base's where it has none."""
    source = str(adapter) if (adapter / "tokenizer_config.json").exists() else base
    own = {"tokenizer_name_or_path": None} if source != base else {}
    return load_tokenizer(keys.model_copy(update={"base_model": source, "chat_template": None} | own))
