"""Numbers and verdicts in words that a reader outside the field can follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from posttrain.evidence import EvalReport
from posttrain.report.intervals import Interval

STATUS = {
    "running": "The run has not finished; this is what it has so far.",
    "error": "The run stopped with an error; this is what it had until then.",
    "pending": "The verdict waits for people to decide on it: posttrain gate decide.",
    "stopped": "The run was stopped before its end; started again, it continues.",
}
VERDICT = {
    "PASS": "passed its gate",
    "FAIL": "did not pass its gate and was not promoted",
    "INCONCLUSIVE": "was neither accepted nor rejected: the evidence is too thin, which is not a pass",
    "ACCEPTED": "was not shown to be better or worse by its gate, and a person accepted it",
    "REJECTED": "was rejected by a person, whatever its gate said of it",
    "INVALID": "could not be judged: the comparison itself is broken",
}


def is_share(*reports: EvalReport) -> bool:
    """Whether the scores are shares (0 to 1), to be shown in per cent."""
    return all(0.0 <= score <= 1.0 for report in reports for item in report.items for score in item.scores)


def score(value: float | None, share: bool = True) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.1f} %" if share else f"{value:.3f}"


def with_interval(interval: Interval, share: bool = True) -> str:
    """`61.0 % (58.0–63.9)`"""
    if math.isnan(interval.low):
        return score(interval.mean, share)
    scale, digits = (100, 1) if share else (1, 3)
    return f"{score(interval.mean, share)} ({interval.low * scale:.{digits}f}–{interval.high * scale:.{digits}f})"


def points(value: float | None, share: bool = True) -> str:
    """A difference with its sign: `+41.2` points, or raw units. The minus is a real one."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{100 * value:+.1f}" if share else f"{value:+.3f}"
    return text.replace("-", "−")


def change(interval: Interval | None, share: bool = True) -> str:
    """`+41.2 (+38.0 to +44.4)`"""
    if interval is None:
        return "–"
    if math.isnan(interval.low):
        return points(interval.mean, share)
    return f"{points(interval.mean, share)} ({points(interval.low, share)} to {points(interval.high, share)})"


def gain_sentence(
    suite: str,
    before: float,
    after: float,
    low: float | None,
    high: float | None,
    share: bool = True,
    *,
    num_items: int,
) -> str:
    """What happened on one suite, with the interval in words."""
    unit = " points" if share else ""
    moved = after - before
    old, new = score(before, share), score(after, share)
    verb = f"stayed at {new}" if old == new else f"{'rose' if moved > 0 else 'fell'} from {old} to {new}"
    start = f"On “{suite}” the score {verb}"
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return f"{start} (no interval: {_why_no_interval(moved, num_items)})."
    span = f"with 95 % confidence the true change lies between {points(low, share)} and {points(high, share)}{unit}"
    doubt = "; an interval that contains zero does not show a change" if low <= 0 <= high else ""
    change = "" if old == new else f", a change of {points(moved, share)}{unit}"
    return f"{start}{change}; {span}{doubt}."


def _why_no_interval(moved: float, num_items: int) -> str:
    if math.isnan(moved):
        return "an item has no score"
    return "too few items" if num_items < 2 else "all differences are equal, so nothing says how much they vary"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(value: float | None) -> str:
    return "–" if value is None else f"{int(value):,}".replace(",", "\u202f")


def short_digest(digest: Any) -> str:
    text = str(digest or "–")
    return text[:19] + "…" if text.startswith("sha256:") and len(text) > 20 else text


def verdict_of(verdict: Mapping[str, Any]) -> str:
    return str(verdict.get("verdict") or "")


def alias_of(registered: Mapping[str, Any], arrow: str = ", alias “{}”") -> str:
    """What a registered version was promoted to, or why it was not."""
    alias = registered.get("alias")
    return arrow.format(alias) if alias else f", not promoted: {registered.get('refused') or 'no reason recorded'}"
