"""Strict JSON and a subset of JSON Schema, so that a schema-valid answer is not filler.

Stricter than the standard on purpose: a duplicate key, NaN or Infinity is no JSON, and an object with `properties`
takes no other keys unless `additionalProperties` says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

_MAX_CHARS = 200_000
_MAX_DEPTH = 40
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL)


class NotJsonError(ValueError):
    """The text is not one strict JSON value."""


def read_json_text(text: str) -> Any:
    """The one JSON value that `text` is, alone or in one fence. Raises: NotJsonError."""
    text = text.strip()
    if fenced := _FENCED.fullmatch(text):
        text = fenced.group(1)
    if len(text) > _MAX_CHARS:
        raise NotJsonError(f"{len(text)} characters; at most {_MAX_CHARS}")
    if _depth(text) > _MAX_DEPTH:
        raise NotJsonError(f"nested deeper than {_MAX_DEPTH}")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except ValueError as error:  # also int() on more digits than Python converts
        raise NotJsonError(str(error)) from None


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in re.findall(r"[\[{}\]]", text):
        depth += 1 if character in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise NotJsonError("duplicate key")
    return result


def _no_constant(name: str) -> Any:
    raise NotJsonError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise NotJsonError(f"{text} is not finite")
    return value


def same_json(got: Any, expected: Any) -> bool:
    """Deep equality in which 1, 1.0 and true are three things; floats agree to 1e-9 relative."""
    if type(got) is not type(expected):
        return False
    if isinstance(expected, dict):
        left, right = cast("dict[Any, Any]", got), cast("dict[Any, Any]", expected)
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in right)
    if isinstance(expected, list):
        ours, theirs = cast("list[Any]", got), cast("list[Any]", expected)
        return len(ours) == len(theirs) and all(same_json(a, b) for a, b in zip(ours, theirs, strict=True))
    if isinstance(expected, float):
        return math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-12)
    return bool(got == expected)


# --- the keywords --------------------------------------------------------------------------------------------------

_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
Schema = Mapping[str, Any]


def _is_type(value: Any, names: Any, _: Schema) -> bool:
    return any(_TYPES[name](value) for name in ([names] if isinstance(names, str) else names))


def _object(value: Any, properties: Any, schema: Schema) -> bool:
    if not isinstance(value, dict):
        return True
    items = cast("dict[str, Any]", value)
    extra = schema.get("additionalProperties", False)
    for key, item in items.items():
        rule = properties.get(key, extra)
        if rule is False or (rule is not True and not conforms(item, rule)):
            return False
    return True


def _length_rule(of: type, at_least: bool) -> Callable[[Any, Any, Schema], bool]:
    def rule(value: Any, bound: Any, _: Schema) -> bool:
        return not isinstance(value, of) or (len(value) >= bound if at_least else len(value) <= bound)

    return rule


def _number_rule(holds: Callable[[Any, Any], bool]) -> Callable[[Any, Any, Schema], bool]:
    return lambda value, bound, _: not _TYPES["number"](value) or holds(value, bound)


def _unique_items(value: Any, wanted: Any, _: Schema) -> bool:
    if not wanted or not isinstance(value, list):
        return True
    texts = [json.dumps(item, sort_keys=True) for item in cast("list[Any]", value)]
    return len(set(texts)) == len(texts)


_KEYWORDS: dict[str, Callable[[Any, Any, Schema], bool]] = {
    "type": _is_type,
    "enum": lambda v, options, _: any(same_json(v, option) for option in options),
    "const": lambda v, expected, _: same_json(v, expected),
    "properties": _object,
    "additionalProperties": lambda v, _, schema: "properties" in schema or _object(v, {}, schema),
    "required": lambda v, names, _: not isinstance(v, dict) or all(name in v for name in names),
    "items": lambda v, rule, _: not isinstance(v, list) or all(conforms(item, rule) for item in cast("list[Any]", v)),
    "uniqueItems": _unique_items,
    "minItems": _length_rule(list, True),
    "maxItems": _length_rule(list, False),
    "minLength": _length_rule(str, True),
    "maxLength": _length_rule(str, False),
    "minProperties": _length_rule(dict, True),
    "maxProperties": _length_rule(dict, False),
    "minimum": _number_rule(lambda v, bound: v >= bound),
    "maximum": _number_rule(lambda v, bound: v <= bound),
    "exclusiveMinimum": _number_rule(lambda v, bound: v > bound),
    "exclusiveMaximum": _number_rule(lambda v, bound: v < bound),
    "pattern": lambda v, pattern, _: not isinstance(v, str) or re.search(pattern, v[:10_000]) is not None,
    "anyOf": lambda v, rules, _: any(conforms(v, rule) for rule in rules),
    "allOf": lambda v, rules, _: all(conforms(v, rule) for rule in rules),
    "oneOf": lambda v, rules, _: sum(conforms(v, rule) for rule in rules) == 1,
    "not": lambda v, rule, _: not conforms(v, rule),
}
_SILENT = frozenset(("$schema", "$id", "title", "description", "default", "examples", "format"))


def check_schema(schema: Any) -> None:
    """Raises: ValueError for a schema this module would not apply in full."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"schema is {type(schema).__name__}, expected an object")
    table = cast("Schema", schema)
    if unknown := sorted(set(table) - set(_KEYWORDS) - _SILENT):
        raise ValueError(f"schema keyword {unknown[0]!r} is not supported; use {', '.join(sorted(_KEYWORDS))}")
    names = table.get("type", [])
    if bad := [name for name in ([names] if isinstance(names, str) else names) if name not in _TYPES]:
        raise ValueError(f"schema type {bad[0]!r} is unknown; expected one of {', '.join(_TYPES)}")
    nested = [*table.get("properties", {}).values(), *(table[key] for key in ("items", "not") if key in table)]
    nested += [rule for key in ("anyOf", "allOf", "oneOf") for rule in table.get(key, [])]
    for rule in [*nested, table.get("additionalProperties", False)]:
        check_schema(rule)


def conforms(value: Any, schema: Any) -> bool:
    """Whether a parsed value fits a schema that `check_schema` accepted."""
    if isinstance(schema, bool):
        return schema
    table = cast("Schema", schema)
    return all(rule(value, table[key], table) for key, rule in _KEYWORDS.items() if key in table)
