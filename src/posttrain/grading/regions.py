r"""Parts of the real line: `(-\infty, 4)`, `x < 4`, `[0,1) \cup \{2\}`, `x \ne 3`. Ends are texts that the caller compares."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from posttrain.grading.sequences import same_elements, split_at

_MARKS = re.compile(r"[<>]|\\(?:le|ge|ne|cup|infty|mathbb)(?![A-Za-z])|^\s*\(.*\]\s*$|^\s*\[.*\)\s*$", re.DOTALL)
_RELATION = re.compile(r"(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z]))")
_VARIABLE = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]{2,8})(?:_\{?[A-Za-z0-9]+\}?)?")
_UNION = re.compile(r"\s*\\cup(?![A-Za-z])\s*|\s+or\s+")
_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|\(\s*-\\infty\s*,\s*\+?\\infty\s*\)")
_INFINITY = re.compile(r"([+-]?)\s*(?:\\infty|infinity|oo)")
_MAX_PIECES = 20
_INSIDE = {"<": False, ">": False, "\\le": True, "\\ge": True}


@dataclass(frozen=True, slots=True)
class Piece:
    """From `low` to `high`, each with whether it belongs to it. Ends are formulas, `-inf` or `inf`."""

    low: str
    has_low: bool
    high: str
    has_high: bool


@dataclass(frozen=True, slots=True)
class Region:
    variable: str | None
    pieces: tuple[Piece, ...]

    def same(self, other: Region, same_end: Callable[[str, str], bool]) -> bool:
        """The same pieces in any order; a named variable must be the same where both name one."""
        if self.variable and other.variable and self.variable != other.variable:
            return False
        if len(self.pieces) != len(other.pieces):
            return False
        numbers = [str(index) for index in range(len(self.pieces))]

        def same_piece(one: str, two: str) -> bool:
            a, b = self.pieces[int(one)], other.pieces[int(two)]
            kinds = (a.has_low, a.has_high) == (b.has_low, b.has_high)
            return kinds and all(
                x == y or ("inf" not in x + y and same_end(x, y)) for x, y in ((a.low, b.low), (a.high, b.high))
            )

        return same_elements(numbers, numbers, same_piece, ordered=False)


def is_region(text: str) -> bool:
    """Whether it is written as one: a pair in round brackets alone may be a point."""
    return _MARKS.search(text) is not None


def regions(text: str) -> Region | None:
    """None for what is no region of one variable."""
    if membership := re.search(r"\\in(?![A-Za-z])", text):
        name, text = text[: membership.start()], text[membership.end() :]
        inner = regions(text)
        return Region(name.strip(), inner.pieces) if inner and _VARIABLE.fullmatch(name.strip()) else None
    found: list[Piece] = []
    variables: set[str] = set()
    for part in _UNION.split(text)[:_MAX_PIECES]:
        made = _interval(part) or _inequality(part, variables)
        if made is None:
            return None
        found += made
    return Region(next(iter(variables), None), tuple(found)) if len(variables) <= 1 else None


def _interval(text: str) -> list[Piece] | None:
    text = text.strip()
    if _REALS.fullmatch(text):
        return [Piece("-inf", False, "inf", False)]
    if text.startswith("\\{") and text.endswith("\\}"):
        points = split_at(text[2:-2], ",")
        return [Piece(point.strip(), True, point.strip(), True) for point in points] if points else None
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]"):
        return None
    ends = split_at(text[1:-1], ",")
    if ends is None or len(ends) != 2:
        return None
    return [Piece(_end(ends[0]), text[0] == "[", _end(ends[1]), text[-1] == "]")]


def _end(text: str) -> str:
    infinity = _INFINITY.fullmatch(text.strip())
    if infinity is None:
        return text.strip()
    return "-inf" if infinity[1] == "-" else "inf"


def _inequality(text: str, variables: set[str]) -> list[Piece] | None:
    """`x<4`, `4>x`, `1<x\\le 2`, `x\\ne 3`; the name of the variable is added to `variables`."""
    parts = [part.strip() for part in _RELATION.split(text)]
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[2]) and not _VARIABLE.fullmatch(parts[0]):
        parts = [parts[2], _turned(parts[1]), parts[0]]
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[0]):
        variable, sign, end = parts[0], parts[1], _end(parts[2])
        variables.add(variable)
        if sign == "\\ne":
            return [Piece("-inf", False, end, False), Piece(end, False, "inf", False)]
        below = Piece("-inf", False, end, _INSIDE[sign])
        return [below if sign in ("<", "\\le") else Piece(end, _INSIDE[sign], "inf", False)]
    if len(parts) == 5 and _VARIABLE.fullmatch(parts[2]):
        if parts[1] in (">", "\\ge"):
            parts = [parts[4], _turned(parts[3]), parts[2], _turned(parts[1]), parts[0]]
        if parts[1] not in ("<", "\\le") or parts[3] not in ("<", "\\le"):
            return None
        variables.add(parts[2])
        return [Piece(_end(parts[0]), _INSIDE[parts[1]], _end(parts[4]), _INSIDE[parts[3]])]
    return None


def _turned(sign: str) -> str:
    return {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}.get(sign, sign)
