"""A verdict as plain text."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from posttrain.evidence import GateVerdict, TestResult

_HEADER = ("", "suite", "test", "items", "base", "cand", "gain", "95 % interval", "bound", "line", "verdict")
_RIGHT = frozenset({3, 4, 5, 6, 7, 8, 9})


def verdict_table(verdict: GateVerdict) -> str:
    """A table with one row per test, then the verdict and its reason."""
    rows = [_HEADER, *(_row(test) for test in verdict.tests)]
    lines = aligned(rows, _RIGHT)
    lines.insert(1, "  ".join("-" * max(map(len, column)) for column in zip(*rows, strict=True)))
    notes = [f"  {test.role} {test.suite}: {test.reason}" for test in verdict.tests]
    return "\n".join([*lines, *notes, f"{verdict.verdict.value}: {verdict.reason} (alpha {verdict.alpha:.3g})"])


def aligned(rows: Sequence[Sequence[str]], right: Container[int]) -> list[str]:
    """Lines of a table of text; the columns in `right` end where their longest cell does."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [text.rjust(w) if i in right else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]


def _row(test: TestResult) -> tuple[str, ...]:
    return (
        test.role,
        test.suite,
        test.method,
        str(test.num_items) if test.num_clusters == test.num_items else f"{test.num_items} in {test.num_clusters}",
        _number(test.baseline_mean, "{:.4f}"),
        _number(test.candidate_mean, "{:.4f}"),
        _number(test.estimate),
        f"[{_number(test.low)}, {_number(test.high)}]",
        _number(test.bound),
        _number(test.line),
        test.verdict.value,
    )


def _number(value: float, form: str = "{:+.4f}") -> str:
    return form.format(value) if math.isfinite(value) else "–"
