"""Intervals against scipy and statsmodels, and by hand."""

import math
import random
from dataclasses import replace

import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from posttrain.evidence import EvalReport, ItemRecord
from posttrain.gate import exact
from posttrain.gate.measure import choose, measure
from posttrain.gate.pairing import pair
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
    difference = difference_interval(before, after)
    assert (difference.mean, difference.num_items) == (0.25, 4)
    assert (difference.low, difference.high) == pytest.approx(exact.interval(1, 0, 4), abs=1e-9)
    assert difference_interval(before, _report([1.0, 1.0])) is None
    assert difference_interval(before, _report([1.0, 1.0, 0.0, 1.0], suite="other")) is None


def test_no_difference_seen_has_an_interval_that_is_not_zero_wide():
    """400 equal items exclude a loss or a gain of a point, and not of nothing."""
    change = difference_interval(_report([1.0] * 400), _report([1.0] * 400))
    assert change.mean == 0.0
    assert -0.011 < change.low < -0.005 and 0.005 < change.high < 0.011


def test_the_change_of_graded_scores_has_the_interval_of_the_gate():
    draw = random.Random(3)
    before, after = ([draw.random() for _ in range(60)] for _ in range(2))
    change = difference_interval(_report(before), _report(after))
    pairs = pair(_report(after), replace(_report(before), model_digest="other"), "gate")
    found = measure(choose(pairs), pairs, -0.2, 0.05)
    assert (change.low, change.high) == (found.low, found.high)


def test_an_item_without_a_score_leaves_the_change_without_an_interval():
    change = difference_interval(_report([1.0, 0.0]), _report([(), 1.0]))
    assert math.isnan(change.mean) and math.isnan(change.low)


def test_one_item_has_no_interval():
    assert math.isnan(t_interval([0.5]).low) and math.isnan(t_interval([]).mean)
