"""What the key models say about themselves, as text a person reads: type, range, default, nearest name."""

from __future__ import annotations

import difflib
import json
import math
import re
import types
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from posttrain.config.knob import Keys
from posttrain.config.yaml_lines import KeyPath

_CLOSE, _AS_CLOSE = 0.6, 0.15
CLOSE_KEYS = 0.75
"""Keys are long and share words: what is less alike is mostly another key of another tool."""
_ALSO = re.compile(r"(\w+)(?: \(([^)]*)\))?")
_BOUNDS = ((Gt, ">", "gt"), (Ge, "≥", "ge"), (Lt, "<", "lt"), (Le, "≤", "le"))


@dataclass(frozen=True, slots=True)
class ForeignName:
    """What another tool calls a key; `tools` is empty for a common short form."""

    name: str
    tools: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.tools)})" if self.tools else self.name


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as a person reads about it."""

    name: str
    attribute: str
    meaning: str
    type: str
    default: str
    required: bool
    also: tuple[ForeignName, ...]
    example: str
    annotation: Any


@cache
def keys_of(model: type[Keys]) -> dict[str, KeyInfo]:
    """The keys of a group by the name they have in YAML, in the order of the schema."""
    return {field.alias or attribute: _info(attribute, field) for attribute, field in model.model_fields.items()}


def _info(attribute: str, field: FieldInfo) -> KeyInfo:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if isinstance(default, Keys):
        default = default.model_dump(by_alias=True)
    example = extra.get("example", default)
    return KeyInfo(
        name=field.alias or attribute,
        attribute=attribute,
        meaning=field.description or "",
        type=type_text(field.annotation) + range_text(field),
        default="required" if field.is_required() else show_value(default),
        required=field.is_required(),
        also=tuple(
            ForeignName(name, tuple(tool for tool in tools.split(", ") if tool))
            for name, tools in _ALSO.findall(str(extra.get("also", "")))
        ),
        example="" if example is None else show_value(example),
        annotation=field.annotation,
    )


def arms(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, `None` left out; anything else is its own only member."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(arm for arm in get_args(annotation) if arm is not type(None))
    return (annotation,)


def group_in(annotation: Any) -> type[Keys] | None:
    """The group of keys that a value of this type is, if any arm is one."""
    return next((arm for arm in arms(annotation) if isinstance(arm, type) and issubclass(arm, Keys)), None)


def annotation_below(annotation: Any, step: str | int) -> Any:
    """The type of an item or key of a value of type `annotation`; None where the type has none."""
    for arm in arms(annotation):
        if isinstance(arm, type) and issubclass(arm, Keys):
            info = keys_of(arm).get(str(step))
            if info:
                return info.annotation
        elif get_origin(arm) is list and isinstance(step, int):
            return get_args(arm)[0]
        elif get_origin(arm) is dict and isinstance(step, str):
            return get_args(arm)[1]
    return None


def annotation_at(annotation: Any, path: KeyPath) -> Any:
    for step in path:
        annotation = annotation_below(annotation, step)
    return annotation


def type_text(annotation: Any) -> str:
    """A type in words: `one of none, lora, qlora`."""
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    words: list[str] = []
    for arm in arms(annotation):
        if get_origin(arm) is Literal:
            choices = ", ".join(str(choice) for choice in get_args(arm))
            words.append(f"one of {choices}" if len(get_args(arm)) > 1 else choices)
        elif get_origin(arm) is list:
            inner = get_args(arm)[0]
            said = get_origin(inner) is Literal and inner in arms(annotation)
            words.append("a list of them" if said else f"a list of {_plural(inner)}")
        elif get_origin(arm) is dict:
            words.append(f"a mapping of names to {_plural(get_args(arm)[1])}")
        elif isinstance(arm, type) and issubclass(arm, Keys):
            words.append("a mapping with " + ", ".join(keys_of(arm)))
        else:
            words.append(plain.get(arm, "any value"))
    return " or ".join(words)


def _plural(annotation: Any) -> str:
    plural = {int: "integers", float: "numbers", bool: "true or false", str: "strings"}
    if get_origin(annotation) is dict:
        return "mappings"
    if get_origin(annotation) is Literal:
        return ", ".join(str(choice) for choice in get_args(annotation))
    group = group_in(annotation)
    if group:
        return "mappings with " + ", ".join(keys_of(group))
    return plural.get(annotation, "any value")


def range_text(field: FieldInfo) -> str:
    """The bounds of a number: ` (> 0, < 1)`."""
    bounds = [
        f"{sign} {show_value(getattr(item, attribute))}"
        for kind, sign, attribute in _BOUNDS
        for item in field.metadata
        if isinstance(item, kind)
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


def show_value(value: Any) -> str:
    """A value as one would write it in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return value if value and "\n" not in value else json.dumps(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show_value(item)}" for key, item in value.items()) + "}"
    return str(value)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    text = repr(value)
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if mark else text


def nearest(name: str, names: Iterable[str], cutoff: float = _CLOSE) -> list[str]:
    """At most three of `names` that `name` may have been meant for, the best first."""
    by_folded = {_folded(other): other for other in names}
    close = difflib.get_close_matches(_folded(name), list(by_folded), n=3, cutoff=cutoff)
    likeness = {other: difflib.SequenceMatcher(None, other, _folded(name)).ratio() for other in close}
    best = max(likeness.values(), default=0.0)
    return [by_folded[other] for other in close if likeness[other] > best - _AS_CLOSE]


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")


def did_you_mean_or_one_of(name: str, known: Collection[str]) -> str:
    """`; did you mean a?`, or all there are."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(known)}"


def did_you_mean(name: str, names: Iterable[str], cutoff: float = _CLOSE) -> str:
    """`; did you mean a or b?`, or nothing."""
    close = nearest(name, names, cutoff)
    return f"; did you mean {' or '.join(close)}?" if close else ""
