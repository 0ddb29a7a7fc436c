"""When two written answers are the same: numbers, fractions, units, tuples and strings, strictly.

An answer is a value, not a computation: `17\\times 24`, `84/2`, `41=42`, `41, 42` and `42 or 43` equal no number.
`42%` is not 42, and a unit is accepted only where the reference has it. Every function takes any string and never raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

MAX_ANSWER_CHARS = 2000
"""Longer slot contents equal nothing; so what follows works on bounded text."""

_CHARACTERS: dict[int, str] = (
    {ord(c): "" for c in "\u200b\u200c\u200d\u2060\ufeff"}
    | {ord("−"): "-", ord("\uff0d"): "-", ord("\uff0e"): ".", ord("％"): "%"}
    | {0xFF10 + digit: str(digit) for digit in range(10)}
)
_DIGIT_GAP = re.compile(r"(?<=[0-9])(?:\\,|\\!|,\\!|\{,\}|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\\displaystyle(?![A-Za-z])|\\(?:left|right)(?![A-Za-z])")
_FRACTION_NAMES = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|mbox|bm)\s*\{([^{}]*)\}"
)
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("{", "}"))
_NUMBER = re.compile(
    r"(?P<currency>\\?\$|[€£¥])?\s*(?P<sign>[+-])?\s*(?P<currency2>\\?\$|[€£¥])?"
    r"(?:(?P<whole>[0-9]+)?\s*\\frac\s*(?:\{\s*(?P<num>[+-]?[0-9]+)\s*\}\s*\{\s*(?P<den>[0-9]+)\s*\}|(?P<num1>[0-9])\s*(?P<den1>[0-9]))"
    r"|(?:(?P<whole2>[0-9]+)\s+)?(?P<num2>[0-9]+)\s*/\s*(?P<den2>[0-9]+)"
    r"|(?P<decimal>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE](?P<exponent>[+-]?[0-9]{1,3})(?![0-9.]))?)"
    r"\s*(?P<unit>.*)",
    re.DOTALL,
)
_UNITS = frozenset(
    [
        "$",
        "€",
        "£",
        "¥",
        "dollar",
        "dollars",
        "euro",
        "euros",
        "cent",
        "cents",
        "pound",
        "pounds",
        "mm",
        "cm",
        "dm",
        "m",
        "km",
        "meter",
        "meters",
        "metre",
        "metres",
        "kilometers",
        "inch",
        "inches",
        "in",
        "ft",
        "foot",
        "feet",
        "yard",
        "yards",
        "mile",
        "miles",
        "mi",
        "mm^2",
        "cm^2",
        "m^2",
        "km^2",
        "mm^3",
        "cm^3",
        "m^3",
        "ml",
        "mL",
        "l",
        "L",
        "liter",
        "liters",
        "litre",
        "litres",
        "g",
        "mg",
        "kg",
        "t",
        "gram",
        "grams",
        "kilogram",
        "kilograms",
        "ton",
        "tons",
        "lb",
        "lbs",
        "oz",
        "ounce",
        "ounces",
        "s",
        "sec",
        "second",
        "seconds",
        "min",
        "minute",
        "minutes",
        "h",
        "hr",
        "hour",
        "hours",
        "day",
        "days",
        "week",
        "weeks",
        "month",
        "months",
        "year",
        "years",
        "ms",
        "km/h",
        "m/s",
        "mph",
        "m/s^2",
        "°",
        "degree",
        "degrees",
        "°C",
        "°F",
        "K",
        "J",
        "kJ",
        "W",
        "kW",
        "V",
        "A",
        "N",
        "Pa",
        "Hz",
    ]
)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit; `%` is a unit."""

    value: Fraction
    unit: str = ""


def normalise(text: str) -> str:
    """`text` without what only typesets it; empty when there is nothing left or it is too long to be an answer."""
    text = text.strip()
    if len(text) > MAX_ANSWER_CHARS:
        return ""
    text = _DIGIT_GAP.sub(",", text.translate(_CHARACTERS))
    text = _FRACTION_NAMES.sub(r"\\frac", _SPACING.sub(" ", text))
    for _ in range(8):
        before = text
        text = _unwrap(_WRAPPED.sub(r"\1", text).strip())
        if text == before:
            break
    return " ".join(text.split())


def _unwrap(text: str) -> str:
    for opening, closing in _WRAPPERS:
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            if opening == "{" and not _balanced(inner):
                continue
            if opening != "{" and (opening in inner or inner.endswith("\\")):
                continue
            return inner.strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


