"""Where the answer of a completion stands: outside the reasoning, in a box, after `####` or `Answer:`.

Knows nothing of what a right answer is. Every function takes any string, is linear in it and never raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_THINK = re.compile(r"<\s*(/?)\s*think\s*>", re.IGNORECASE)
_COMMENTS = re.compile(r"^[ \t]*%[^\n]*", re.MULTILINE)
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|(?P<bare>\\boxed(?![A-Za-z]))|(?P<escaped>\\.)|(?P<brace>[{}])", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_ANSWER = re.compile(r"\banswer(?:[ \t]+is|[ \t]*\*{0,2}[:=])[ \t:*]*([^\n]*)", re.IGNORECASE)
# The words right before a slot that turn it into its opposite, or into one of several.
_DENIED_BEFORE = re.compile(r"(?:\bnot|n't|≠|\\neq?|\bnever|\bexcept|\bor|\bthan|\bunlike)\W*$", re.IGNORECASE)
# What takes an answer back once it was given.
_RETRACTED_AFTER = re.compile(
    r"^\W*(?:or|not|no)\b|\bis(?: not|n't| wrong| incorrect| false)\b|\bwait\b|\bactually\b|\bwrong\b|\bincorrect\b"
    r"|\bmistaken?\b|\bcorrection\b|\bscratch that\b|\bretract|\bwithdraw\b|\bignore\b|\bdisregard\b|\binstead\b|\boops\b"
    r"|\bsecond thoughts?\b|\breconsider|\bI mean[t]?\b|\bshould (?:be|have been)\b|\bnever ?mind\b|\bno,|\brather\b"
    r"|\bchanged? my mind\b|\bnot (?:right|correct|true|the answer)\b",
    re.IGNORECASE,
)
_CLAIM = re.compile(
    r"\b(?:answer|result|value|total|solution|it)[ \t]*(?:is|was|equals|=|:)[ \t:]*"
    r"(?P<said>\$[^$\n]{1,200}\$|[-+−–(\[\\0-9][^\s;]{0,200}|(?-i:[A-Z])\w{0,40})",
    re.IGNORECASE,
)
_BEFORE_CHARS = 60


@dataclass(frozen=True, slots=True)
class Slot:
    """One place an answer was written: `text[start:end]` is the whole slot, `content` what stands in it."""

    start: int
    end: int
    content: str


def think_tags(text: str) -> list[tuple[int, int, bool]]:
    """(start, end, is_closing) of every think tag."""
    return [(m.start(), m.end(), bool(m.group(1))) for m in _THINK.finditer(text)]


def visible(text: str) -> str | None:
    """What stands outside the reasoning. None when the reasoning is unclosed, repeated or nested: then nothing counts.

    A lone `</think>` is accepted, because some chat templates write the opening tag into the prompt.
    """
    tags = think_tags(text)
    closings = [tag[2] for tag in tags]
    if not tags:
        return text
    if closings == [True]:
        return text[tags[0][1] :]
    if closings == [False, True]:
        return text[: tags[0][0]] + text[tags[1][1] :]
    return None


def without_comments(text: str) -> str:
    """`text` without code fences, HTML comments and lines that are LaTeX comments; an unclosed one runs to the end."""
    for opening, closing in (("```", "```"), ("~~~", "~~~"), ("<!--", "-->")):
        text = _cut(text, opening, closing)
    return _COMMENTS.sub("", text)


def _cut(text: str, opening: str, closing: str) -> str:
    kept: list[str] = []
    position = 0
    while (start := text.find(opening, position)) >= 0:
        kept.append(text[position:start])
        end = text.find(closing, start + len(opening))
        if end < 0:
            return "".join(kept)
        position = end + len(closing)
    kept.append(text[position:])
    return "".join(kept)


def boxes(text: str) -> list[Slot] | None:
    r"""The outermost `\boxed{…}`, `\boxed{\boxed{…}}` unwrapped. None when a box is unclosed or has no braces."""
    closing_of: dict[int, int] = {}
    opened: list[tuple[int, int]] = []  # (start of the slot or -1 for a plain brace, start of its content)
    found: list[tuple[int, int, int]] = []
    num_open_boxes = 0
    for match in _BRACES.finditer(text):
        if match.group("bare"):
            return None
        if match.group("box"):
            opened.append((match.start(), match.end()))
            num_open_boxes += 1
        elif match.group("brace") == "{":
            opened.append((-1, match.end()))
        elif match.group("brace") == "}" and opened:
            start, content = opened.pop()
            if start >= 0:
                closing_of[start] = match.start()
                num_open_boxes -= 1
                if num_open_boxes == 0:
                    found.append((start, content, match.start()))
    if num_open_boxes:
        return None
    return [Slot(start, end + 1, _unwrap(text, content, end, closing_of)) for start, content, end in found]


_NESTED = re.compile(r"\s*(\\boxed)\s*\{")
_SPACE = re.compile(r"\s*")


def _unwrap(text: str, start: int, end: int, closing_of: dict[int, int]) -> str:
    while match := _NESTED.match(text, start, end):
        closing = closing_of.get(match.start(1), -1)
        if closing < 0 or text[closing + 1 : end].strip():
            break
        start, end = match.end(), closing
    return text[start:end]


def lines(text: str) -> list[Slot]:
    """What follows `####`, or else `Answer:` or `the answer is`, up to the end of its line, without bold marks around it."""
    for pattern in (_HASHES, _ANSWER):
        found = [Slot(m.start(), m.end(), _without_bold(m.group(1))) for m in pattern.finditer(text)]
        if found := [slot for slot in found if slot.content.strip()]:
            return found
    return []


def _without_bold(text: str) -> str:
    """`18` of `**18**.`, and of `18**` where the line began in bold."""
    text = text.strip(" \t*")
    inner = text.rstrip(".!,;:")
    return inner.rstrip(" *") if inner.endswith("*") else text


def taken_back(text: str, slots: list[Slot]) -> bool:
    """Whether the words around the slots deny, retract or hedge what they say. English only."""
    if any(_DENIED_BEFORE.search(text[max(0, slot.start - _BEFORE_CHARS) : slot.start]) for slot in slots):
        return True
    return bool(slots) and _RETRACTED_AFTER.search(text[slots[-1].end :]) is not None


def later_claims(text: str, slots: list[Slot]) -> list[str]:
    """What the text after the last slot says the answer is: numbers, formulas, capitalised words."""
    return [m.group("said") for m in _CLAIM.finditer(text, slots[-1].end)] if slots else []
