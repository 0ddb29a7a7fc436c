"""Intervals against scipy and statsmodels, and by hand."""

import math
import random

import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from posttrain.evidence import EvalReport, ItemRecord
from posttrain.report.intervals import difference_interval, score_interval, t_interval, wilson


def _report(scores, clusters=None, suite="s"):
    clusters = clusters or [None] * len(scores)
    items = tuple(
        ItemRecord(str(n), f"p{n}", tuple(score) if isinstance(score, tuple) else (score,), cluster)
        for n, (score, cluster) in enumerate(zip(scores, clusters, strict=True))
    )
    return EvalReport(suite, "gate", f"digest-{suite}", "m", "exact", items)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (1, 400), (7, 20), (620, 1000)])
def test_wilson_equals_statsmodels(right, total):
    low, high = proportion_confint(right, total, method="wilson")
    interval = wilson(right, total)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_t_interval_equals_scipy():
    draw = random.Random(1)
    values = [draw.gauss(0.3, 1) for _ in range(37)]
    low, high = stats.t.interval(0.95, 36, loc=sum(values) / 37, scale=stats.sem(values))
    interval = t_interval(values)
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))


def test_binary_scores_get_wilson_and_others_t():
    assert score_interval(_report([1.0, 0.0, 1.0, 1.0])) == wilson(3, 4)
    graded = score_interval(_report([0.5, 0.25, 1.0]))
    assert graded == t_interval([0.5, 0.25, 1.0])
    assert score_interval(_report([(1.0, 0.0), (1.0, 1.0)])) == t_interval([0.5, 1.0])


def test_clusters_widen_the_interval():
    """Five items copied four times each hold the evidence of five, not of twenty."""
    scores = [1.0, 0.0, 1.0, 1.0, 0.0]
    clustered = score_interval(_report(scores * 4, list("abcde") * 4))
    assert (clustered.low, clustered.high) == (
        pytest.approx(t_interval(scores).low),
        pytest.approx(t_interval(scores).high),
    )
    assert clustered.low < t_interval(scores * 4).low


def test_a_difference_is_paired_by_item():
    before, after = _report([0.0, 1.0, 0.0, 1.0]), _report([1.0, 1.0, 0.0, 1.0])
    assert difference_interval(before, after) == t_interval([1.0, 0.0, 0.0, 0.0])
    assert difference_interval(before, _report([1.0, 1.0])) is None
    assert difference_interval(before, _report([1.0, 1.0, 0.0, 1.0], suite="other")) is None


def test_one_item_has_no_interval():
    assert math.isnan(t_interval([0.5]).low) and math.isnan(t_interval([]).mean)
