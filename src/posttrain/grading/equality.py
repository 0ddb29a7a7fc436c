r"""When two written answers are the same: numbers, words, formulas, lists, matrices, intervals, equations.

Two stances, each a row of `Stance`: a reward takes one way to write a value, an eval takes every way (`6/8` for `3/4`).
In both, equality is exact where it can be and never within a tolerance that a wrong answer fits into. Every function
takes any string, in bounded time, and never raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

from posttrain.grading.numbers import canonical, is_plain_number, normalise, parse_quantity, same_quantity
from posttrain.grading.regions import is_region, regions
from posttrain.grading.sequences import matrix, plus_minus, same_elements, split_at, split_sequence
from posttrain.grading.symbolic import same_value, same_zeros


@dataclass(frozen=True, slots=True)
class Stance:
    """`formulas`: compare them by value. `lenient`: unreduced fractions, powers, case of words, ratios, the order of a bare list."""

    formulas: bool
    lenient: bool


_STRICT, _FORMULAS, _EVAL = Stance(False, False), Stance(True, False), Stance(True, True)
_MAX_DEPTH = 6
_WORDS = re.compile(r"[A-Za-z]{2,}(?:[ '-]+[A-Za-z]+)*")
_DIMENSIONS = re.compile(r"[0-9]+(?:\s*(?:\\times(?![A-Za-z])|×)\s*[0-9]+)+")
_RATIO = re.compile(r"(?:0|[1-9][0-9]{0,20})(?:\s*:\s*(?:0|[1-9][0-9]{0,20}))+")
_POWER = re.compile(r"[+-]?[0-9]+\s*\^\s*(?:\{\s*[+-]?[0-9]+\s*\}|[+-]?[0-9]+)")
_EQUALS, _IN = re.compile("="), re.compile(r"\\in(?![A-Za-z])")
_NAME = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]{2,8})(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]{1,8}\}))?\s*(?:\(\s*[A-Za-z]\s*\))?\s*"
)


def same_answer(answer: str, reference: str) -> bool:
    """The same number or the same text, written as an answer: no computation is left to the reader, no algebra is done."""
    return _same(normalise(answer), normalise(reference), _STRICT)


def math_equal(answer: str, reference: str) -> bool:
    r"""`same_answer`, and formulas by value. A reference that is a number takes a number: `\sqrt{1764}` is not yet 42."""
    return _same(normalise(answer), normalise(reference), _FORMULAS)


def equal_values(answer: str, reference: str) -> bool:
    """Equal values are equal, however they are written: what an eval counts as right."""
    return _same(normalise(answer), normalise(reference), _EVAL)


def _same(answer: str, reference: str, stance: Stance, depth: int = 0) -> bool:
    if not answer or not reference or depth > _MAX_DEPTH:
        return False
    if canonical(answer) == canonical(reference):
        return True
    if stance.formulas:
        answer, reference = _without_name(answer, reference), _without_name(reference, answer)
    if stance.lenient:
        answer, reference = _without_brackets(answer), _without_brackets(reference)
    if stance.lenient and _WORDS.fullmatch(answer) and _WORDS.fullmatch(reference):
        return answer.casefold() == reference.casefold()
    number = _as_number(answer, reference, stance)
    if number is not None:
        return number

    def same_element(one: str, other: str) -> bool:
        return _same(one.strip(), other.strip(), stance, depth + 1)

    structure = _as_structure(answer, reference, stance, same_element)
    if structure is not None or not stance.formulas:
        return structure is True
    return _as_formula(answer, reference)


def _as_number(answer: str, reference: str, stance: Stance) -> bool | None:
    """None where the reference is no number."""
    wanted = parse_quantity(reference, lowest_terms=False)
    if wanted is None or (stance.formulas and not is_plain_number(wanted)) or _DIMENSIONS.fullmatch(reference):
        return None
    if stance.lenient and _POWER.fullmatch(answer) and not wanted.unit:
        return same_value(answer, str(wanted.value))
    got = parse_quantity(answer, lowest_terms=not stance.lenient)
    if got is None:
        return False
    if stance.lenient and not wanted.unit and got.is_measured:
        return got.value == wanted.value
    return same_quantity(got, wanted)


def _as_structure(answer: str, reference: str, stance: Stance, same: Callable[[str, str], bool]) -> bool | None:
    """None where neither side has parts that are compared one by one."""
    if _DIMENSIONS.fullmatch(reference):
        return bool(_DIMENSIONS.fullmatch(answer)) and _integers(answer) == _integers(reference)
    if ":" in reference:
        return stance.lenient and _same_ratio(answer, reference)
    if stance.formulas:
        if (signs := (plus_minus(answer), plus_minus(reference))) != (None, None):
            return same_elements(signs[0] or _parts(answer), signs[1] or _parts(reference), same, ordered=False)
        if is_region(answer) or is_region(reference):
            got, wanted = regions(answer), regions(reference)
            if got is not None and wanted is not None:
                return got.same(wanted, same)
    if (wanted_cells := matrix(reference)) is not None:
        got_cells = matrix(answer)
        return got_cells is not None and got_cells.same(wanted_cells, same)
    wanted_parts = split_sequence(reference)
    if wanted_parts is None:
        return None
    got_parts = split_sequence(answer)
    if got_parts is None or got_parts.brackets != wanted_parts.brackets:
        return False
    ordered = not wanted_parts.is_set and not (stance.lenient and wanted_parts.is_bare)
    return same_elements(got_parts.elements, wanted_parts.elements, same, ordered=ordered)


def _as_formula(answer: str, reference: str) -> bool:
    # A reference is the simplified form; something much longer is the question handed back.
    if len(answer) > 3 * len(reference) + 30:
        return False
    if answer.count("=") == reference.count("=") == 1:
        sides = [f"({left})-({right})" for left, _, right in (text.partition("=") for text in (answer, reference))]
        return same_zeros(sides[0], sides[1])
    return same_value(answer, reference)


def _without_name(text: str, other: str) -> str:
    """`x=…` or `x \\in …` without its `x`, where the other has none: naming the unknown is no claim of its own."""
    for sign in (_EQUALS, _IN):
        match = sign.search(text)
        if match and not sign.search(other) and _NAME.fullmatch(text[: match.start()]) and text[match.end() :].strip():
            return text[match.end() :].strip()
    return text


def _without_brackets(text: str) -> str:
    """`(5)` without its brackets; a pair is a tuple or an interval."""
    inner = text[1:-1].strip()
    is_one = text[:1] == "(" and text[-1:] == ")" and "," not in text and split_at(inner, ",") == [inner]
    return inner if is_one and inner else text


def _parts(text: str) -> Sequence[str]:
    found = split_sequence(text)
    return found.elements if found else [text]


def _integers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"[0-9]+", text)]


def _same_ratio(answer: str, reference: str) -> bool:
    """`6:8` for `3:4`; a part that begins with a zero (`7:05`) is no ratio but a time, and equals only itself."""
    if not (_RATIO.fullmatch(answer) and _RATIO.fullmatch(reference)):
        return False
    reduced = [[part // (gcd(*parts) or 1) for part in parts] for parts in map(_integers, (answer, reference))]
    return reduced[0] == reduced[1]
