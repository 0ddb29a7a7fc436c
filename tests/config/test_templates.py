"""The templates that have a name here render what the same-named template of the tool that they are of renders."""

import json
from pathlib import Path

import pytest
import trl
from tests.config.template_witnesses import TARGET, conversations, digest, rendered

from posttrain.config import load_stage
from posttrain.config.importers.templates import BUILT_IN, EOS
from posttrain.config.paths import TEMPLATES
from posttrain.config.resolved import resolved_yaml

WITNESSES = Path(str(trl.__file__)).parent / "chat_templates"
SEEN = json.loads(TARGET.read_text())
NAMES = [(tool, name) for tool, names in BUILT_IN.items() for name in names]


def texts(template, kind):
    """None where a conversation is refused."""
    found = []
    for given in conversations(kind):
        try:
            found.append(rendered(template, given))
        except Exception:  # noqa: BLE001 - a template fails as it likes
            found.append(None)
    return found


@pytest.mark.parametrize("name", ["gemma", "llama3"])
def test_a_template_by_name_renders_as_the_installed_trl_does(name):
    for given in conversations("plain", system=name != "gemma"):
        ours = rendered((TEMPLATES / f"{name}.jinja").read_text(), given)
        assert ours == rendered((WITNESSES / f"{name}.jinja").read_text(), given)


@pytest.mark.parametrize(("tool", "name"), NAMES)
def test_a_template_of_another_tools_name_renders_as_that_tool_did(tool, name):
    template = (TEMPLATES / f"{BUILT_IN[tool][name]}.jinja").read_text()
    for kind, seen in SEEN[tool][name].items():
        assert digest(texts(template, kind)) == seen, f"run {TARGET.with_suffix('.py')} where {tool} is installed"


@pytest.mark.parametrize("name", sorted(set(BUILT_IN["LLaMA-Factory"].values())))
def test_tools_are_refused_where_no_witness_wrote_them(name):
    template = (TEMPLATES / f"{name}.jinja").read_text()
    asked = zip(conversations("tools"), texts(template, "tools"), strict=True)
    assert {text for given, text in asked if given["tools"]} == {None}


def test_every_template_here_has_a_witness():
    named = {file for names in BUILT_IN.values() for file in names.values()}
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == named
    assert SEEN["eos"] == EOS


def test_a_name_is_resolved_and_written_back(write):
    loaded = load_stage("sft", write("base_model: a/b\nchat_template: llama3\ndatasets: [{path: sft_data.jsonl}]\n"))
    assert Path(loaded.keys.chat_template) == TEMPLATES / "llama3.jinja"
    assert "chat_template: llama3" in resolved_yaml(loaded.keys, loaded.project, loaded.project)
