"""What holds of every tool's table."""

import re
from pathlib import Path

import pytest

from posttrain.config.importers.read import TOOLS
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.schema import keys_of

ROWS = [(tool, key, row) for tool in TOOLS.values() for key, row in tool.rows.items()]
OURS = {key for row in STAGE_KINDS.values() for key in keys_of(row.keys)}


def test_no_key_is_called_without_effect_without_a_line_on_why():
    silent = [
        f"{tool.name} {key}" for tool, key, row in ROWS if row.fate in ("left out", "changed") and len(row.why) < 10
    ]
    assert silent == []


def test_every_refusal_says_why_and_what_to_do():
    silent = [f"{tool.name} {key}" for tool, key, row in ROWS if row.fate == "refused" and not (row.why and row.todo)]
    assert silent == []


def test_what_is_mapped_is_mapped_to_a_key_of_ours():
    assert [f"{tool.name} {key}" for tool, key, row in ROWS if row.fate == "mapped" and row.to not in OURS] == []


@pytest.mark.parametrize("tool", TOOLS.values(), ids=lambda tool: tool.name)
def test_the_marks_of_a_tool_are_keys_of_it(tool):
    assert tool.marks <= tool.rows.keys()


DOCUMENTED = {
    tool: names.split()
    for tool, names in re.findall(
        r"\[(\w+) [^\]]*\]\n([^\[]+)", Path(__file__).with_name("documented_keys.txt").read_text()
    )
}


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory", "trl"])
def test_every_documented_key_has_a_fate(tool):
    """Their releases add keys: a newer list in documented_keys.txt says here which."""
    assert len(DOCUMENTED[tool]) > 200
    assert [key for key in DOCUMENTED[tool] if not TOOLS[tool].knows(key)] == []
