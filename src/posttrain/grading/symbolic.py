"""Equality of small formulas by evaluating both at fixed points: enough for `2\\sqrt{3}` or `x(x+1)`, and always cheap.

No algebra system. Everything is a float, so no input can make it compute a huge integer.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable

from posttrain.grading.numbers import (
    is_plain_number,
    normalise,
    parse_quantity,
    same_answer,
    same_quantity,
    same_sequence,
    split_sequence,
)

_MAX_CHARS, _MAX_DEPTH = 400, 40
_POINTS = (0.7390851332, 1.3247179572, 2.2360679775, 0.1839286755)
_TOLERANCE = 1e-9
_LARGEST = 1e12  # beyond it a float does not tell neighbouring integers apart
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(?P<command>\\[A-Za-z]+)|(?P<letter>[A-Za-zπ])|(?P<sign>[-+*/^(){}\[\]·×√]))"
)
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "\\sqrt": cmath.sqrt, "√": cmath.sqrt, "\\sin": cmath.sin, "\\cos": cmath.cos, "\\tan": cmath.tan, "\\ln": cmath.log,
    "\\log": cmath.log10, "\\exp": cmath.exp, "\\arctan": cmath.atan, "\\arcsin": cmath.asin, "\\arccos": cmath.acos,
}  # fmt: skip
_CONSTANTS: dict[str, complex] = {"\\pi": math.pi, "π": math.pi, "e": math.e, "i": 1j}
_PRODUCTS = ("*", "·", "×", "\\cdot", "\\times")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class _UnreadableError(Exception):
    """The text is no formula that this module knows."""


class _Formula:
    """Recursive descent that computes as it reads, with the variables at one point."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens, self.point, self.index, self.depth = tokens, point, 0, 0

    def value(self) -> complex:
        result = self.total()
        if self.index != len(self.tokens):
            raise _UnreadableError
        return result

    def peek(self) -> str:
        return self.tokens[self.index] if self.index < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise _UnreadableError
        self.index += 1
        return token

    def total(self) -> complex:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _UnreadableError
        sign = -1 if self.peek() == "-" else 1
        if self.peek() in ("+", "-"):
            self.take()
        result = sign * self.product()
        while self.peek() in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            result += sign * self.product()
        self.depth -= 1
        return result

    def product(self) -> complex:
        result = self.power()
        while token := self.peek():
            if token in _PRODUCTS:
                self.take()
                result *= self.power()
            elif token == "/":
                self.take()
                result /= self.power()
            elif token in "+-)]}^":
                break
            elif token[0].isdigit() or token[0] == ".":
                raise _UnreadableError  # "2 3" is no product
            else:
                result *= self.power()
        return result

    def power(self) -> complex:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.take()
        return base ** (self.group() if self.peek() == "{" else self.atom())

    def group(self) -> complex:
        closing = _CLOSING.get(self.take())
        if closing is None:
            raise _UnreadableError
        result = self.total()
        if self.take() != closing:
            raise _UnreadableError
        return result

    def atom(self) -> complex:
        token = self.peek()
        if token in _CLOSING:
            return self.group()
        self.take()
        if token == "\\frac":
            return self.argument() / self.argument()
        if token in _FUNCTIONS:
            return self.function(token)
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token[0].isdigit() or token[0] == ".":
            return float(token)
        if token.isalpha():
            return _POINTS[(ord(token) + self.point) % len(_POINTS)] + ord(token) / 64
        raise _UnreadableError

    def argument(self) -> complex:
        return self.group() if self.peek() == "{" else self.atom()

    def function(self, token: str) -> complex:
        if token == "\\sqrt" and self.peek() == "[":
            root = self.group()
            return self.argument() ** (1 / root)
        return _FUNCTIONS[token](self.argument())


def _tokens(text: str) -> list[str] | None:
    tokens, position = list[str](), 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match.group(match.lastgroup or 0).strip())
        position = match.end()
    return tokens


def _values(text: str) -> list[complex] | None:
    tokens = _tokens(text) if 0 < len(text) <= _MAX_CHARS else None
    if not tokens:
        return None
    try:
        values = [_Formula(tokens, point).value() for point in range(len(_POINTS))]
    except (_UnreadableError, ArithmeticError, ValueError):
        return None
    usable = all(cmath.isfinite(value) and abs(value) < _LARGEST for value in values)
    return values if usable else None


def _without_left_side(text: str, reference: str) -> str:
    """`x=…` without its `x=`, where the reference has no equals sign: naming the unknown is no claim of its own."""
    name, equals, value = text.partition("=")
    return value.strip() if equals and "=" not in reference and re.fullmatch(r"[A-Za-z]\s*", name) else text


def math_equal(answer: str, reference: str) -> bool:
    """`same_answer`, and for references that are formulas also equality as formulas.

    A reference that is a plain number takes a plain number only: `\\sqrt{1764}` is not yet 42.
    """
    if same_answer(answer, reference):
        return True
    wanted = normalise(reference)
    got = _without_left_side(normalise(answer), wanted)
    number = parse_quantity(wanted, lowest_terms=False)
    if number is not None and is_plain_number(number):
        quantity = parse_quantity(got)
        return quantity is not None and same_quantity(quantity, number)
    if split_sequence(wanted) is not None:
        return same_sequence(got, wanted, math_equal)
    if got.count("=") == wanted.count("=") == 1:
        return all(math_equal(a, b) for a, b in zip(got.split("="), wanted.split("="), strict=True))
    # A reference is the simplified form; something much longer is the question handed back.
    if len(got) > 3 * len(wanted) + 30:
        return False
    left, right = _values(got), _values(wanted)
    if left is None or right is None:
        return False
    return all(abs(a - b) <= _TOLERANCE * max(1.0, abs(a), abs(b)) for a, b in zip(left, right, strict=True))
