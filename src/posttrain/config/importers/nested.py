"""Nested keys of other tools by their path (`optimizer.lr`), and OmegaConf's `${…}` in their values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.config.yaml_lines import parse_value

_REFERENCE = re.compile(r"\$\{\s*(?:oc\.(?:env|select):)?([\w.@-]+)\s*(?:,([^{}]*))?\}")
_SELECT = re.compile(r"\$\{\s*oc\.select:\s*([\w@-][\w.@-]*)\s*,([^{}]*)\}")
_MANDATORY = "???"
_NAMED = re.compile(r"\$[\w{(]")


def by_path(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every inner key by its path; lists are values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from by_path(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with `${other.key}` replaced where that key is there, and `${oc.select:other.key,4}` by its default where it is not; the rest stays as it is written."""
    return {key: _resolve(value, values, depth=8) for key, value in values.items()}


def unresolved(value: Any) -> bool:
    """Whether there is a name in it that only a shell or OmegaConf would know."""
    if isinstance(value, list | Mapping):
        return any(unresolved(item) for item in (value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, str) and (value == _MANDATORY or _NAMED.search(value) is not None)


def _resolve(value: Any, values: Mapping[str, Any], depth: int) -> Any:
    if isinstance(value, list):
        return [_resolve(item, values, depth) for item in value]
    if isinstance(value, Mapping):
        return {key: _resolve(item, values, depth) for key, item in value.items()}
    if not isinstance(value, str) or not depth:
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole and whole[1] in values:
        return _resolve(values[whole[1]], values, depth - 1)
    if select := _SELECT.fullmatch(value):
        return parse_value(select[2])

    def found(match: re.Match[str]) -> str:
        return str(_resolve(values[match[1]], values, depth - 1)) if match[1] in values else match[0]

    return _REFERENCE.sub(found, value)


def part_of(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keys under `name`, without it; those further in are mappings again."""
    part: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith(f"{name}."):
            *outer, last = key.removeprefix(f"{name}.").split(".")
            place = part
            for step in outer:
                place = place.setdefault(step, {})
            place[last] = value
    return part
