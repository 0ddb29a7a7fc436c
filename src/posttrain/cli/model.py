"""The MODEL argument of a verb: a folder in Hugging Face form, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ModelError

if TYPE_CHECKING:
    from posttrain.config.pipeline import PipelineKeys
    from posttrain.config.stages import ModelKeys


def model_keys(model: str) -> ModelKeys:
    """Keys to load `model` with. Raises: ModelError for a folder that is not there, or that holds only an adapter."""
    from posttrain.config.places import is_an_adapter, looks_local
    from posttrain.config.stages import ModelKeys

    folder = Path(model).expanduser()
    if looks_local(model) and not folder.is_dir():
        raise ModelError(f"{model}: no such folder; expected a model folder with config.json, or a hub id")
    if is_adapter(folder) and not (folder / "config.json").exists():
        raise ModelError(is_an_adapter(model))
    return ModelKeys(base_model=str(folder) if folder.is_dir() else model)


def with_base(keys: PipelineKeys) -> PipelineKeys:
    """The keys with a registered version (`NAME@ALIAS`, `alias:NAME`) for a base read as its folder, as `run` reads it."""
    if "@" not in keys.base_model and not keys.base_model.startswith("alias:"):
        return keys
    from posttrain.pipeline.generation import from_version
    from posttrain.pipeline.state import RunState

    return from_version(keys, RunState.load(Path(keys.output_dir)))[0]


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def has_files(model: str) -> bool:
    """Whether more of a model than its config.json is in its folder, or in the hub's cache: what a run would ask of its files can be asked."""
    folder = Path(model)
    if folder.is_dir():
        return any(path.name.startswith("tokenizer") or path.suffix == ".safetensors" for path in folder.iterdir())
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "tokenizer_config.json"), str)
