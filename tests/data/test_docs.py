"""docs/data-formats.md says what the tables of formats and rules say."""

import re
from pathlib import Path

from posttrain.data import gathered, parse, rendered
from posttrain.data.formats import FORMATS
from posttrain.data.lint_rules import GOLD_COLUMNS, RULES

PAGE = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")


def test_every_rule_is_documented_with_its_threshold():
    rows = re.findall(r"^\| `(\w+)`( †)? \| ([\w, ]+) \| (warn|\d+%) \|", PAGE, re.MULTILINE)
    documented = {name: (bool(mark), stages, limit) for name, mark, stages, limit in rows}
    expected = {
        name: (
            rule.removable,
            "all" if len(rule.rows) == 5 else ", ".join(rule.rows),
            "warn" if rule.action == "warn" else f"{rule.limit:.0%}",
        )
        for name, rule in RULES.items()
    }
    assert documented == expected
    assert all(f"`{name}`" in PAGE for name in GOLD_COLUMNS)


def test_every_format_is_documented_with_its_columns():
    for name, fmt in FORMATS.items():
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` | ") and "warn" not in line]
        columns = {column for needed in fmt.needs for column in needed} | set(fmt.also)
        assert [column for column in columns if f"`{column}`" not in row and column != "tools"] == []


def test_every_skip_reason_is_documented():
    text = " ".join(PAGE.split())
    reasons = [
        rendered.TOO_LONG,
        gathered.NOTHING_LEFT,
        rendered.NOTHING,
        parse.NO_ASSISTANT,
        parse.EMPTY,
        parse.IDENTICAL,
    ]
    reasons += [rendered.TOO_SHORT, rendered.AGAIN]
    assert [reason for reason in reasons if f"`{reason}`" not in text] == []
