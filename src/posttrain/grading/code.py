"""Unit tests of code written by a model: the code runs in the sandbox, the expected values never leave this process."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.grading.sandbox import Limits, run_calls, run_script
from posttrain.grading.schema import same_json

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def extract_code(text: str) -> str:
    """The last fenced block, or the whole text when there is no fence; its first line not indented."""
    blocks: list[str] = _FENCE.findall(text)
    return textwrap.dedent(blocks[-1] if blocks else ("" if "```" in text else text)).lstrip()


def run_tests(code: str, tests: Sequence[Mapping[str, Any]], limits: Limits | None = None) -> list[bool]:
    """Which tests pass: `{"call": name, "args": […], "expected": value}` or `{"stdin": text, "stdout": text}`.

    Values are compared here, as JSON: 1, 1.0 and true differ, a tuple equals the list of its elements.
    Raises: ValueError for a test of neither form.
    """
    limits = limits or Limits()
    calls = [test for test in tests if "call" in test]
    for test in tests:
        if not ({"call", "args", "expected"} <= set(test) or {"stdin", "stdout"} <= set(test)):
            raise ValueError(f"test with the keys {sorted(test)}: expected call, args, expected or stdin, stdout")
    values = iter(run_calls(code, [(test["call"], test["args"]) for test in calls], limits) if calls else [])
    passed: list[bool] = []
    for test in tests:
        if "call" in test:
            result = next(values)
            passed.append(result.ok and same_json(result.value, test["expected"]))
        else:
            result = run_script(code, test["stdin"], limits)
            passed.append(result.ok and str(result.value).split() == test["stdout"].split())
    return passed
