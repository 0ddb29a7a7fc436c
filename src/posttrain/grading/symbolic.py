r"""The value of a small formula at fixed points, and whether two formulas have the same. No algebra system."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from posttrain.grading.arithmetic import Arithmetic, UnreadableError, Value, close, mp

_MAX_CHARS, _MAX_DEPTH = 400, 40
_NUM_POINTS, _NUM_NEGATIVE = 5, 3
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)|(?P<command>\\[A-Za-z]+)"
    r"|(?P<word>(?:sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp|pi|binom)(?![A-Za-z]))"
    r"|(?P<letter>[A-Za-zπ])|(?P<sign>[-+*/^(){}\[\]|!_·×÷√°]))"
)
_ALIASES = {"π": "\\pi", "√": "\\sqrt", "·": "*", "×": "*", "\\cdot": "*", "\\times": "*", "÷": "/", "\\div": "/", "\\lg": "\\log",
            "\\tbinom": "\\binom", "\\dbinom": "\\binom", "\\vert": "|", "\\lvert": "|", "\\rvert": "|", "\\mid": "|",
            "\\lbrack": "[", "\\rbrack": "]", "°": "\\circ"}  # fmt: skip
_GREEK = frozenset(
    f"\\{name}"
    for name in re.findall(
        r"\S+",
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi varphi chi psi "
        "omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega",
    )
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_ARCS = ("arcsin", "arccos", "arctan")
_FUNCTIONS = frozenset(f"\\{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc", *_ARCS, "ln", "log", "exp"))
_INVERSES = {"\\sin": "\\arcsin", "\\cos": "\\arccos", "\\tan": "\\arctan"}


class _Formula:
    """Recursive descent that computes as it reads, with the variables at one point."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens, self.point, self.index, self.depth, self.num_open_bars = list(tokens), point, 0, 0, 0
        self.arithmetic = Arithmetic()

    def value(self) -> Value:
        result = self.total()
        if self.index != len(self.tokens):
            raise UnreadableError
        return result

    def peek(self) -> str:
        return self.tokens[self.index] if self.index < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise UnreadableError
        self.index += 1
        return token

    def total(self) -> Value:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise UnreadableError
        result = self.product()
        while self.peek() in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            result = self.arithmetic.apply(lambda a, b, sign=sign: a + sign * b, result, self.product())
        self.depth -= 1
        return result

    def product(self) -> Value:
        result = self.signed()
        while token := self.peek():
            if token == "*":
                self.take()
                result = self.arithmetic.apply(lambda a, b: a * b, result, self.signed())
            elif token == "/":
                self.take()
                result = self.arithmetic.apply(lambda a, b: a / b, result, self.signed())
            elif token in "+-)]}^_" or (token == "|" and self.num_open_bars):
                break
            elif _is_number(token):
                raise UnreadableError  # "2 3" is no product
            else:
                result = self.arithmetic.apply(lambda a, b: a * b, result, self.power())
        return result

    def signed(self) -> Value:
        if self.peek() not in ("+", "-"):
            return self.power()
        sign = -1 if self.take() == "-" else 1
        return sign * self.power()

    def power(self) -> Value:
        base = self.atom()
        while self.peek() == "!":
            self.take()
            base = self.arithmetic.factorial(base)
        if self.peek() != "^":
            return self.degrees(base) if self.peek() == "\\circ" else base
        self.take()
        if self.tokens[self.index : self.index + 3] == ["{", "\\circ", "}"]:
            self.index += 1
            base = self.degrees(base)
            self.index += 1
            return base
        return self.degrees(base) if self.peek() == "\\circ" else self.arithmetic.power(base, self.exponent())

    def degrees(self, value: Value) -> Value:
        self.take()
        return self.arithmetic.checked(self.arithmetic.inexact(value) * mp().pi / 180)

    def exponent(self) -> Value:
        if self.peek() in ("+", "-"):
            return (-1 if self.take() == "-" else 1) * self.atom()
        return self.atom()

    def group(self) -> Value:
        closing = _CLOSING.get(self.take())
        if closing is None:
            raise UnreadableError
        bars, self.num_open_bars = self.num_open_bars, 0
        result = self.total()
        self.num_open_bars = bars
        if self.take() != closing:
            raise UnreadableError
        return result

    def atom(self) -> Value:
        token = self.peek()
        if token in _CLOSING:
            return self.group()
        self.take()
        if token == "|":
            return self.absolute()
        if token == "\\frac":
            return self.fraction()
        if token == "\\binom":
            return self.arithmetic.binomial(self.argument(), self.argument())
        if token == "\\sqrt":
            return self.root()
        if token in _FUNCTIONS:
            return self.function(token)
        if token in ("\\pi", "e", "i"):
            return {"\\pi": +mp().pi, "e": +mp().e, "i": mp().mpc(0, 1)}[token]
        if _is_number(token):
            return self.number(token)
        if token.isalpha() or token in _GREEK:
            return self.variable(token)
        raise UnreadableError

    def absolute(self) -> Value:
        self.num_open_bars += 1
        inside = self.total()
        self.num_open_bars -= 1
        if self.take() != "|":
            raise UnreadableError
        return abs(inside)

    def fraction(self) -> Value:
        return self.arithmetic.apply(lambda a, b: a / b, self.argument(), self.argument())

    def number(self, token: str) -> Value:
        value = self.arithmetic.checked(Fraction(token.replace(",", "").rstrip(".")))
        if self.peek() != "\\frac" or value.denominator != 1:
            return value
        self.take()
        start = self.index
        part = self.fraction()
        in_digits = all(_is_number(token) or token in "{}" for token in self.tokens[start : self.index])
        is_mixed = in_digits and isinstance(part, Fraction) and 0 < part < 1  # 2\\frac{1}{2}, but not 2\\frac{x}{3}
        return self.arithmetic.apply(lambda a, b: a + b if is_mixed else a * b, value, part)

    def argument(self) -> Value:
        """A group, or one character, as TeX takes it: `\\frac12`, `\\sqrt2`."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.index : self.index + 1] = [token[0], token[1:]]
        return self.group() if token in _CLOSING else self.atom()

    def root(self) -> Value:
        degree = self.group() if self.peek() == "[" else Fraction(2)
        return self.arithmetic.power(self.argument(), self.arithmetic.apply(lambda a, b: a / b, Fraction(1), degree))

    def function(self, name: str) -> Value:
        """`\\log_2 3`, `\\sin^2 x`, `\\sin^{-1} x`, and an argument without brackets: `\\sin 2x`."""
        base = power = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument()
            else:
                power = self.exponent()
        if power == -1 and name in _INVERSES:
            name, power = _INVERSES[name], None
        result = self.arithmetic.function(name, self.bare_argument())
        if base is not None:
            if name != "\\log":
                raise UnreadableError
            result = self.arithmetic.apply(lambda a, b: a / b, result, self.arithmetic.function(name, base))
        return result if power is None else self.arithmetic.power(result, power)

    def bare_argument(self) -> Value:
        if self.peek() in _CLOSING:
            return self.group()
        result = self.signed()
        while (token := self.peek()) and (token.isalpha() or token in _GREEK or token in ("\\pi", "\\sqrt", "\\frac")):
            result = self.arithmetic.apply(lambda a, b: a * b, result, self.power())
        return result

    def variable(self, name: str) -> Value:
        if self.peek() == "_":
            self.take()
            start, depth = self.index, 0
            while True:
                depth += {"{": 1, "}": -1}.get(self.take(), 0)
                if depth <= 0:
                    break
            name += "".join(token for token in self.tokens[start : self.index] if token not in "{}")
        return _at_point(name, self.point)


def _is_number(token: str) -> bool:
    return token[0].isdigit() or (token[0] == "." and len(token) > 1)


def _at_point(name: str, point: int) -> Fraction:
    """Between 0.1 and 3; at the last points some variables are negative."""
    mixed = sum(ord(c) * 7919 ** (place + 1) for place, c in enumerate(name)) + 104_729 * (point + 1) * (
        ord(name[-1]) + point
    )
    value = Fraction(mixed % 3001 + 101, 1009)
    return -value if point >= _NUM_POINTS and (mixed + point) % 2 else value


def _tokens(text: str) -> list[str] | None:
    tokens, position = list[str](), 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None if text[position:].strip() else tokens
        token = match.group(match.lastgroup or 0)
        token = "\\" + token if match.lastgroup == "word" else token
        tokens.append(_ALIASES.get(token, token))
        position = match.end()
    return tokens


def _values(tokens: list[str], num_points: int) -> Iterator[Value]:
    for point in range(num_points):
        try:
            yield _Formula(tokens, point).value()
        except (UnreadableError, ArithmeticError, ValueError, TypeError):
            return


def _point_by_point(left: str, right: str) -> Iterator[tuple[Value, Value]] | None:
    """Both formulas at each point; None where one of them cannot be read."""
    tokens = [_tokens(text) if 0 < len(text) <= _MAX_CHARS else None for text in (left, right)]
    if not tokens[0] or not tokens[1]:
        return None
    num = _NUM_POINTS + (_NUM_NEGATIVE if "|" in tokens[0] + tokens[1] else 0)
    values = [list(_values(side, num)) for side in tokens if side]
    return zip(*values, strict=True) if all(len(side) == num for side in values) else None


def same_value(left: str, right: str) -> bool:
    """Whether two formulas have the same value wherever they are looked at."""
    pairs = _point_by_point(left, right)
    return pairs is not None and all(close(a, b) for a, b in pairs)


def same_zeros(left: str, right: str) -> bool:
    """Whether one formula is a constant times the other, and neither is zero: `2x-4` and `x-2`."""
    pairs = _point_by_point(left, right)
    if pairs is None:
        return False
    ratios: list[Value] = []
    for a, b in pairs:
        if not a or not b:
            return False
        ratios.append(Arithmetic().apply(lambda x, y: x / y, a, b))
    return all(close(ratio, ratios[0]) for ratio in ratios[1:])
