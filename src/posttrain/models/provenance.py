"""Which weights a folder holds and what they were made from, by digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.files import digest_tree, read_json

PROVENANCE = "posttrain.json"
"""Beside the weights: what they were made from, by digest. It names no path, so the same model is the same anywhere."""

STEP_SEPARATOR = "step_separator"
"""In that record: what stood behind each step that a process reward model learned to rate."""


def model_digest(folder: Path) -> str:
    """Digest of a model folder: weights, config, tokenizer, template and our record of what it was made from."""
    return digest_tree(folder)


def source_digest(source: str) -> str:
    """Digest of a local base model; a hub id stands for itself."""
    return model_digest(Path(source)) if Path(source).is_dir() else f"hub:{source}"


def was_tuned_by_us(source: str) -> bool:
    """Whether our record says that a stage made this model."""
    return (Path(source) / PROVENANCE).is_file()


def recorded_bits(adapter: Path) -> dict[str, Any]:
    """The keys of the quantised base that the adapter was trained on, as its record has them; none for any other base."""
    record_path = adapter / PROVENANCE
    return bits_in(read_json(record_path)) if record_path.is_file() else {}


def bits_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say how a base is quantised; none where it is not."""
    quantised = record.get("load_in_4bit") or record.get("load_in_8bit")
    return {name: value for name, value in record.items() if "4bit" in name or "8bit" in name} if quantised else {}


def recorded_separator(folder: Path) -> str | None:
    """What cuts answers into the steps that a model or adapter rates; None where no record says it."""
    record_path = folder / PROVENANCE
    return read_json(record_path).get(STEP_SEPARATOR) if record_path.is_file() else None


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
