import pytest

from posttrain.config.settings import (
    KeyOrigin,
    Problems,
    Settings,
    apply_override,
    dotted,
    parse_overrides,
    read_settings,
)
from posttrain.errors import ConfigError


def settings(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return read_settings(path)[0]


def test_a_value_without_an_origin_has_that_of_its_holder(tmp_path):
    read = settings(tmp_path, "a: 1\nb:\n  c: [1, 2]\n")
    assert read.origin(("b", "c", 1)).short == "a.yaml:3"
    assert read.origin(("b", "z")).short == "a.yaml:2"
    assert read.origin(("z",)).short == "a.yaml:1"
    assert read.origin(("a",)).where == f"{tmp_path}/a.yaml:1"


def test_names_count_places_from_1():
    assert dotted(("datasets", 0, "path")) == "datasets.1.path"


def test_put_replaces_the_origins_below(tmp_path):
    read = settings(tmp_path, "a: {b: 1}\n")
    new = KeyOrigin("--set", "--set")
    read.put(("a",), {"c": 2}, new)
    assert read.values == {"a": {"c": 2}}
    assert ("a", "b") not in read.origins
    assert read.origin(("a", "c")) == new
    read.put(("a",), None, new)
    assert read.values == {}
    assert read.origins == {}


def test_rename_moves_value_and_origins(tmp_path):
    read = settings(tmp_path, "x: 0\nold: {b: 1}\n")
    read.rename("old", "new", {"b": 1})
    assert read.values == {"x": 0, "new": {"b": 1}}
    assert read.origins[("new", "b")].line == 2


def test_below_is_a_mapping_of_its_own(tmp_path):
    read = settings(tmp_path, "a:\n- {b: 1}\n- {b: 2}\n")
    inner = read.below(("a", 1))
    assert inner.values == {"b": 2}
    assert inner.name(("b",)) == "a.2.b"
    assert inner.origin(("b",)).line == 3
    inner.values["b"] = 5
    assert read.values["a"][1] == {"b": 2}


def test_what_is_handed_down_is_copied_and_keeps_its_name(tmp_path):
    top = settings(tmp_path, "a: [1]\nb: 2\n")
    stage = Settings({}, {}, top.home, "stages.1.")
    stage.take(top, ["a"], shared=True)
    stage.values["a"].append(9)
    assert top.values["a"] == [1]
    assert stage.name(("a", 0)) == "a.1"
    assert stage.name(("c",)) == "stages.1.c"
    assert stage.origin(("a", 0)).line == 1


def test_problems_are_sorted_by_line_and_said_once():
    problems = Problems()
    for line in (12, 3, 12):
        problems.add(KeyOrigin(f"a.yaml:{line}", "", line), "x", "wrong")
    problems.add(KeyOrigin("a.yaml:3", "", 3), "x", "wrong; e.g. x: 1")
    with pytest.raises(ConfigError) as caught:
        problems.raise_if_any()
    assert str(caught.value) == "a.yaml:3: x: wrong\na.yaml:12: x: wrong"


def test_no_problem_raises_nothing():
    problems = Problems()
    problems.raise_if_any()
    assert problems.found == {}


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("a.b=2", {"a": {"b": 2}, "l": [{"x": 1}]}),
        ("c.d.e=2", {"a": {"b": 1}, "l": [{"x": 1}], "c": {"d": {"e": 2}}}),
        ("l.1.x=2", {"a": {"b": 1}, "l": [{"x": 2}]}),
        ("l.2.x=2", {"a": {"b": 1}, "l": [{"x": 1}, {"x": 2}]}),
        ("m.1.x=2", {"a": {"b": 1}, "l": [{"x": 1}], "m": [{"x": 2}]}),
        ("a=", {"l": [{"x": 1}]}),
        ("a = [1, b]", {"a": [1, "b"], "l": [{"x": 1}]}),
    ],
)
def test_overrides_reach_inside(tmp_path, override, values):
    read, problems = settings(tmp_path, "a: {b: 1}\nl: [{x: 1}]\n"), Problems()
    (parsed,) = parse_overrides([override], problems)
    apply_override(read, parsed.steps, parsed, problems)
    assert problems.found == {}
    assert read.values == values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("l.3=1", "--set l.3=1: l: got place 3, expected 1 to 2"),
        ("l.x=1", "--set l.x=1: l: got place x, expected 1 to 2"),
        ("a.b.c=1", "--set a.b.c=1: a.b: is 1, which has no key c"),
        ("a..b=1", "--set a..b=1: expected KEY=VALUE, e.g. --set learning_rate=1e-6"),
    ],
)
def test_overrides_that_reach_nowhere(tmp_path, override, expected):
    read, problems = settings(tmp_path, "a: {b: 1}\nl: [{x: 1}]\n"), Problems()
    for parsed in parse_overrides([override], problems):
        apply_override(read, parsed.steps, parsed, problems)
    assert list(problems.found) == [expected]
