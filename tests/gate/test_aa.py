from dataclasses import replace

import numpy as np
import pytest

from posttrain.errors import GateError
from posttrain.gate import mcnemar
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


def test_a_sound_sampled_suite_is_blocked_as_rarely_as_said(report):
    """2,000 A/A checks on 100 items: a false alarm in at most 1 %, plus three standard errors."""
    rng = np.random.default_rng(0)
    draws = rng.random((2000, 2, 100)) < 0.5
    differs = []
    for left, right in draws:
        good, bad = int((left & ~right).sum()), int((right & ~left).sum())
        differs.append(mcnemar.p_value(max(good, bad), min(good, bad)) < 0.005)
    assert np.mean(differs) <= 0.01 + 3 * (0.01 * 0.99 / 2000) ** 0.5
    left, right = (sampled(report, side.astype(int).tolist()) for side in draws[0])
    assert aa_check(left, right).differs is differs[0]
