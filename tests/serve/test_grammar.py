"""Answers that must have a form: every one that ended parses and fits its schema, for any seed; the others say `length`."""

import json

import jsonschema
import openai
import pytest

from posttrain.serve.faults import ApiRefusal
from posttrain.serve.grammar import Grammars

SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {"items": {"type": "array", "items": {"enum": ["a", "b", 3]}, "minItems": 1, "maxItems": 3}},
        "required": ["items"],
        "additionalProperties": False,
    },
    "choice": {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"const": "x y"}]},
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}, "additionalProperties": False}
        },
    },
}


def ask(client, schema, seed, **fields):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": seed, "response_format": wanted}
    return client.chat.completions.create(**asked, **{"max_tokens": 60, **fields})


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_ended_fits_its_schema_for_any_seed(client, name):
    ended = 0
    for seed in range(4):
        for choice in ask(client, SCHEMAS[name], seed, n=4, temperature=1.5).choices:
            if choice.finish_reason == "stop":
                jsonschema.validate(json.loads(choice.message.content), SCHEMAS[name])
                ended += 1
            else:
                assert choice.finish_reason == "length"
    assert ended >= 8


def test_an_answer_that_is_cut_says_length(client):
    [choice] = ask(client, SCHEMAS["object"], 1, max_tokens=5).choices
    assert choice.finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(choice.message.content)


def test_a_json_object_is_one(client):
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "response_format": {"type": "json_object"},
    }
    for seed in range(6):
        [choice] = client.chat.completions.create(**asked, seed=seed, max_tokens=200, temperature=0.5).choices
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_streams_and_neighbours_change_nothing(client):
    whole = ask(client, SCHEMAS["object"], 3).choices[0].message.content
    stream = ask(client, SCHEMAS["object"], 3, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"$ref": "#/none"}, "does not exist"),
        ({"$ref": "https://example.org/schema"}, "does not fetch"),
        ({"description": "x" * 70_000}, "65,536 characters"),
        ({"anyOf": [{"type": "array", "items": {"maxItems": 10_001}}]}, "repeats something 10001 times"),
        ({"type": "array", "minItems": 1e9}, "repeats something 1e+09 times"),
        ({"type": "object", "properties": {"a": {"pattern": "^(ab){3,999999}$"}}}, "repeats something 999999 times"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_by_name(client, schema, said):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, schema, 0)
    assert said in caught.value.body["message"]


def test_stop_strings_that_would_cut_the_json_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="stop would cut the JSON"):
        ask(client, SCHEMAS["object"], 0, stop=["a"])


def test_ids_beyond_the_tokenizer_are_never_sampled(tokenizer):
    import torch

    grammars = Grammars(tokenizer, len(tokenizer) + 40, {2})
    shaped = grammars.shaper(grammars.json_schema({"type": "object"}))([], torch.zeros(len(tokenizer) + 40))
    assert shaped[len(tokenizer) :].max() == -torch.inf and shaped.max() == 0
    with pytest.raises(ApiRefusal, match="cannot be enforced"):
        grammars.json_schema({"if": {}})
