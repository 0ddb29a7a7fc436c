"""Limits: what the candidate's answers must not exceed, whatever they score. Each is a row of one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from posttrain.evidence import EvalReport, TestResult, Verdict
from posttrain.gate.spec import GateSpec

_NAN = math.nan


def truncated_share(report: EvalReport) -> float:
    """Share of answers cut off at the length limit; NaN where no answer was generated."""
    finishes = [finish for item in report.items for finish in item.finishes]
    return sum(finish == "length" for finish in finishes) / len(finishes) if finishes else _NAN


def mean_length(report: EvalReport) -> float:
    """Mean tokens of an answer; NaN where no answer was generated."""
    lengths = [length for item in report.items for length in item.num_tokens]
    return sum(lengths) / len(lengths) if lengths else _NAN


def error_share(report: EvalReport) -> float:
    """Share of items that ended in an error or have no score."""
    return sum(_is_error(item.error, item.scores) for item in report.items) / len(report.items) if report.items else 0.0


def _is_error(error: str | None, scores: tuple[float, ...]) -> bool:
    return error is not None or not scores or not all(map(math.isfinite, scores))


@dataclass(frozen=True, slots=True)
class Limit:
    """A row of the table: what is measured, and whether the line is a multiple of the baseline's value."""

    name: str
    measured: Callable[[EvalReport], float]
    relative: bool
    words: str


LIMITS = {
    "truncated": Limit("truncated", truncated_share, False, "{value:.1%} of the answers were cut off, at most {line:.1%} may be"),
    "length_ratio": Limit("length", mean_length, True, "answers have {value:.1f} tokens on average, at most {line:.1f} may be"),
    "errors": Limit("errors", error_share, False, "{value:.1%} of the items ended in an error, at most {line:.1%} may"),
}  # fmt: skip
"""Key of `gate.limits` → what it measures."""


def check_limits(
    spec: GateSpec, candidate: Mapping[str, EvalReport], baseline: Mapping[str, EvalReport]
) -> Iterator[TestResult]:
    """One result per limit that is set and suite that it applies to; a suite without reports is not its business."""
    for key, limit in LIMITS.items():
        line = getattr(spec.limits, key)
        for suite in spec.suites:
            if line is not None and suite in candidate and suite in baseline:
                ours, theirs = limit.measured(candidate[suite]), limit.measured(baseline[suite])
                yield from _judged(limit, suite, line, ours, theirs, len(candidate[suite].items))


def _judged(limit: Limit, suite: str, line: float, ours: float, theirs: float, num_items: int) -> Iterator[TestResult]:
    line = line * theirs if limit.relative else line
    if math.isnan(ours) or math.isnan(line):
        return
    verdict = Verdict.PASS if ours <= line + 1e-12 else Verdict.FAIL
    yield TestResult(
        role="limit", suite=suite, method=limit.name, num_items=num_items, num_clusters=num_items,
        baseline_mean=round(theirs, 10), candidate_mean=round(ours, 10), estimate=_NAN, low=_NAN, high=_NAN,
        bound=_NAN, line=round(line, 10), p_value=_NAN, verdict=verdict,
        reason=limit.words.format(value=ours, line=line),
    )  # fmt: skip


def errors_as_wrong(report: EvalReport, limit: float | None) -> EvalReport:
    """The candidate's report with its errors counted as wrong, where a limit says how many there may be.

    Without a limit the report is left as it is: an error then makes the comparison invalid.
    """
    if limit is None or error_share(report) == 0.0:
        return report
    samples = max((len(item.scores) for item in report.items), default=1)
    items = (
        replace(item, error=None, scores=(0.0,) * samples) if _is_error(item.error, item.scores) else item
        for item in report.items
    )
    return replace(report, items=tuple(items))
