r"""Numbers that stay exact as long as they are rational, else have 60 digits, and are refused before they get large.

So `9^{9^{9}}` costs nothing, `2^{31}` is not `2^{31}-1`, and only zero equals zero.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from math import factorial, isqrt
from typing import Any, TypeAlias

Value: TypeAlias = Any
"""A Fraction where the value is rational, else a number of mpmath (which has no types)."""

_MAX_BITS, _MAX_TOTAL_BITS, _MAX_FACTORIAL = 32_000, 400_000, 3000
_DIGITS, _TOLERANCE = 60, 1e-30


class UnreadableError(Exception):
    """The text is no formula that this module knows, or its value is too large."""


@cache
def mp() -> Any:
    import mpmath  # pyright: ignore[reportMissingTypeStubs]  # it has none; slow, and not needed to compare numbers

    context = mpmath.MPContext()
    context.dps = _DIGITS
    return context


@cache
def _function(name: str) -> Callable[[Value], Value]:
    c = mp()
    rows = {"\\arcsin": c.asin, "\\arccos": c.acos, "\\arctan": c.atan, "\\ln": c.log, "\\log": partial(c.log, b=10)}
    return rows.get(name) or getattr(c, name[1:])


class Arithmetic:
    """Operations that stay exact as long as both sides are, and refuse before they get large."""

    def __init__(self) -> None:
        self.bits = 0

    def checked(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            self.bits += bits
            if bits > _MAX_BITS or self.bits > _MAX_TOTAL_BITS:
                raise UnreadableError
        elif not mp().isfinite(value) or (value and abs(mp().mag(value)) > _MAX_BITS):
            raise UnreadableError
        return value

    def inexact(self, value: Value) -> Value:
        return mp().mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value

    def apply(self, operation: Callable[[Value, Value], Value], left: Value, right: Value) -> Value:
        if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
            left, right = self.inexact(left), self.inexact(right)
        return self.checked(operation(left, right))

    def power(self, base: Value, exponent: Value) -> Value:
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                bits = base.numerator.bit_length() + base.denominator.bit_length()
                if abs(exponent.numerator) * bits > _MAX_BITS + bits:
                    raise UnreadableError
                return self.checked(base**exponent.numerator)
            if exponent == Fraction(1, 2) and base >= 0:
                roots = Fraction(isqrt(base.numerator), isqrt(base.denominator))
                if roots * roots == base:
                    return self.checked(roots)
        base, exponent = self.inexact(base), self.inexact(exponent)
        if not base or (exponent and mp().mag(exponent) > 20):
            raise UnreadableError
        if abs(exponent) * max(1, abs(mp().log(abs(base), 2))) > _MAX_BITS:
            raise UnreadableError
        return self.checked(mp().power(base, exponent))

    def function(self, name: str, value: Value) -> Value:
        value = self.inexact(value)
        if value and mp().mag(value) > (14 if name == "\\exp" else 200):
            raise UnreadableError
        return self.checked(_function(name)(value))

    def factorial(self, value: Value) -> Value:
        if isinstance(value, Fraction) and value.denominator == 1:
            if not 0 <= value <= _MAX_FACTORIAL:
                raise UnreadableError
            return self.checked(Fraction(factorial(value.numerator)))
        if abs(value) > 100:
            raise UnreadableError
        return self.checked(mp().gamma(self.inexact(value) + 1))

    def binomial(self, top: Value, bottom: Value) -> Value:
        if not all(isinstance(v, Fraction) and abs(v) <= 300 for v in (top, bottom)):
            raise UnreadableError
        if top.denominator == bottom.denominator == 1 and 0 <= bottom <= top:
            parts = [self.factorial(part) for part in (top, bottom, top - bottom)]
            return self.checked(parts[0] / (parts[1] * parts[2]))
        return self.checked(mp().binomial(self.inexact(top), self.inexact(bottom)))


def close(left: Value, right: Value) -> bool:
    """Rational numbers exactly, others relatively; so only zero equals zero."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = (Arithmetic().inexact(value) for value in (left, right))
    return bool(abs(left - right) <= _TOLERANCE * max(abs(left), abs(right)))
