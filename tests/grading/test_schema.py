from __future__ import annotations

import json
import time
from typing import Literal

import pytest
from pydantic import BaseModel

from posttrain.grading.schema import NotJsonError, check_schema, conforms, read_json_text, same_json

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


@pytest.mark.parametrize("value", [{"name": "Ana", "age": 3}])
def test_conforms(value):
    assert conforms(value, PERSON)


@pytest.mark.parametrize(
    "value",
    [
        {"name": "", "age": 3},
        {"name": "Ana"},
        {"name": "Ana", "age": 3.0},
        {"name": "Ana", "age": True},
        {"name": "Ana", "age": 3, "x": 1},
        [],
    ],
)
def test_does_not_conform(value):
    assert not conforms(value, PERSON, strict=True)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"enum": [1, "a"]}, 1, True),
        ({"const": {"a": [1]}}, {"a": [1]}, {"a": [True]}),
        ({"type": ["string", "null"]}, None, 1),
        ({"items": {"type": "number"}, "maxItems": 2, "uniqueItems": True}, [1, 2], [1, 1]),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "exclusiveMaximum": 3}]}, 2, 3),
        ({"oneOf": [{"minimum": 1}, {"maximum": 3}]}, 5, 2),
        ({"not": {"type": "null"}}, 1, None),
        ({"pattern": "^a+$"}, "aa", "ab"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, {"a": 1}, {"a": "1"}),
    ],
)
def test_keywords(schema, good, bad):
    check_schema(schema)
    assert conforms(good, schema)
    assert not conforms(bad, schema)


BAD_SCHEMAS = [
    ({"type": "text"}, "no JSON Schema, at \\$.type"),
    ({"properties": {"a": {"$ref": "#/$defs/Missing"}}}, "refers to nothing in the schema"),
    ({"$ref": "https://example.org/person.json"}, "outside the schema; expected #/"),
    ([1], "schema is list, expected an object"),
]


@pytest.mark.parametrize(("schema", "message"), BAD_SCHEMAS)
def test_what_is_no_schema_is_refused_with_the_reason(schema, message):
    with pytest.raises(ValueError, match=message):
        check_schema(schema)


def test_a_schema_that_refers_to_itself_alone_is_refused():
    with pytest.raises(ValueError, match="without end"):
        conforms(1, {"$ref": "#"})


class Pen(BaseModel):
    colour: Literal["red", "blue"]
    length_cm: float = 14.0


class Box(BaseModel):
    owner: str
    pens: list[Pen]
    spare: Pen | None = None
    lid: Box | None = None


NESTED = Box.model_json_schema()
FULL = {
    "owner": "Ana",
    "pens": [{"colour": "red"}, {"colour": "blue", "length_cm": 3}],
    "spare": None,
    "lid": {"owner": "Bo", "pens": []},
}
CHANGES = {
    "a key more": lambda box: box.update(x=1),
    "a key more below": lambda box: box["pens"][0].update(x=1),
    "a key more below itself": lambda box: box["lid"].update(x=1),
    "a key more in an option": lambda box: box.update(spare={"colour": "red", "x": 1}),
}
FAULTS = {
    "a key less below": lambda box: box["pens"][0].pop("colour"),
    "another value below": lambda box: box["pens"][0].update(colour="green"),
    "another type below itself": lambda box: box["lid"].update(owner=3),
    "no list": lambda box: box.update(pens={}),
}


def changed(change):
    box = json.loads(json.dumps(FULL))
    change(box)
    return box


def test_a_nested_pydantic_schema_is_applied_through_its_defs():
    assert "$defs" in NESTED and "$ref" in json.dumps(NESTED)
    assert conforms(FULL, NESTED) and conforms(FULL, NESTED, strict=True)
    for name, fault in FAULTS.items():
        assert not conforms(changed(fault), NESTED), name
        assert not conforms(changed(fault), NESTED, strict=True), name


@pytest.mark.parametrize(
    "draft", ["https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema#"]
)
@pytest.mark.parametrize("name", CHANGES)
def test_strictness_is_an_option_and_reaches_every_object(name, draft):
    schema = NESTED | {"$schema": draft}
    assert conforms(changed(CHANGES[name]), schema)
    assert not conforms(changed(CHANGES[name]), schema, strict=True)


def test_strict_keeps_what_the_schema_allows():
    parts = {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}]}
    assert conforms({"a": 1, "b": 2}, parts, strict=True)
    assert not conforms({"a": 1, "c": 2}, parts, strict=True)
    assert conforms({"x": 1}, {"type": "object"}, strict=True)
    assert conforms({"a": 1, "x": 1}, {"properties": {"a": {}}, "additionalProperties": True}, strict=True)
    assert conforms(3.0, {"type": "integer"}) and not conforms(3.0, {"type": "integer"}, strict=True)


def test_hostile_values_are_checked_in_time():
    start = time.perf_counter()
    assert not conforms([[i % 100] if i % 2 else {} for i in range(60_000)], {"uniqueItems": True})
    assert conforms(
        {str(i): i for i in range(20_000)}, {"type": "object", "additionalProperties": {"type": "integer"}}, strict=True
    )
    assert not conforms({str(i): i for i in range(20_000)}, {"properties": {"a": {}}}, strict=True)
    assert not conforms(" " * 1_000_000 + "x", {"pattern": "^\\s+$"})
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[1e999]", "[Infinity]", "{} {}", "", "[" * 1000, "1" * 5000, "{'a': 1}"]
)
def test_strict_json(text):
    with pytest.raises(NotJsonError):
        read_json_text(text)


def test_json_may_stand_in_one_fence():
    assert read_json_text('```json\n{"a": 1}\n```') == {"a": 1}


def test_equality_is_typed():
    assert same_json([1, {"a": 0.1 + 0.2}], [1, {"a": 0.3}])
    for a, b in ((1, 1.0), (1, True), ("1", 1), ([1], [1, 1]), ({"a": 1}, {"b": 1}), (float("nan"), float("nan"))):
        assert not same_json(a, b)
