"""docs/failure-modes.md names every rule with the thresholds, severity and remedy that the code has."""

from pathlib import Path

import pytest

from posttrain.config.kinds import STAGE_KINDS
from posttrain.health.rules import ACTIONS, RULES

PAGE = (Path(__file__).parents[2] / "docs" / "failure-modes.md").read_text().splitlines()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_page_says_what_the_rule_does(rule):
    remedy = next(line for line in PAGE if line.split("|")[2:3] == [f" `{rule.name}` "])
    assert remedy.split("|")[1].strip()
    assert f"| {rule.severity.value}: {ACTIONS[rule.action]} | {rule.advice} |" in remedy
    thresholds = ", ".join(f"{name} {value:g}" for name, value in rule.thresholds.items()) or "none"
    stages = ", ".join(row.name for row in STAGE_KINDS.values() if row.learns_from in rule.learns_from)
    assert f"| `{rule.name}` | {stages} | {thresholds} | {rule.severity.value} | {rule.action} |" in PAGE
