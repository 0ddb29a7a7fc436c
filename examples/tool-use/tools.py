"""The calculator of the example."""

from __future__ import annotations


def calc(expression: str) -> int:
    """Multiply (*) or add (+)."""
    for sign, work in {"*": int.__mul__, "+": int.__add__}.items():
        a, found, b = expression.partition(sign)
        if found:
            return work(int(a), int(b))
    raise ValueError(f"got {expression!r}, expected two numbers with * or + between them, such as 34*12")
