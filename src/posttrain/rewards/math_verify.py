"""math-verify behind size guards, for use inside reward workers only."""

from __future__ import annotations

import re
import string
import threading
from math import prod
from typing import Any

from posttrain.errors import MissingExtraError
from posttrain.grading.equality import math_equal
from posttrain.grading.numbers import is_plain_number, normalise, parse_quantity

_MAX_CHARS, _MAX_NESTING = 300, 12
_MAX_EXPONENT, _MAX_EXPONENTS = 50, 2500
_MAX_DEGREE = 12  # expanding `(a+b+c)^{50}` takes longer than anybody waits
_TIMEOUT_S = 2
"""Of each parse and comparison. The guards decide; this is for what they do not foresee."""
_HUGE = re.compile(r"[0-9]{40,}|!|=|\*\*|\\sqrt\s*\[(?!\s*[2-9]\s*\])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_KNOWN_COMMANDS = frozenset(
    "\\" + name
    for name in re.findall(
        r"\S+",
        "frac sqrt sin cos tan cot sec csc arcsin arccos arctan ln log exp pi theta alpha beta gamma phi cdot times div pm "
        "infty cup cap in le ge ne begin end mathbb emptyset",
    )
)


def _exponents(text: str) -> list[str]:
    """What stands behind each `^`: a group with all that is in it, or the one number, letter or command."""
    found: list[str] = []
    for match in re.finditer(r"\^\s*(?P<brace>\{)?(?P<single>[-+]?[0-9.]+|\\?[A-Za-z]+|.)?", text):
        if not match["brace"]:
            found.append(match["single"] or "")
            continue
        depth, end = 0, match.start("brace")
        for end in range(match.start("brace"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                break
        found.append(text[match.start("brace") : end + 1])
    return found


def _powers_are_small(text: str) -> bool:
    """No power inside an exponent, and all exponents multiplied are small: `((2^{50})^{50})^{50}` is a tower too."""
    exponents = _exponents(text)
    if any(mark in exponent for exponent in exponents for mark in ("^", "\\exp", "(")) or text.count("\\exp") > 1:
        return False
    sizes = [max(1, int(digits)) for exponent in exponents for digits in re.findall(r"[0-9]+", exponent)]
    largest = _MAX_DEGREE if _letters(text) else _MAX_EXPONENT
    return all(size <= largest for size in sizes) and prod(sizes) <= min(_MAX_EXPONENTS, largest**2)


def _is_small(text: str) -> bool:
    """Whether a computer algebra system may see it: short, shallow, of known commands, no towers of powers, no factorials."""
    if len(text) > _MAX_CHARS or _HUGE.search(text) or not set(_COMMAND.findall(text)) <= _KNOWN_COMMANDS:
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "{(") - (character in "})")
        deepest = max(deepest, depth)
    return deepest <= _MAX_NESTING and _powers_are_small(text)


def _letters(text: str) -> set[str]:
    """The variables and constants of a formula; math-verify itself takes X for x."""
    return set(_COMMAND.sub("", text)) & set(string.ascii_letters)


def verified(answer: str, reference: str) -> bool:
    """Whether the two are equal by our own comparison or by math-verify. A reference that is a number takes a number, without it.

    Raises: MissingExtraError.
    """
    if math_equal(answer, reference):
        return True
    got, wanted = normalise(answer), normalise(reference)
    number = parse_quantity(wanted, lowest_terms=False)
    if (number is not None and is_plain_number(number)) or not (_is_small(got) and _is_small(wanted)):
        return False
    if not _letters(got) <= _letters(wanted):
        return False
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise MissingExtraError("backend: math_verify needs math-verify; pip install 'posttrain[math]'") from error
    # Its timers are signals, which only the main thread can have; elsewhere the deadline of the worker is the last resort.
    limit: Any = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    # The gold stands first: verify() is not symmetric.
    gold = parse(f"${wanted}$", parsing_timeout=limit)
    return bool(gold) and bool(verify(gold, parse(f"${got}$", parsing_timeout=limit), timeout_seconds=limit))
