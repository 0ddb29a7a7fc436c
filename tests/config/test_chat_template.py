"""`chat_template_kwargs` as defaults inside the template."""

import pytest

from posttrain.config.chat_template import chat_template
from posttrain.config.load import load_stage
from posttrain.errors import ConfigError

OWN = "{{ mode }} {{ enable_thinking }} {{ names }}"


def test_values_become_defaults_that_a_caller_overrides():
    import jinja2

    given = {"mode": "it's a \\ test", "enable_thinking": False, "names": ["a", 1, None]}
    template = jinja2.Template(chat_template(OWN, None, given))
    assert template.render() == "it's a \\ test False ['a', 1, None]"
    assert template.render(enable_thinking=True).split()[-4] == "True"
    assert chat_template({"default": OWN}, None, {"mode": 1})["default"].endswith(OWN)


def test_the_key_is_read_from_yaml_and_the_file_wins_over_the_own_template(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ mode }}")
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "sft.yaml").write_text(
        "base_model: x\ndatasets: [{path: rows.jsonl}]\nchat_template: mine.jinja\nchat_template_kwargs: {mode: short}\n"
    )
    keys = load_stage("sft", tmp_path / "sft.yaml").keys
    assert chat_template(OWN, keys.chat_template, keys.chat_template_kwargs).endswith("'short' %}{% endif %}{{ mode }}")


@pytest.mark.parametrize(
    ("own", "kwargs", "message"),
    [
        (OWN, {"enable_thinkin": True}, "enable_thinkin: the chat template reads no variable of this name"),
        (OWN, {"messages": []}, "messages: every rendering sets it"),
        (OWN, {"mode": {"a": 1}}, "mode: got {'a': 1}; expected true, false, a number"),
        (None, {"mode": 1}, "the tokenizer has no chat template"),
    ],
)
def test_a_value_that_could_not_act_is_refused(own, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        chat_template(own, None, kwargs)
