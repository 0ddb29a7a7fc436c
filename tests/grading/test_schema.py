import pytest

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
    assert not conforms(value, PERSON)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"enum": [1, "a"]}, 1, True),
        ({"const": {"a": [1]}}, {"a": [1]}, {"a": [1.0]}),
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


def test_an_unknown_keyword_is_refused_by_name():
    with pytest.raises(ValueError, match="'\\$ref' is not supported"):
        check_schema({"properties": {"a": {"$ref": "#/x"}}})
    with pytest.raises(ValueError, match="'text' is unknown"):
        check_schema({"type": "text"})


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
