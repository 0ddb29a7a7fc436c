"""References that no completion can hit, in the shape of the task's own: who is paid for them is not paid for being right."""

from __future__ import annotations

import json
from typing import Any

from posttrain.rewards.cases import Case, is_quantity
from posttrain.rewards.library import GOLD_COLUMNS


def impossible(case: Case, digest: str) -> dict[str, Any]:
    """The columns of `case` with a reference that depends on `digest` alone."""
    tag = digest.rpartition(":")[2]
    if "tests" in case.columns:
        return {**case.columns, "tests": _tests(case.columns["tests"], tag)}
    answer = _answer(case, tag)
    return {k: _like(v, case.gold or "", answer) if k in GOLD_COLUMNS else v for k, v in case.columns.items()}


def _answer(case: Case, tag: str) -> str:
    if "schema" in case.columns:
        return json.dumps({tag[:16]: tag[16:32]})
    if is_quantity(case.gold or ""):
        return str(10**15 + int(tag[:12], 16))
    # Instead of a letter a sign that is no choice; instead of words a name that nobody bears.
    return "∅" if len(case.gold or "") == 1 else f"canary {tag[:16]}"


def _like(value: Any, gold: str, answer: str) -> Any:
    """`answer` where the reference stood: in a worked solution, or as a number of its own type."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return type(value)(answer)
    if not isinstance(value, str):
        return value if value is None else answer
    head, found, tail = value.rpartition(gold)
    return head + answer + tail if found else answer


def _tests(tests: Any, tag: str) -> Any:
    rows = json.loads(tests) if isinstance(tests, str) else tests
    changed = [{k: tag if k in ("expected", "stdout") else v for k, v in row.items()} for row in rows or []]
    return json.dumps(changed) if isinstance(tests, str) else changed
