"""A loaded configuration written out: every key with its value, defaults included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from posttrain.config.knob import Keys
from posttrain.config.pipeline import PipelineKeys
from posttrain.config.schema import keys_of
from posttrain.config.stages import TrainKeys
from posttrain.config.yaml_lines import KeyPath, dump_yaml

Stage = TypeVar("Stage", bound=TrainKeys)

SCHEMA = 1
"""Version of the keys. What changed with each is in the table of `migrate.py`."""
SCHEMA_KEY = "schema"

PIPELINE_DECIDES = ("base_model", "output_dir")
"""Keys that a stage has when it is alone, and that a pipeline sets for its stages."""


def resolved_yaml(keys: Keys) -> str:
    """YAML of every key with the schema it is written in, which loads again to an equal object."""
    return dump_yaml({SCHEMA_KEY: SCHEMA, **to_data(keys)})


def to_data(keys: Keys) -> dict[str, Any]:
    """Plain data in the form of the YAML; null stands for what is unset."""
    if not isinstance(keys, PipelineKeys):
        return keys.model_dump(mode="json", by_alias=True)
    data = keys.model_dump(mode="json", by_alias=True, exclude={"stages"})
    stages = [
        {stage.kind: {k: v for k, v in to_data(stage.keys).items() if k not in PIPELINE_DECIDES}}
        for stage in keys.stages
    ]
    order = list(keys_of(PipelineKeys))
    return {key: stages if key == "stages" else data[key] for key in order}


def leaves(keys: Keys) -> Iterator[tuple[KeyPath, Any]]:
    """Every key with its value, inner groups opened: `(("datasets", 0, "path"), "/data/sft.jsonl")`."""
    for name, info in keys_of(type(keys)).items():
        value = getattr(keys, info.attribute)
        if isinstance(keys, PipelineKeys) and name == "stages":
            for place, stage in enumerate(value):
                skipped = (path for path in leaves(stage.keys) if path[0][0] not in PIPELINE_DECIDES)
                yield from ((("stages", place, *path), item) for path, item in skipped)
        else:
            yield from _opened((name,), value)


def _opened(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, Keys):
        yield from (((*path, *inner), item) for inner, item in leaves(value))
    elif isinstance(value, list) and value and isinstance(value[0], Keys):
        for place, item in enumerate(value):
            yield from _opened((*path, place), item)
    elif isinstance(value, dict) and value and all(isinstance(item, Keys) for item in value.values()):
        for name, item in value.items():
            yield from _opened((*path, name), item)
    else:
        yield path, value


def apply_changes(keys: Stage, changes: Mapping[str, Any]) -> Stage:
    """`keys` with `changes` (of `on_fail.with`, checked at load), validated as a whole."""
    present = keys.model_dump(by_alias=True)
    if "adapter" in changes:
        present.pop("load_in_4bit")  # it was implied by the old adapter
    return type(keys).model_validate(present | dict(changes))
