"""The templates that have a name render what the same-named template of an installed TRL renders."""

import random
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.config import load_stage
from posttrain.config.paths import TEMPLATES
from posttrain.config.resolved import resolved_yaml

WITNESSES = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def conversations(system, count=200):
    chance = random.Random(7)
    texts = ["", " padded ", "two\nlines", "é ✓", "{{ braces }}", "<|eot_id|>", "plain words"]
    for _ in range(count):
        turns = [{"role": "system", "content": chance.choice(texts)}] * (system and chance.random() < 0.5)
        for turn in range(chance.randint(1, 7)):
            turns = [*turns, {"role": ("user", "assistant")[turn % 2], "content": chance.choice(texts)}]
        yield turns


def rendered(path, messages, generate):
    text, _ = render_jinja_template(
        [messages], chat_template=path.read_text(), add_generation_prompt=generate, bos_token="<bos>", eos_token="<eos>"
    )
    return text[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_template_by_name_renders_as_the_installed_trl_does(name):
    for messages in conversations(system=name != "gemma"):
        for generate in (False, True):
            ours = rendered(TEMPLATES / f"{name}.jinja", messages, generate)
            assert ours == rendered(WITNESSES / f"{name}.jinja", messages, generate)


def test_a_name_is_resolved_and_written_back(write):
    loaded = load_stage("sft", write("base_model: a/b\nchat_template: llama3\ndatasets: [{path: sft_data.jsonl}]\n"))
    assert Path(loaded.keys.chat_template) == TEMPLATES / "llama3.jinja"
    assert "chat_template: llama3" in resolved_yaml(loaded.keys, loaded.project, loaded.project)
