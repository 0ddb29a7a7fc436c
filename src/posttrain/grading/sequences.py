r"""Answers that have parts: tuples, sets, lists, matrices, `\pm`. Knows nothing of what the parts are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Same = Callable[[str, str], bool]
_MAX_NESTING, _MAX_ELEMENTS = 10, 200
_MAX_UNORDERED = 30
_AND = re.compile(r",?\s+(?:and|or)\s+|\s*;\s*")
_MATRIX = re.compile(r"\\begin\s*\{([a-zA-Z]*matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Parts:
    brackets: tuple[str, str]
    elements: list[str]

    @property
    def is_set(self) -> bool:
        return self.brackets[0] == "\\{"

    @property
    def is_bare(self) -> bool:
        return not self.brackets[0]


def split_sequence(text: str) -> Parts | None:
    """A tuple, interval, set or bare list (`1, 2 and 3`) of at least two elements, or a set of one; None if it is none of these."""
    opening = next((o for o in ("\\{", "(", "[") if text.startswith(o)), "")
    closing = next((c for c in ("\\}", ")", "]") if text.endswith(c)), "")
    if not opening or not closing or not _encloses(text, opening):
        opening = closing = ""
    inner = text[len(opening) : len(text) - len(closing)]
    if not opening:
        inner = _AND.sub(",", inner)
    parts = split_at(inner, ",")
    if parts is None or len(parts) > _MAX_ELEMENTS or (len(parts) < 2 and opening != "\\{"):
        return None
    return Parts((opening, closing), parts)


def _encloses(text: str, opening: str) -> bool:
    """Whether the bracket at the start is closed by the one at the end: not so in `(1,2),(3,4)`."""
    depth = 0
    for index in range(len(opening) - 1, len(text)):
        depth += (text[index] in "([{") - (text[index] in ")]}")
        if depth == 0:
            return index == len(text) - 1
    return False


def split_at(text: str, separator: str) -> list[str] | None:
    """The parts of `text` between separators outside brackets; None if brackets do not match or nest too deep."""
    parts, depth, start = list[str](), 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if not 0 <= depth <= _MAX_NESTING:
            return None
        if depth == 0 and text.startswith(separator, index):
            parts.append(text[start:index])
            start = index + len(separator)
    parts.append(text[start:])
    return parts if depth == 0 and len(parts) <= _MAX_ELEMENTS else None


def same_elements(got: Sequence[str], wanted: Sequence[str], same: Same, *, ordered: bool) -> bool:
    """Whether there are equally many and they are the same, in order or as a multiset."""
    if len(got) != len(wanted):
        return False
    if ordered:
        return all(same(a, b) for a, b in zip(got, wanted, strict=True))
    if len(wanted) > _MAX_UNORDERED:
        return False
    left = list(got)
    for element in wanted:
        index = next((i for i, other in enumerate(left) if same(other, element)), None)
        if index is None:
            return False
        left.pop(index)
    return True


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of cells; a determinant (`vmatrix`) is no matrix, the other brackets are a matter of taste."""

    is_determinant: bool
    rows: tuple[tuple[str, ...], ...]

    def same(self, other: Matrix, same: Same) -> bool:
        return (
            self.is_determinant == other.is_determinant
            and [len(row) for row in self.rows] == [len(row) for row in other.rows]
            and all(
                same(a, b)
                for left, right in zip(self.rows, other.rows, strict=True)
                for a, b in zip(left, right, strict=True)
            )
        )


def matrix(text: str) -> Matrix | None:
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [row for row in re.split(r"\\\\(?:\*|\s*\[[0-9.]+\s*[a-z]{2}\])?|\\cr(?![A-Za-z])", match[2]) if row.strip()]
    cells = tuple(tuple(cell.strip() for cell in row.split("&")) for row in rows)
    return Matrix(match[1][0] in "vV", cells) if sum(map(len, cells)) <= _MAX_ELEMENTS else None


def plus_minus(text: str) -> list[str] | None:
    r"""The two values of a formula with one `\pm`."""
    parts = _PLUS_MINUS.split(text)
    return [f"{parts[0]}{sign}{parts[1]}" for sign in "+-"] if len(parts) == 2 else None
