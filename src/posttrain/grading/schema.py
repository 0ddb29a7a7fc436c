"""Strict JSON, and JSON Schema by the `jsonschema` library.

Stricter than Python's reader on purpose: a duplicate key, NaN or Infinity is no JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast
from urllib.parse import unquote

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


# --- schemas -------------------------------------------------------------------------------------------------------

_MAX_PATTERN_CHARS = 10_000
_OF_VALUES = ("items", "prefixItems", "additionalItems", "contains", "additionalProperties")
_IN_PLACE = ("allOf", "anyOf", "oneOf", "if", "then", "else")
_MAPPINGS = {
    "properties": True,
    "patternProperties": True,
    "$defs": False,
    "definitions": False,
    "dependentSchemas": False,
}
"""Keywords that hold schemas by name, and whether these describe values of their own."""


def check_schema(schema: Any) -> None:
    """Raises: ValueError for what is no JSON Schema, or refers to something outside it."""
    _validator(_text(schema), False)


def conforms(value: Any, schema: Any, *, strict: bool = False) -> bool:
    """Whether a parsed value fits the schema, by the `jsonschema` library: drafts 4 to 2020-12, 2020-12 without a `$schema`.

    `strict`: an object takes no keys but those its schema names, and 3.0 is no integer. Formats are not checked, a
    text of more than 10,000 characters fits no pattern. Raises: ValueError for what is no schema.
    """
    try:
        return _validator(_text(schema), strict).is_valid(value)
    except RecursionError:
        raise ValueError("the schema refers to itself without end") from None


def _text(schema: Any) -> str:
    if not isinstance(schema, (bool, dict)):
        raise ValueError(f"schema is {type(schema).__name__}, expected an object")
    return json.dumps(schema)


@lru_cache(256)
def _validator(text: str, strict: bool) -> Any:
    from jsonschema import Draft202012Validator, exceptions, validators  # slow to import
    from referencing import Registry

    schema = json.loads(text)
    base = validators.validator_for(schema, default=Draft202012Validator)
    try:
        base.check_schema(schema)
    except exceptions.SchemaError as error:
        raise ValueError(f"no JSON Schema, at {error.json_path}: {error.message}") from None
    _check_references(schema, schema)
    keywords: dict[str, Any] = {"pattern": _pattern, "uniqueItems": _unique_items}
    checker = base.TYPE_CHECKER
    if strict:
        keywords["unevaluatedProperties"] = Draft202012Validator.VALIDATORS["unevaluatedProperties"]
        checker = checker.redefine("integer", _is_integer)
        schema = _closed(schema, schema, is_value=True)
    # The empty registry: a schema is not to make the grader read the network.
    library: Any = validators
    registry: Any = Registry
    return library.extend(base, keywords, type_checker=checker)(schema, registry=registry())


def _check_references(part: Any, root: Any) -> None:
    if isinstance(part, list):
        for item in cast("list[Any]", part):
            _check_references(item, root)
    elif isinstance(part, dict):
        table = cast("dict[str, Any]", part)
        if isinstance(reference := table.get("$ref"), str):
            _referred(reference, root)
        for item in table.values():
            _check_references(item, root)


def _referred(reference: str, root: Any) -> Any:
    """What `#/$defs/Name` stands for; None for an anchor. Raises: ValueError."""
    if not reference.startswith("#"):
        raise ValueError(f"$ref {reference!r} is outside the schema; expected #/$defs/…")
    part = root
    for name in reference[1:].split("/")[1:]:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        try:
            part = part[int(name) if isinstance(part, list) else name]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ValueError(f"$ref {reference!r} refers to nothing in the schema") from None
    return part if reference == "#" or reference.startswith("#/") else None


def _closed(schema: Any, root: Any, *, is_value: bool) -> Any:
    """The schema with its objects closed. Parts of one object (`allOf` …) are closed together, where the object is described."""
    if isinstance(schema, list):
        return [_closed(item, root, is_value=is_value) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, part in cast("dict[str, Any]", schema).items():
        if key in _MAPPINGS and isinstance(part, dict):
            named = cast("dict[str, Any]", part)
            closed[key] = {name: _closed(rule, root, is_value=_MAPPINGS[key]) for name, rule in named.items()}
        elif key in _OF_VALUES or key in _IN_PLACE:
            closed[key] = _closed(part, root, is_value=key in _OF_VALUES)
        else:
            closed[key] = part
    if not (is_value and _names_properties(closed, root, frozenset())):
        return closed
    if "$ref" in closed:  # older drafts ignore what stands beside it
        closed["allOf"] = [*closed.get("allOf", []), {"$ref": closed.pop("$ref")}]
    return {"unevaluatedProperties": False} | closed


def _names_properties(schema: Any, root: Any, seen: frozenset[str]) -> bool:
    if not isinstance(schema, dict):
        return False
    table = cast("dict[str, Any]", schema)
    reference = table.get("$ref")
    parts: list[Any] = []
    for key in _IN_PLACE:
        if key in table:
            parts += table[key] if key.endswith("Of") else [table[key]]
    if isinstance(reference, str) and reference not in seen:
        parts.append(_referred(reference, root))
        seen |= {reference}
    return "properties" in table or any(_names_properties(part, root, seen) for part in parts)


def _is_integer(checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(value, str) and (len(value) > _MAX_PATTERN_CHARS or not re.search(pattern, value)):
        yield ValidationError(f"does not match {pattern!r}")


def _unique_items(validator: Any, wanted: bool, value: Any, schema: Any) -> Iterator[Any]:
    """The library's own takes quadratic time on mixed items."""
    from jsonschema import ValidationError

    if wanted and isinstance(value, list):
        texts = [json.dumps(item, sort_keys=True) for item in cast("list[Any]", value)]
        if len(set(texts)) < len(texts):
            yield ValidationError("has items that are equal")
