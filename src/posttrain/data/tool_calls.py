"""Tool calls in the text of an answer → `tool_calls`, by the form in which a chat template writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SaidCall = tuple[str, str]
"""Name, and arguments as JSON text."""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How a family of templates writes calls.

    `begin` starts them wherever it stands in the answer; "{" only where it is the first character. `shown_by` is what the
    family's templates have in their text. A forced call is written `around[0] + open + arguments + close + around[1]`, with
    NAME in `open` for the tool's name.
    """

    name: str
    begin: str
    shown_by: str
    parse: Callable[[str], list[SaidCall]]
    open: str
    close: str
    around: tuple[str, str] = ("", "")

    def split(self, text: str) -> tuple[str, list[SaidCall]]:
        """The answer's own words, and its calls; what only looks like a call is left as words."""
        at = self._place(text)
        if at < 0:
            return text, []
        try:
            calls = self.parse(text[at:])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return text, []
        return (text[:at], calls) if calls else (text, [])

    def certain(self, text: str) -> int:
        """How many characters of an answer that goes on are words, whatever comes."""
        if self.is_whole_answer:
            return 0 if self._place(text) >= 0 or not text.strip() else len(text)
        if (at := self._place(text)) >= 0:
            return at
        beginning = (n for n in range(len(self.begin) - 1, 0, -1) if text.endswith(self.begin[:n]))
        return len(text) - next(beginning, 0)

    @property
    def is_whole_answer(self) -> bool:
        """Whether a call is recognised at the start of an answer only."""
        return self.begin == "{"

    def _place(self, text: str) -> int:
        at = text.find(self.begin)
        return -1 if self.is_whole_answer and text[: max(at, 0)].strip() else at


def _calls_of(records: Any, arguments: str = "arguments") -> list[SaidCall]:
    """Raises: KeyError, TypeError or ValueError where a record is no call."""
    found: list[SaidCall] = []
    for record in records if isinstance(records, list) else [records]:
        name, given = record["name"], record[arguments]
        if not isinstance(name, str) or not isinstance(given, dict):
            raise ValueError("no call")
        found.append((name, json.dumps(given, ensure_ascii=False)))
        "".join(found[-1]).encode()  # half a character cannot be told to anybody: UnicodeEncodeError, a ValueError
    return found


def _between(text: str, begin: str, end: str) -> list[str]:
    found = re.findall(rf"{re.escape(begin)}(.*?){re.escape(end)}", text, re.DOTALL)
    if not found:
        raise ValueError("no call")
    return found


def _hermes(text: str) -> list[SaidCall]:
    return [call for part in _between(text, "<tool_call>", "</tool_call>") for call in _calls_of(json.loads(part))]


def _llama(text: str) -> list[SaidCall]:
    return _calls_of(json.loads(text), "parameters")


def _mistral(text: str) -> list[SaidCall]:
    return _calls_of(json.loads(text.removeprefix("[TOOL_CALLS]")))


_DEEPSEEK = re.compile(r"function<\|sep\|>(.*?)\n```json\n(.*?)\n```", re.DOTALL)


def _deepseek(text: str) -> list[SaidCall]:
    records: list[Mapping[str, Any]] = []
    for part in _between(text, "<|call_begin|>", "<|call_end|>"):
        name, arguments = _DEEPSEEK.fullmatch(part.strip()).groups()  # pyright: ignore[reportOptionalMemberAccess]
        records.append({"name": name, "arguments": json.loads(arguments)})
    return _calls_of(records)


SYNTAXES: tuple[CallSyntax, ...] = (
    CallSyntax(
        "hermes", "<tool_call>", "<tool_call>", _hermes,
        '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>",
    ),
    CallSyntax(
        "mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", _mistral,
        '{"name": "NAME", "arguments": ', "}", ("[TOOL_CALLS] [", "]"),
    ),
    CallSyntax(
        "deepseek", "<|calls_begin|>", "<|calls_begin|>", _deepseek,
        "<|call_begin|>function<|sep|>NAME\n```json\n", "\n```<|call_end|>", ("<|calls_begin|>", "<|calls_end|>"),
    ),
    CallSyntax("llama", "{", '"parameters": ', _llama, '{"name": "NAME", "parameters": ', "}"),
)  # fmt: skip
"""The first whose mark is in a template is the template's."""


def syntax_of(template: Any) -> CallSyntax | None:
    """How a template's models call tools; None where it does not say."""
    return next((syntax for syntax in SYNTAXES if syntax.shown_by in str(template or "")), None)
