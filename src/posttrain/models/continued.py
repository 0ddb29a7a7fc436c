"""An adapter that a later stage trains on (`adapter_start: continue`): where it lies, and how the base that it is for loads."""

from __future__ import annotations

from pathlib import Path

from posttrain.config.load import load_model_keys
from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.models.low_rank import CONFIG
from posttrain.models.provenance import check_base

ADAPTER = "adapter"
"""Folder beside a stage's `model`: what that stage trained."""
OF_THE_BASE = ("base_model", "revision", "added_tokens", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")  # fmt: skip
"""Keys that decide which numbers lie under an adapter."""
_PRECISIONS = {
    4: ("4 bits", "adapter: qlora"),
    8: ("8 bits", "load_in_8bit: true"),
    None: ("its own precision", "adapter: lora, load_in_8bit: false"),
}


def is_continued(keys: ModelKeys) -> bool:
    return keys.adapter != "none" and keys.adapter_start == "continue"


def adapter_before(keys: ModelKeys) -> Path:
    """The adapter of the stage that made `base_model`. Raises: ModelError where there is none."""
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
    made = base_keys(stage_keys(adapter.parent))
    if made.base_bits != keys.base_bits:
        bits, wanted = _PRECISIONS[made.base_bits]
        raise ModelError(
            f"adapter_start: continue: {adapter} was trained on a base in {bits}; set {wanted}, or adapter_start: fresh"
        )
    check_base(adapter, Path(made.base_model))
    return keys.model_copy(update={name: getattr(made, name) for name in OF_THE_BASE})


def stage_keys(stage: Path) -> ModelKeys:
    """How the stage in this folder loaded its model. Raises: ModelError without its record, ConfigError."""
    path = stage / "config.yaml"
    if not path.is_file():
        raise ModelError(f"{path} is not there; expected the keys of the stage that made {stage / ADAPTER}")
    return load_model_keys(path)
