"""A verdict as plain text."""

from __future__ import annotations

import math

from posttrain.evidence import GateVerdict, TestResult

_HEADER = ("", "suite", "test", "items", "base", "cand", "gain", "95 % interval", "bound", "line", "verdict")
_RIGHT = frozenset({3, 4, 5, 6, 7, 8, 9})


def verdict_table(verdict: GateVerdict) -> str:
    """A table with one row per test, then the verdict and its reason."""
    rows = [_HEADER, *(_row(test) for test in verdict.tests)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(_cell(text, widths[i], i in _RIGHT) for i, text in enumerate(row)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    notes = [f"  {test.role} {test.suite}: {test.reason}" for test in verdict.tests]
    return "\n".join([*lines, *notes, f"{verdict.verdict.value}: {verdict.reason} (alpha {verdict.alpha:.3g})"])


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


def _cell(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)
