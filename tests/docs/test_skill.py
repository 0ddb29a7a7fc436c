"""What SKILL.md tells an agent holds: its exit codes are those of the command, its order of work has every verb that matters."""

import re
from pathlib import Path

from posttrain.cli.agent_acts import EXIT_WORDS
from posttrain.cli.app import EXIT_INTERRUPTED, VERBS
from posttrain.errors import EXIT_AGAIN, EXIT_CRASH, EXIT_USAGE
from posttrain.evidence import Verdict

SKILL = (Path(__file__).parents[2] / "SKILL.md").read_text(encoding="utf-8")


def test_it_begins_with_a_name_and_when_to_use_it():
    assert re.match(r"---\nname: posttrain\ndescription: \S.{60,1000}\n---\n", SKILL)


def test_the_exit_codes_are_those_of_the_command():
    rows = {int(code): words for code, words in re.findall(r"^\| (\d+) \| (.+) \|$", SKILL, re.MULTILINE)}
    assert rows == dict(EXIT_WORDS)
    assert all(verdict.value in rows[verdict.exit_code] for verdict in Verdict)
    assert {EXIT_USAGE, EXIT_CRASH, EXIT_INTERRUPTED, EXIT_AGAIN} <= set(rows)


def test_the_verbs_come_in_the_order_of_the_work():
    first = [
        SKILL.index(f"`posttrain {verb}")
        for verb in ("doctor", "data", "plan", "run", "eval", "gate", "registry list", "serve")
    ]
    assert first == sorted(first)
    assert {
        "doctor",
        "explain",
        "import",
        "data",
        "rewards",
        "plan",
        "run",
        "report",
        "diff",
        "eval",
        "gate",
        "registry",
        "chat",
        "serve",
        "export",
    } <= set(VERBS)
