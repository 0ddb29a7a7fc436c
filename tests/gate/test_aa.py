from dataclasses import replace

import pytest

from posttrain.errors import GateError
from posttrain.gate import exact
from posttrain.gate.aa import aa_check


def test_flips_are_counted_with_their_exact_bound(report):
    first = report([1] * 100, "m")
    second = report([1] * 99 + [0], "m")
    result = aa_check(first, second)
    assert (result.num_items, result.flips, result.rate, result.passed) == (100, 1, 0.01, True)
    assert result.upper == pytest.approx(0.0466, abs=1e-4)
    assert not aa_check(first, report([1] * 97 + [0] * 3, "m")).passed


@pytest.mark.parametrize("change", [{"model_digest": "other"}, {"split": "dev"}, {"items": ()}])
def test_only_the_same_model_on_the_same_items_compares(report, change):
    first = report([1] * 40, "m")
    with pytest.raises(GateError, match="A/A check"):
        aa_check(first, replace(first, **change))


def test_greedy_answers_that_depend_on_the_batch_block(report):
    first = report([1] * 100, "m")
    result = aa_check(first, report([1] * 97 + [0] * 3, "m"))
    assert "greedy answers depend on what they are batched with" in result.words
    assert "no difference" in aa_check(first, report([1] * 98 + [0] * 2, "m")).words


def sampled(report, scores):
    return replace(report(scores, "m"), decoding={"temperature": 1.0})


def test_sampled_answers_may_change_as_long_as_their_mean_does_not(report):
    first, second = sampled(report, [0, 1] * 100), sampled(report, [1, 0] * 100)
    result = aa_check(first, second)
    assert (result.rate, result.differs, result.passed) == (1.0, False, True)
    better = aa_check(first, sampled(report, [1] * 200))
    assert (better.difference, better.passed) == (0.5, False)
    assert "the model differs from itself" in better.words
    worse = aa_check(sampled(report, [1] * 200), first)
    assert not worse.passed


def test_a_sound_sampled_suite_is_blocked_as_rarely_as_said(report, bench):
    """All outcomes of 60 items: both directions at half of the 1 %, at every share of items that change."""
    first, shares = bench("enumeration").first_passing(60, 0.0, 0.005), bench("enumeration").all_shares(0.0)
    assert 0.005 < 2 * exact.probability(first, 60, 0.0, shares).max() <= 0.01
    for good in (first[20], first[20] - 1):
        scores = [1] * good + [0] * (20 - good) + [1] * 40, [0] * good + [1] * (20 - good) + [1] * 40
        assert aa_check(*(sampled(report, side) for side in scores)).differs is bool(good == first[20])
