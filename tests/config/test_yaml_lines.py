import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config.yaml_lines import dump_yaml, parse_value, plain_scalar, read_yaml
from posttrain.errors import ConfigError


def read(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path)


def refusal(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e-6", 5e-6),
        ("1E3", 1000.0),
        ("+2.5e3", 2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("007", 7),
        ("0x1F", 31),
        ("-3", -3),
        ("true", True),
        ("FALSE", False),
        ("off", "off"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e4", "e4"),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text, value):
    assert plain_scalar(text) == value
    assert type(plain_scalar(text)) is type(value)


def test_quotes_keep_text(tmp_path):
    assert read(tmp_path, "a: '1e-4'\nb: \"true\"\n").data == {"a": "1e-4", "b": "true"}


def test_every_key_and_item_has_its_line(tmp_path):
    document = read(tmp_path, "a: 1\nb:\n  - x: 2\n    y: 3\n  - x: 4\nc: {d: 5}\n")
    assert document.data == {"a": 1, "b": [{"x": 2, "y": 3}, {"x": 4}], "c": {"d": 5}}
    assert document.lines == {
        ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 0, "x"): 3, ("b", 0, "y"): 4, ("b", 1): 5, ("b", 1, "x"): 5,
        ("c",): 6, ("c", "d"): 6,
    }  # fmt: skip


def test_null_means_unset(tmp_path):
    document = read(tmp_path, "a:\nb: null\nc: {d: ~, e: 1}\n")
    assert document.data == {"c": {"e": 1}}
    assert document.nulls == {("a",), ("b",), ("c", "d")}


def test_a_duplicate_key_names_both_lines(tmp_path):
    message = refusal(tmp_path, "a: 1\nb: 2\na: 3\n")
    assert "a.yaml:3:1: a: the key stands twice, first on line 1; keep one" in message


def test_a_duplicate_key_inside_a_flow_mapping(tmp_path):
    assert "a.yaml:1:12: x: the key stands twice, first on line 1" in refusal(tmp_path, "a: [{x: 1, x: 2}]\n")


def test_merge_keys_give_way_to_own_keys(tmp_path):
    document = read(tmp_path, "base: &b {x: 1, y: 2}\na: {<<: *b, y: 3}\n")
    assert document.data["a"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2\nb: 3\n", r"a\.yaml:2:2: broken YAML: expected ',' or '\]'"),
        ("a:\n\tb: 1\n", r"a\.yaml:2:1: broken YAML: .*indent with spaces"),
        ("a: b: c\n", r"a\.yaml:1:5: broken YAML: mapping values are not allowed here"),
        ("a: *nowhere\n", r"a\.yaml:1:4: broken YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", r"a\.yaml:2:1: broken YAML: but found another document"),
        ("a: 1\nb: x\x07y\n", r"a\.yaml:2:5: broken YAML: control character U\+0007"),
        ("a: !!python/name:os.system\n", r"a\.yaml:1:4: tag .*python/name:os\.system is not read"),
        ("? [1, 2]\n: 3\n", r"a\.yaml:1:3: a key must be text"),
        ("a: &x [*x]\n", r"a\.yaml:1:4: an anchor that contains itself"),
        ("a: &x\n  <<: *x\n", r"an anchor that contains itself"),
        ("", r"the file is empty; expected a mapping"),
        ("# only a comment\n", r"the file is empty"),
        ("- a\n- b\n", r"a\.yaml:1: got a list, expected a mapping of keys"),
        ("just text\n", r"a\.yaml:1: got a single value, expected a mapping"),
        (b"a: \xff\n", r"not UTF-8 text at byte 3"),
        ("a: " + "[" * 60 + "]" * 60, r"a\.yaml:1:53: nested more than 50 deep"),
        ("a: " + "[" * 900 + "]" * 900, r"nested too deeply"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused_with_its_place(tmp_path, text, expected):
    assert re.search(expected, refusal(tmp_path, text))


def test_anchors_that_multiply_are_refused(tmp_path):
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 30)}]\n" for n in range(1, 5))
    assert "anchors that multiply" in refusal(tmp_path, "a0: &a0 [1]\n" + levels)


def test_a_missing_file_names_what_is_there(tmp_path):
    (tmp_path / "train.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"trian\.yaml: no such file; .* has train\.yaml"):
        read_yaml(tmp_path / "trian.yaml")


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(ConfigError, match="nor is there a folder"):
        read_yaml(tmp_path / "gone" / "train.yaml")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="got a folder, expected a YAML file"):
        read_yaml(tmp_path)


def test_a_byte_order_mark_is_not_part_of_the_key(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfa: 1\n").data == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{a: 1e-3}", {"a": 1e-3}),
        ("'16'", "16"),
        ("rewards.py:correct", "rewards.py:correct"),
        ("a: b", "a: b"),
        ("", None),
        ("null", None),
    ],
)
def test_values_of_the_command_line(text, value):
    assert parse_value(text) == value


def test_a_broken_value_of_the_command_line():
    with pytest.raises(ConfigError, match=r"value:1:.*broken YAML"):
        parse_value("[1, 2")


scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=12)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=6), trees, min_size=1, max_size=4))
def test_what_is_dumped_is_read_back(tmp_path_factory, data):
    document = read(tmp_path_factory.getbasetemp(), dump_yaml(data))
    assert document.data == without_nulls(data)


@pytest.mark.parametrize(
    "text", ["1e-4", "off", "yes", "null", "~", "12:30", "2024-01-01", "007", "1_000", "true", "", "0x1F", "<<", "="]
)
def test_text_that_looks_like_something_else_survives(tmp_path, text):
    assert read(tmp_path, dump_yaml({"a": text, text: 1})).data == {"a": text, text: 1}
