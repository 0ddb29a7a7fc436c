from pathlib import Path
from typing import Literal

from posttrain.config.check import build
from posttrain.config.knob import Keys, knob
from posttrain.config.settings import KeyOrigin, Problems, Settings


class Inner(Keys):
    """A group."""

    size: int = knob(..., "Size.", ge=1, example=4)


class Outer(Keys):
    """A group that holds others."""

    choice: Inner | Literal["off"] = knob("off", "A union of a group and a word.")
    items: list[Inner] = knob([], "A list of groups.")
    named: dict[str, Inner] = knob({}, "A mapping of groups.")
    share: float | int | None = knob(None, "A number.", example=0.5)
    flag: bool | int = knob(False, "A switch or a number.")
    words: list[str] = knob([], "Texts.")


def problems_of(**values):
    problems = Problems()
    settings = Settings(
        values,
        {(key,): KeyOrigin(f"a.yaml:{line}", "", line) for line, key in enumerate(values, 2)},
        KeyOrigin("a.yaml:1", ""),
    )
    built = build(Outer, settings, "gate", Path(), problems, [])
    assert (built is None) == bool(problems.found)
    return list(problems.found)


def test_what_fits_is_built():
    assert problems_of(choice={"size": 1}, items=[{"size": 2}], named={"x": {"size": 3}}, share=0.5, flag=True) == []


def test_of_a_union_only_the_arm_that_was_meant_is_reported():
    assert problems_of(choice={"size": 0}) == ["a.yaml:2: choice.size: got 0, expected an integer (≥ 1); e.g. size: 4"]
    assert problems_of(choice="of") == [
        "a.yaml:2: choice: got 'of', expected a mapping with size or off; did you mean off?"
    ]
    assert problems_of(choice={}) == ["a.yaml:2: choice.size: missing; choice needs it; e.g. size: 4"]


def test_places_in_lists_and_mappings_are_named():
    assert problems_of(items=[{"size": 1}, {"siz": 1, "size": 1}]) == [
        "a.yaml:2: items.2.siz: unknown key; did you mean size?"
    ]
    assert problems_of(items=[{}]) == ["a.yaml:2: items.1.size: missing; each entry of items needs it; e.g. size: 4"]
    assert problems_of(named={"x": {"size": "big"}}) == [
        "a.yaml:2: named.x.size: got 'big', expected an integer (≥ 1); e.g. size: 4"
    ]


def test_true_is_not_a_number_unless_a_switch_is_meant():
    assert problems_of(share=True) == ["a.yaml:2: share: got true, expected a number or an integer; e.g. share: 0.5"]
    assert problems_of(flag=True) == []
    assert problems_of(items=[{"size": True}]) == [
        "a.yaml:2: items.1.size: got true, expected an integer (≥ 1); e.g. size: 4"
    ]


def test_a_password_in_an_address_or_a_command_is_refused_without_being_repeated():
    for value, said in (
        ("openenv:https://me:sesame@host", "a URI that holds a password"),
        ("mcp:search --token sesame", "a command that holds"),
    ):
        (found,) = problems_of(words=["plain", value])
        assert found.startswith(f"a.yaml:2: words.2: got {said}") and "sesame" not in found
