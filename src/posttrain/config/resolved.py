"""A loaded configuration written out: every key with its value, defaults included."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config.knob import Keys
from posttrain.config.paths import make_relative
from posttrain.config.pipeline import PipelineKeys, in_pipeline
from posttrain.config.schema import keys_of
from posttrain.config.settings import PROJECT_KEY
from posttrain.config.stages import TrainKeys
from posttrain.config.yaml_lines import KeyPath, dump_yaml

KeysT = TypeVar("KeysT", bound=TrainKeys)

SCHEMA = 1
"""Version of the keys. What changed with each is in the table of `migrate.py`."""
SCHEMA_KEY = "schema"

PIPELINE_DECIDES = ("base_model", "output_dir")
"""Keys that a stage has when it is alone, and that a pipeline sets for its stages."""


def resolved_yaml(keys: Keys, project: Path | None = None, folder: Path | None = None) -> str:
    """YAML of every key with the schema it is written in, which loads again to an equal object.

    Paths below `project` are written relative to it, and where it lies from the YAML's `folder`, so both can be moved.
    """
    if project is None or folder is None:
        return dump_yaml({SCHEMA_KEY: SCHEMA, **to_data(keys)})
    root, place = project.resolve(), folder.resolve()
    where = os.path.relpath(root, place) if place.is_relative_to(root) else str(root)
    return dump_yaml({SCHEMA_KEY: SCHEMA, PROJECT_KEY: where, **project_data(keys, root)})


def project_data(keys: Keys, project: Path) -> dict[str, Any]:
    """`to_data` with the paths below `project` relative to it."""
    data = to_data(keys)
    if not isinstance(keys, PipelineKeys):
        make_relative(data, type(keys), project)
        _relative_changes(data, type(keys), project)
        return data
    kinds = [stage.kind for stage in keys.stages]
    for entry in data["stages"]:
        ((kind, body),) = entry.items()
        make_relative(body, in_pipeline(kind), project)
        _relative_changes(body, in_pipeline(kind), project)
    make_relative(data, PipelineKeys, project)
    retried = _retry(data)
    if retried is not None:
        kind = retried if isinstance(retried, str) else kinds[retried - 1]
        _relative_changes(data, in_pipeline(kind), project)
    return data


def _retry(data: Mapping[str, Any]) -> str | int | None:
    """The stage that the gate in `data` loops back to."""
    on_fail = (data.get("gate") or {}).get("on_fail")
    return on_fail["retry"] if isinstance(on_fail, dict) else None


def _relative_changes(data: Mapping[str, Any], model: type[Keys], project: Path) -> None:
    """The paths among the keys that a loop-back changes, in place."""
    if _retry(data) is not None:
        make_relative(data["gate"]["on_fail"]["with"], model, project)


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


def apply_changes(keys: KeysT, changes: Mapping[str, Any]) -> KeysT:
    """`keys` with `changes` (of `on_fail.with`, checked at load), validated as a whole."""
    present = keys.model_dump(by_alias=True)
    if "adapter" in changes:
        present.pop("load_in_4bit")  # it was implied by the old adapter
        if changes["adapter"] != "lora":
            present.pop("load_in_8bit")  # which only that one has
    return type(keys).model_validate(present | dict(changes))
