"""The page's Python blocks run, and its tables name every row of the code."""

import re
from pathlib import Path

import pytest

from posttrain.objectives.advantages import ADVANTAGES
from posttrain.objectives.distill import DIVERGENCES, TEACHER_ADVANTAGES
from posttrain.objectives.policy import POLICY_LOSSES
from posttrain.objectives.preference import PREFERENCE_LOSSES
from posttrain.objectives.reduce import REDUCTIONS
from posttrain.objectives.sft import SFT_LOSSES
from posttrain.objectives.surrogates import SURROGATES

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")


def _blocks():
    heading = ""
    for match in re.finditer(r"^(#+ [^\n]*)$|^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1].strip("# ")
        else:
            yield pytest.param(match[2], id=heading)


BLOCKS = list(_blocks())


@pytest.mark.parametrize("source", BLOCKS)
def test_block_runs(source):
    assert source.count("assert ") >= 2
    assert re.findall(r"^(?:import|from) .*", source, re.MULTILINE) == ["import numpy as np"]
    exec(compile(source, "docs/algorithms.md", "exec"), {})


def test_every_section_with_an_equation_has_a_block():
    assert len(BLOCKS) == len(re.findall(r"^\*\*Equation\.\*\*", PAGE, re.MULTILINE))


@pytest.mark.parametrize(
    "table",
    [SFT_LOSSES, PREFERENCE_LOSSES, POLICY_LOSSES, SURROGATES, REDUCTIONS, ADVANTAGES, TEACHER_ADVANTAGES, DIVERGENCES],
)
def test_every_row_is_described(table):
    assert [name for name in table if f"`{name}`" not in PAGE] == []
