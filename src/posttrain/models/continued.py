"""An adapter that a later stage trains on (`adapter_start: continue`): where it lies, and how the base that it is for loads."""

from __future__ import annotations

import logging
from pathlib import Path

from posttrain.config.load import load_model_keys
from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.models.low_rank import CONFIG, WEIGHTS, adapter_config, adapter_weights
from posttrain.models.provenance import PROVENANCE, check_base, recorded_bits

log = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Folder beside a stage's `model`: what that stage trained."""
_MOVE_THE_BASE = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")
"""Inits of PEFT that leave less, or another, base under the adapter."""
OF_THE_BASE = ("base_model", "revision", "added_tokens", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")  # fmt: skip
"""Keys that decide which numbers lie under an adapter."""
_PRECISIONS = {
    4: ("4 bits", "adapter: qlora"),
    8: ("8 bits", "load_in_8bit: true"),
    None: ("its own precision", "adapter: lora, load_in_8bit: false"),
}


def is_continued(keys: ModelKeys) -> bool:
    return keys.adapter != "none" and (keys.adapter_start == "continue" or keys.adapter_name_or_path is not None)


def adapter_before(keys: ModelKeys) -> Path:
    """The adapter that is named, or that of the stage that made `base_model`. Raises: ModelError where there is none."""
    if keys.adapter_name_or_path is not None:
        return Path(keys.adapter_name_or_path)
    adapter = Path(keys.base_model).parent / ADAPTER
    if not (Path(keys.base_model).is_dir() and (adapter / CONFIG).is_file()):
        raise ModelError(
            f"adapter_start: continue: there is no adapter to train on beside {keys.base_model}; expected the model/ of a stage "
            "that trained one; set adapter_start: fresh"
        )
    return adapter


def base_keys(keys: ModelKeys) -> ModelKeys:
    """`keys` with those of the base that the adapter is for: its own, or the one under the adapter that is trained on.

    Raises: ModelError where that adapter does not fit these keys, or its base is no longer what it was.
    """
    if not is_continued(keys):
        return keys
    adapter = adapter_before(keys)
    if keys.adapter_name_or_path is not None:
        _check_given(adapter, keys)
        return keys.model_copy()
    made = base_keys(stage_keys(adapter.parent))
    if made.base_bits != keys.base_bits:
        bits, wanted = _PRECISIONS[made.base_bits]
        raise ModelError(
            f"adapter_start: continue: {adapter} was trained on a base in {bits}; set {wanted}, or adapter_start: fresh"
        )
    check_base(adapter, Path(made.base_model))
    return keys.model_copy(update={name: getattr(made, name) for name in OF_THE_BASE})


def _check_given(adapter: Path, keys: ModelKeys) -> None:
    """Raises: ModelError for a folder that is no LoRA adapter, or one that was trained on another base than these keys load."""
    key = f"adapter_name_or_path: {adapter}"
    if not (adapter / CONFIG).is_file() or not (adapter / WEIGHTS).is_file():
        raise ModelError(
            f"{key} has no {CONFIG} with {WEIGHTS} beside it; expected the folder of a LoRA adapter, as PEFT saves it"
        )
    config = adapter_config(adapter)
    adapter_weights(adapter)
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(f"{key} is an adapter of the kind {kind}; expected LORA")
    ours, init = (adapter / PROVENANCE).is_file(), config.get("init_lora_weights", True)
    if not ours and str(init).startswith(_MOVE_THE_BASE):
        raise ModelError(
            f"{key} began as {init}, which moves a part of the base into the adapter, so that it stands on another base; convert it with PEFT "
            "(path_initial_model_for_weight_conversion of save_pretrained), or merge it and name the merged model"
        )
    bits = recorded_bits(adapter) if ours else {}
    if ours and (found := 4 if bits.get("load_in_4bit") else 8 if bits.get("load_in_8bit") else None) != keys.base_bits:
        said, wanted = _PRECISIONS[found]
        raise ModelError(f"{key} was trained on a base in {said}; set {wanted}")
    check_base(adapter, Path(keys.base_model))
    named = str(config.get("base_model_name_or_path") or "")
    if not ours and named and Path(named).name.lower() != Path(keys.base_model).name.lower():
        log.warning("%s names %s as its base, and base_model is %s; taken as the same", key, named, keys.base_model)


def stage_keys(stage: Path) -> ModelKeys:
    """How the stage in this folder loaded its model. Raises: ModelError without its record, ConfigError."""
    path = stage / "config.yaml"
    if not path.is_file():
        raise ModelError(f"{path} is not there; expected the keys of the stage that made {stage / ADAPTER}")
    return load_model_keys(path)