_AROUND_SIGNS = re.compile(r"\s*([^\w\s])\s*")


def canonical(text: str) -> str:
    """`text` without the spaces that mean nothing."""
    return _AROUND_SIGNS.sub(r"\1", text)


def parse_quantity(text: str, *, lowest_terms: bool = True) -> Quantity | None:
    """The number at the start of `normalise`d text, everything behind it taken as its unit.

    `lowest_terms` refuses `84/2` and `6/8`, which are computations left to the reader.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    value = _value(match, lowest_terms)
    if value is None:
        return None
    currency = match["currency"] or match["currency2"] or ""
    unit = currency.lstrip("\\") or _unit(match["unit"])
    if currency and match["unit"]:
        return None
    return Quantity(-value if match["sign"] == "-" else value, unit)


def _value(match: re.Match[str], lowest_terms: bool) -> Fraction | None:
    if (decimal := match["decimal"]) is not None:
        exponent = int(match["exponent"] or 0)
        return Fraction(decimal.replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    numerator = int(match["num"] or match["num1"] or match["num2"])
    denominator = int(match["den"] or match["den1"] or match["den2"])
    whole = match["whole"] or match["whole2"]
    if denominator == 0 or (whole and not 0 < numerator < denominator):
        return None
    if lowest_terms and (denominator == 1 or gcd(numerator, denominator) != 1):
        return None
    return int(whole or 0) + Fraction(numerator, denominator)


def _unit(text: str) -> str:
    unit = re.sub(r"[{}\s]", "", text).replace("\\%", "%").replace("^\\circ", "°").replace("\\circ", "°")
    return unit.replace("²", "^2").replace("³", "^3")


def same_quantity(answer: Quantity, reference: Quantity) -> bool:
    """Equal value; the unit is the reference's, or left away where the reference's is a unit of measurement."""
    units_agree = answer.unit == reference.unit or (not answer.unit and reference.unit in _UNITS)
    return answer.value == reference.value and units_agree


def is_plain_number(quantity: Quantity) -> bool:
    """Whether the unit is a unit or a thing counted, not the rest of a formula as in `5x` or `2\\sqrt{3}`."""
    return not quantity.unit or quantity.unit in _UNITS or (quantity.unit.isalpha() and len(quantity.unit) > 2)


def same_answer(answer: str, reference: str) -> bool:
    """Whether a slot's content says what the reference says, exactly: no tolerance, no algebra."""
    return _same(normalise(answer), normalise(reference), same_answer)


def _same(answer: str, reference: str, same_element: Callable[[str, str], bool]) -> bool:
    if not answer or not reference:
        return False
    if canonical(answer) == canonical(reference):
        return True
    wanted = parse_quantity(reference, lowest_terms=False)
    if wanted is not None:
        got = parse_quantity(answer)
        return got is not None and same_quantity(got, wanted)
    return same_sequence(answer, reference, same_element)


_MAX_NESTING = 10


def split_sequence(text: str) -> tuple[str, list[str], str] | None:
    """(opening, elements, closing) of a tuple, interval, set or bare list; None if it is none of these."""
    opening = next((o for o in ("\\{", "(", "[") if text.startswith(o)), "")
    closing = next((c for c in ("\\}", ")", "]") if text.endswith(c)), "")
    if bool(opening) != bool(closing):
        return None
    inner = text[len(opening) : len(text) - len(closing)]
    parts, depth, start = list[str](), 0, 0
    for index, character in enumerate(inner):
        depth += (character in "([{") - (character in ")]}")
        if not 0 <= depth <= _MAX_NESTING:
            return None
        if character == "," and depth == 0:
            parts.append(inner[start:index])
            start = index + 1
    parts.append(inner[start:])
    return (opening, parts, closing) if depth == 0 and len(parts) > 1 else None


def same_sequence(answer: str, reference: str, same_element: Callable[[str, str], bool]) -> bool:
    """Same brackets and the same elements: in order, or in any order between set braces."""
    got, wanted = split_sequence(answer), split_sequence(reference)
    if got is None or wanted is None or len(got[1]) != len(wanted[1]) or (got[0], got[2]) != (wanted[0], wanted[2]):
        return False
    if wanted[0] != "\\{":
        return all(same_element(a, b) for a, b in zip(got[1], wanted[1], strict=True))
    if len(wanted[1]) > 50:
        return False
    left = list(got[1])
    for element in wanted[1]:
        index = next((i for i, other in enumerate(left) if same_element(other, element)), None)
        if index is None:
            return False
        left.pop(index)
    return True
