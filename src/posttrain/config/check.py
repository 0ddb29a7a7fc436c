"""Settings in, a key model out; whatever is wrong becomes one line per key, never a raw dump."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from posttrain.config.foreign import translate, unknown_key
from posttrain.config.knob import Keys
from posttrain.config.paths import resolve_paths
from posttrain.config.schema import annotation_at, annotation_below, arms, did_you_mean, group_in, keys_of, show_value
from posttrain.config.settings import Problems, Settings, dotted, holds
from posttrain.config.stages import TrainKeys
from posttrain.config.yaml_lines import KeyPath
from posttrain.uris import SECRET_IN_COMMAND, SECRET_IN_URI, command_holds_secret, holds_secret

KeysModel = TypeVar("KeysModel", bound=Keys)
_LONGEST_VALUE = 60


def build(
    model: type[KeysModel], settings: Settings, kind: str, folder: Path, problems: Problems, notes: list[str]
) -> KeysModel | None:
    """The model that `settings` describe, paths resolved; None where something is wrong.

    `kind` is the stage kind, `pipeline` or `gate`: what messages call it. Values of `settings` are changed in place.
    """
    notes += _translate_nested(settings, model, problems)
    before = len(problems.found)
    for path, value in _booleans_for_numbers(settings.values, model, ()):
        problems.add(settings.origin(path), settings.name(path), _got(model, path, value))
    for path, message in _secrets(settings.values, ()):
        problems.add(settings.origin(path), settings.name(path), message)
    resolve_paths(settings, model, folder, problems)
    try:
        built = model.model_validate(settings.values)
    except ValidationError as error:
        _report(error, model, settings, kind, problems)
        return None
    return built if len(problems.found) == before else None


def _translate_nested(settings: Settings, model: type[Keys], problems: Problems) -> list[str]:
    """Other tools' names inside lists of groups (`datasets`)."""
    notes: list[str] = []
    for key, info in keys_of(model).items():
        group = group_in(annotation_below(info.annotation, 0))
        items = settings.values.get(key)
        if group is None or not isinstance(items, list):
            continue
        for place, item in enumerate(items):
            if isinstance(item, dict):
                inner = settings.below((key, place))
                notes += translate(inner, group, problems)
                for known in [known for known in settings.origins if known[:2] == (key, place) and len(known) > 2]:
                    del settings.origins[known]
                settings.origins.update({(key, place, *path): origin for path, origin in inner.origins.items()})
                items[place] = inner.values
    return notes


def _booleans_for_numbers(value: Any, annotation: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """`lora_r: true` would pass as 1."""
    if isinstance(value, bool):
        kinds = {type(choice) for arm in arms(annotation) for choice in get_args(arm)} | set(arms(annotation))
        if kinds & {int, float} and bool not in kinds:
            yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _booleans_for_numbers(item, annotation_below(annotation, key), (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _booleans_for_numbers(item, annotation_below(annotation, place), (*path, place))


def _secrets(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Where a URI or a server's command holds a password, and what to say."""
    if isinstance(value, str) and holds_secret(value):
        yield path, SECRET_IN_URI
    elif isinstance(value, str) and value.startswith(("mcp:", "verifiers:")) and command_holds_secret(value):
        yield path, SECRET_IN_COMMAND
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _secrets(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _secrets(item, (*path, place))


def _report(error: ValidationError, model: type[Keys], settings: Settings, kind: str, problems: Problems) -> None:
    texts: dict[KeyPath, str] = {}
    for item in error.errors(include_url=False):
        path = _data_path(settings.values, item["loc"], ends_outside=item["type"] == "missing")
        texts.setdefault(path, _text(item, path, model, settings, kind))
    for path, text in texts.items():
        # A union reports every arm that failed; the arm that got furthest is the one that was meant.
        if not any(other[: len(path)] == path and other != path for other in texts):
            named = path or _first_key_named(text, settings)
            problems.add(settings.origin(named), settings.name(named), text)


def _data_path(values: Mapping[str, Any], loc: tuple[int | str, ...], *, ends_outside: bool) -> KeyPath:
    """`loc` without the steps that name a union's arm instead of a place in the data."""
    path: list[int | str] = []
    value: Any = values
    for step in loc[:-1] if ends_outside else loc:
        if holds(value, step):
            value = value[step]
            path.append(step)
    return (*path, loc[-1]) if ends_outside else tuple(path)


def _text(item: Any, path: KeyPath, model: type[Keys], settings: Settings, kind: str) -> str:
    match item["type"]:
        case "value_error":
            return str(item["ctx"]["error"])
        case "extra_forbidden":
            group = group_in(annotation_at(model, path[:-1])) or model
            *above, key = path
            if above:
                return unknown_key(str(key), str(above[0]), [group])
            return unknown_key(str(key), kind, [group, TrainKeys] if kind == "pipeline" else [group])
        case "missing":
            return _missing(path, model, kind)
        case _:
            return _got(model, path, _value(settings.values, path))


def _missing(path: KeyPath, model: type[Keys], kind: str) -> str:
    group = group_in(annotation_at(model, path[:-1])) or model
    info = keys_of(group)[str(path[-1])]
    *above, _ = path
    whose = f"every {kind} configuration" if not above else dotted(tuple(above))
    if above and isinstance(above[-1], int):
        whose = f"each entry of {dotted(tuple(above[:-1]))}"
    return f"missing; {whose} needs it; e.g. {info.name}: {info.example}"


def _got(model: type[Keys], path: KeyPath, value: Any) -> str:
    """`got 'fast', expected a number (> 0); e.g. learning_rate: 1e-5`."""
    depth = next((n for n in range(len(path), 0, -1) if _is_key(model, path[:n])), 1)
    group = group_in(annotation_at(model, path[: depth - 1])) or model
    info = keys_of(group)[str(path[depth - 1])]
    shown = repr(value) if isinstance(value, str) else show_value(value)
    shown = shown if len(shown) <= _LONGEST_VALUE else shown[: _LONGEST_VALUE - 1] + "…"
    choices = [choice for arm in arms(info.annotation) for choice in get_args(arm) if isinstance(choice, str)]
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    if not hint and info.example and info.example not in ("[]", "{}", '""'):
        hint = f"; e.g. {info.name}: {info.example}"
    return f"got {shown}, expected {info.type}{hint}"


def _is_key(model: type[Keys], path: KeyPath) -> bool:
    *above, key = path
    group = group_in(annotation_at(model, tuple(above))) if above else model
    return group is not None and key in keys_of(group)


def _value(values: Any, path: KeyPath) -> Any:
    for step in path:
        values = values[step]
    return values


def _first_key_named(text: str, settings: Settings) -> KeyPath:
    """A rule about several keys is reported at the first one that it names and the user set."""
    words = re.findall(r"\w+", text)
    return next(((word,) for word in words if word in settings.values), ())
