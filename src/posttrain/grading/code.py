"""Unit tests of code written by a model: the code runs in the sandbox, the expected values never leave this process."""

from __future__ import annotations

import math
import re
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.grading.sandbox import CallResult, SandboxLimits, run_calls, run_script
from posttrain.grading.schema import same_json

_OPENING = re.compile(
    r"(?:^[ \t>*-]*+|(?<![`~])(?=[`~]{3,}+[ \t]*\{?\.?py))(?P<fence>`{3,}+|~{3,}+)(?P<info>[^\n`]*+)(?:\n|\Z)",
    re.MULTILINE | re.IGNORECASE,
)
_LEXEME = (
    re.compile(  # what is left open runs to the end of its line, a docstring to the end of the text: so this is linear
        r"""(?P<triple>\"{3}|'{3})(?:[^\\]|\\.)*?(?:(?P=triple)|\Z)"""
        r"""|"(?:[^"\\\n]|\\[^\n])*+"?|'(?:[^'\\\n]|\\[^\n])*+'?|\#[^\n]*"""
        r"""|(?P<fence>`{3,}+|~{3,}+)(?P<info>[^\n`]*+)""",
        re.DOTALL,
    )
)
_PYTHON = re.compile(r"\{?\.?(?:python|py)[0-9.]*\b", re.IGNORECASE)
_STATEMENT = re.compile(
    r"^[ \t]*+(?:(?:def|class|import|from|for|while|if|try|with|async|print|@\w+)\b|[\w, .\[\]]++[-+*/|&^]?=(?!=))",
    re.MULTILINE,
)
_MAX_CODE_CHARS, _MAX_BLOCKS = 100_000, 64


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(what stands behind the opening fence, code) of each fenced block; an unclosed one runs to the end.

    A fence with a language always opens: it also ends a block that was left open. One without closes what is open.
    """
    position = 0
    for _ in range(_MAX_BLOCKS):
        opening = _OPENING.search(text, position)
        if opening is None:
            return
        end, position = _closing(text, opening.end(), opening["fence"][:3])
        yield opening["info"].strip(), text[opening.end() : end]


def _closing(text: str, start: int, mark: str) -> tuple[int, int]:
    """Where the block that begins at `start` ends, and where to look for the next."""
    for match in _LEXEME.finditer(text, start):
        if not (match["fence"] or "").startswith(mark):
            continue
        opens = text[match.start() - 1] == "\n" and (
            match["info"].strip() if not match["info"][:1].isspace() else False
        )
        return match.start(), match.start() if opens else match.end()
    # A quote that is never closed hides the fence.
    closing = text.find("\n" + mark, start)
    return (closing, closing + 1 + len(mark)) if closing >= 0 else (len(text), len(text))


def extract_code(text: str) -> str:
    """The last fenced block of Python, or the whole text when there is no fence; its first line not indented.

    A block in another language is none. One without a language counts when it holds a statement, or is all there is:
    what a program prints stands in such blocks too.
    """
    if len(text) > _MAX_CODE_CHARS:
        return ""
    blocks = list(_blocks(text))
    if not blocks:
        return textwrap.dedent(text).lstrip()
    untagged = [code for info, code in blocks if not info]
    code = [code for info, code in blocks if _PYTHON.match(info) or (not info and _STATEMENT.search(code))]
    return textwrap.dedent((code or untagged or [""])[-1]).lstrip()


def run_tests(
    code: str,
    tests: Sequence[Mapping[str, Any]],
    limits: SandboxLimits | None = None,
    *,
    budget_s: float = 60.0,
    stop_at_failure: bool = False,
) -> list[bool]:
    """Which tests pass: `{"call": name, "args": […], "expected": value}` or `{"stdin": text, "stdout": text}`.

    Each test has `limits.wall_s`, all together `budget_s`; what is not reached, or stands behind the first failure with
    `stop_at_failure`, does not pass. Values are compared here, as JSON: 1, 1.0 and true differ, a tuple equals the list of its elements.
    Raises: ValueError for a test of neither form.
    """
    for test in tests:
        if not ({"call", "args", "expected"} <= set(test) or {"stdin", "stdout"} <= set(test)):
            raise ValueError(f"test with the keys {sorted(test)}: expected call, args, expected or stdin, stdout")
    run = _CodeRun(code, limits or SandboxLimits(), time.monotonic() + budget_s, stop_at_failure)
    passed = [False] * len(tests)
    calls = [index for index, test in enumerate(tests) if "call" in test]
    scripts = [index for index, test in enumerate(tests) if "call" not in test]
    run.calls(calls, tests, passed)
    if not (stop_at_failure and calls and not all(passed[index] for index in calls)):
        run.scripts(scripts, tests, passed)
    return passed


class _CodeRun:
    """One completion's code under its clock."""

    def __init__(self, code: str, limits: SandboxLimits, end: float, stop_at_failure: bool) -> None:
        self.code, self.limits, self.end, self.stop_at_failure = code, limits, end, stop_at_failure

    def calls(self, waiting: Sequence[int], tests: Sequence[Mapping[str, Any]], passed: list[bool]) -> None:
        """In one process, and in a new one behind each call that ended its process."""
        while waiting and (limits := self._left()):
            order = list(waiting)

            def judge(place: int, result: CallResult, order: list[int] = order) -> bool:
                passed[order[place]] = result.ok and same_json(result.value, tests[order[place]]["expected"])
                return passed[order[place]] or not self.stop_at_failure

            results = run_calls(self.code, [(tests[i]["call"], tests[i]["args"]) for i in order], limits, judge)
            num_answered = next((n for n, result in enumerate(results) if not result.answered), len(results))
            if self.stop_at_failure:
                return
            waiting = order[num_answered + 1 :]

    def scripts(self, waiting: Sequence[int], tests: Sequence[Mapping[str, Any]], passed: list[bool]) -> None:
        for index in waiting:
            limits = self._left()
            if limits is None:
                return
            result = run_script(self.code, tests[index]["stdin"], limits)
            passed[index] = result.ok and str(result.value).split() == tests[index]["stdout"].split()
            if self.stop_at_failure and not passed[index]:
                return

    def _left(self) -> SandboxLimits | None:
        left = self.end - time.monotonic()
        if left <= 0:
            return None
        return replace(self.limits, wall_s=min(self.limits.wall_s, left), total_s=left, cpu_s=max(1, math.ceil(left)))
