"""A function's schema, beside the one that transformers makes of it."""

from typing import Literal

import pytest
from transformers.utils import get_json_schema

from posttrain.environments.schema import tool_schema
from posttrain.errors import ConfigError


class Odd:
    """Nothing that a call could give."""


def search(query: str, limit: int = 3, kinds: list[str] | None = None) -> str:
    """Find pages.

    Args:
        query: what to look for
        limit: how many at most
        kinds: which kinds of pages
    """
    return query


def pick(color: Literal["red", "blue"], exact: bool, weights: dict[str, float]) -> str:
    """Pick one."""
    return color


def test_name_description_and_types_are_those_of_transformers():
    ours, theirs = tool_schema(search)["function"], get_json_schema(search)["function"]
    assert (ours["name"], ours["description"]) == (theirs["name"], theirs["description"])
    for name, schema in theirs["parameters"]["properties"].items():
        assert ours["parameters"]["properties"][name]["description"] == schema["description"]
    assert ours["parameters"]["properties"]["query"]["type"] == "string"
    assert ours["parameters"]["properties"]["limit"] == {
        "type": "integer",
        "default": 3,
        "description": "how many at most",
    }
    assert ours["parameters"]["required"] == theirs["parameters"]["required"] == ["query"]


def test_choices_and_containers_are_json_schema():
    properties = tool_schema(pick)["function"]["parameters"]["properties"]
    assert properties["color"]["enum"] == ["red", "blue"]
    assert properties["weights"] == {"type": "object", "additionalProperties": {"type": "number"}}


def test_what_json_cannot_hold_is_refused():
    def odd(what: Odd) -> str:
        """Odd."""
        return ""

    def many(*words: str) -> str:
        """Many."""
        return ""

    with pytest.raises(ConfigError, match="no name that a call could give"):
        tool_schema(many)
    with pytest.raises(ConfigError, match="which JSON cannot hold"):
        tool_schema(odd)
