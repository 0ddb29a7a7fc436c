"""Intervals for what is shown: Wilson for a share of right answers, Student's t for any other mean, the gate's for a change."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.evidence import EvalReport, ItemRecord
from posttrain.gate.measure import choose, measure
from posttrain.gate.paired import fit_t
from posttrain.gate.pairing import pair_items

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its two-sided 95 % interval; NaN bounds mean there is too little to say."""

    mean: float
    low: float
    high: float
    num_items: int


def wilson(successes: float, total: int) -> Interval:
    """95 % interval of a share. Source: Wilson 1927, without continuity correction."""
    if total == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    share, z2 = successes / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), total)


def t_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Interval:
    """95 % interval of a mean from its own spread; with clusters, their sums are the independent units."""
    total = len(values)
    units = total if clusters is None else len(set(clusters))
    if units < 2:
        return Interval(sum(values) / total if total else math.nan, math.nan, math.nan, total)
    places = {name: place for place, name in enumerate(dict.fromkeys(clusters or ()))}
    codes = None if clusters is None else np.array([places[name] for name in clusters])
    fit = fit_t(np.asarray(values, dtype=np.float64), codes)
    return Interval(fit.mean, *fit.interval(), total)


def score_interval(report: EvalReport) -> Interval:
    """A model's score on a suite: Wilson when every item is one right-or-wrong answer, t over items or clusters else."""
    binary = all(len(item.scores) == 1 and item.scores[0] in (0.0, 1.0) for item in report.items)
    clustered = any(item.cluster is not None for item in report.items)
    if binary and not clustered:
        return wilson(sum(item.score for item in report.items), len(report.items))
    return _over_clusters(report.items, lambda item: item.score)


def difference_interval(baseline: EvalReport, candidate: EvalReport) -> Interval | None:
    """Candidate - baseline, paired by item, with the interval that the gate's test has for them.

    None unless both scored the same items of the same suite.
    """
    before, after = ({item.id: item for item in report.items} for report in (baseline, candidate))
    if baseline.suite_digest != candidate.suite_digest or before.keys() != after.keys():
        return None
    pairs = pair_items(after, before)
    mean = float(pairs.differences.mean())
    if math.isnan(mean):  # an item that ended in an error has no score
        return Interval(mean, math.nan, math.nan, len(before))
    found = measure(choose(pairs), pairs, 0.0, 0.05)
    return Interval(mean, found.low, found.high, len(before))


def _over_clusters(items: Sequence[ItemRecord], value: Callable[[ItemRecord], float]) -> Interval:
    """t over items; an item without a cluster is its own."""
    clustered = any(item.cluster is not None for item in items)
    clusters = [("", item.id) if item.cluster is None else (item.cluster,) for item in items] if clustered else None
    return t_interval([value(item) for item in items], clusters)
