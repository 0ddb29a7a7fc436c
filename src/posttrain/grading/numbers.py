"""Written numbers: text without its typesetting, and the exact value and unit of a number.

A number is a value, not a computation: `17\\times 24`, `41=42`, `41, 42` and `42 or 43` are none. Every function takes
any string and never raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

MAX_ANSWER_CHARS = 2000
"""Longer slot contents equal nothing; so what follows works on bounded text."""

MINUS_SIGNS = "-−\u2010\u2011\u2012–\ufe63\uff0d"
"""What is typed for a minus: hyphens, the figure dash and the en dash among them."""
_CHARACTERS: dict[int, str] = (
    {ord(c): "" for c in "\u200b\u200c\u200d\u2060\ufeff"}
    | {ord(sign): "-" for sign in MINUS_SIGNS}
    | {ord("\uff0e"): ".", ord("％"): "%"}
    | {0xFF10 + digit: str(digit) for digit in range(10)}
    | {ord("∅"): "\\emptyset", ord("∞"): "\\infty", ord("∪"): "\\cup ", ord("≤"): "\\le ", ord("≥"): "\\ge "}
    | {ord("±"): "\\pm ", ord("≠"): "\\ne ", ord("∈"): "\\in "}
)
_DIGIT_GAP = re.compile(r"(?<=[0-9])(?:\\,|\\!|,\\!|\{,\}|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
# `\\ ` is a row of a matrix that ends, not a space.
_SPACING = re.compile(
    r"(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\\displaystyle(?![A-Za-z])|\\(?:left|right)(?![A-Za-z])"
)
_SYNONYMS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\\[dtc]frac(?![A-Za-z])", "\\frac"),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", "\\emptyset"),
        (r"\\l(?:eqslant|eq)(?![A-Za-z])|<=", "\\le "),
        (r"\\g(?:eqslant|eq)(?![A-Za-z])|>=", "\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\neq(?![A-Za-z])", "\\ne "),
        (r"\\lbrace(?![A-Za-z])", "\\{"),
        (r"\\rbrace(?![A-Za-z])", "\\}"),
        (r"(?<![\w)}\]])\s*\+\s*\\infty(?![A-Za-z])", "\\infty"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", "°"),
    )
)
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹]+")
_SUPERSCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|mbox|bm)\s*\{([^{}]*)\}"
)
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("{", "}"))
_NUMBER = re.compile(
    r"(?P<currency>\\?\$|[€£¥])?\s*(?P<sign>[+-])?\s*(?P<currency2>\\?\$|[€£¥])?"
    r"(?:(?P<whole>[0-9]+)?\s*\\frac\s*(?:\{\s*(?P<num>[+-]?[0-9]+)\s*\}|(?P<num1>[0-9]))\s*(?:\{\s*(?P<den>[+-]?[0-9]+)\s*\}|(?P<den1>[0-9]))"
    r"|(?:(?P<whole2>[0-9]+)\s+)?(?P<num2>[0-9]+)\s*/\s*(?P<den2>[0-9]+)"
    r"|(?P<start>[0-9]*\.[0-9]*)\\overline\s*\{\s*(?P<period>[0-9]{1,40})\s*\}"
    r"|(?P<decimal>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,3})(?![0-9.])"
    r"|\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*(?:\{\s*(?P<exponent1>[+-]?[0-9]{1,3})\s*\}|(?P<exponent2>[+-]?[0-9]{1,3})(?![0-9.])))?)"
    r"\s*(?P<unit>.*)",
    re.DOTALL,
)
_UNITS = frozenset(
    re.findall(
        r"\S+",
        "$ € £ ¥ dollar dollars euro euros cent cents pound pounds mm cm dm m km meter meters metre metres kilometers "
        "inch inches in ft foot feet yard yards mile miles mi mm^2 cm^2 m^2 km^2 mm^3 cm^3 m^3 ml mL l L liter liters "
        "litre litres g mg kg t gram grams kilogram kilograms ton tons lb lbs oz ounce ounces s sec second seconds min "
        "minute minutes h hr hour hours day days week weeks month months year years ms km/h m/s mph m/s^2 ° degree "
        "degrees °C °F K J kJ W kW V A N Pa Hz",
    )
)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit; `%` is a unit."""

    value: Fraction
    unit: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether the unit is surely one of measurement or money: a single letter may be a variable."""
        return self.unit in _UNITS and not (len(self.unit) == 1 and self.unit.isalpha())


def normalise(text: str) -> str:
    """`text` without what only typesets it; empty when there is nothing left or it is too long to be an answer."""
    text = text.strip()
    if len(text) > MAX_ANSWER_CHARS:
        return ""
    text = _DIGIT_GAP.sub(",", text.translate(_CHARACTERS))
    text = _SPACING.sub(" ", text)
    for pattern, name in _SYNONYMS:
        text = pattern.sub(lambda match, name=name: name, text)
    text = _SUPERSCRIPTS.sub(lambda match: "^{" + match.group().translate(_SUPERSCRIPT_DIGITS) + "}", text)
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


_SINGLE_IN_BRACES = re.compile(r"([_^])\{([A-Za-z0-9])\}")


def canonical(text: str) -> str:
    """`text` without the spaces and braces that mean nothing."""
    return _SINGLE_IN_BRACES.sub(r"\1\2", _AROUND_SIGNS.sub(r"\1", text))


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
        exponent = int(match["exponent"] or match["exponent1"] or match["exponent2"] or 0)
        return Fraction(decimal.replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    if (start := match["start"]) is not None:
        places, period = len(start.partition(".")[2]), match["period"]
        return Fraction("0" + start + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    numerator = int(match["num"] or match["num1"] or match["num2"])
    denominator = int(match["den"] or match["den1"] or match["den2"])
    whole = match["whole"] or match["whole2"]
    if denominator < 0:
        numerator, denominator = -numerator, -denominator
    if denominator == 0 or (whole and not 0 < numerator < denominator):
        return None
    if lowest_terms and (denominator == 1 or gcd(numerator, denominator) != 1):
        return None
    return int(whole or 0) + Fraction(numerator, denominator)


def _unit(text: str) -> str:
    return re.sub(r"[{}\s]", "", text).replace("\\%", "%").replace("\\circ", "°")


def same_quantity(answer: Quantity, reference: Quantity) -> bool:
    """Equal value; the unit is the reference's, or left away where the reference's is a unit of measurement."""
    units_agree = answer.unit == reference.unit or (not answer.unit and reference.unit in _UNITS)
    return answer.value == reference.value and units_agree


def is_plain_number(quantity: Quantity) -> bool:
    """Whether the unit is a unit or a thing counted, not the rest of a formula as in `5x` or `2\\sqrt{3}`."""
    return quantity.unit in ("", "%") or quantity.unit in _UNITS or (quantity.unit.isalpha() and len(quantity.unit) > 2)
