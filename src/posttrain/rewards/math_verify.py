"""math-verify behind size guards, for use inside reward workers only: its own timeouts do not bound it, the worker's do."""

from __future__ import annotations

import re
import string
from typing import Any

from posttrain.errors import MissingExtraError
from posttrain.grading.numbers import normalise, parse_quantity, same_answer

_MAX_CHARS, _MAX_NESTING = 300, 12
_POWER = re.compile(r"\^\s*\{?\s*[-+]?\s*([0-9]*)")
_MAX_EXPONENT = 50
_HUGE = re.compile(r"[0-9]{40,}|!")


def _is_small(text: str) -> bool:
    """Whether a computer algebra system may see it: short, shallow, no towers of powers, no factorials."""
    if len(text) > _MAX_CHARS or _HUGE.search(text) or "=" in text:
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "{(") - (character in "})")
        deepest = max(deepest, depth)
    powers = _POWER.findall(text)
    return (
        deepest <= _MAX_NESTING
        and len(powers) <= 8
        and all(int(power or 0) <= _MAX_EXPONENT for power in powers)
        and not re.search(r"\^\s*\{?[^{}]*\^", text)
    )


def _letters(text: str) -> set[str]:
    """The variables and constants of a formula; math-verify itself takes X for x."""
    return set(re.sub(r"\\[A-Za-z]+", "", text)) & set(string.ascii_letters)


def verified(answer: str, reference: str) -> bool:
    """Whether math-verify calls the two equal. Plain numbers are compared strictly, without it.

    Raises: MissingExtraError.
    """
    if same_answer(answer, reference):
        return True
    got, wanted = normalise(answer), normalise(reference)
    if parse_quantity(wanted, lowest_terms=False) is not None or not (_is_small(got) and _is_small(wanted)):
        return False
    if not _letters(got) <= _letters(wanted):
        return False
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise MissingExtraError("backend: math_verify needs math-verify; pip install 'posttrain[math]'") from error
    # The gold stands first: verify() is not symmetric. No signal-based timeouts; the worker has a deadline.
    no_limit: Any = None
    gold = parse(f"${wanted}$", parsing_timeout=no_limit)
    return bool(gold) and bool(verify(gold, parse(f"${got}$", parsing_timeout=no_limit), timeout_seconds=None))
