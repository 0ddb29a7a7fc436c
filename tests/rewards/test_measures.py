import math

import pytest

from posttrain.rewards import measures


def test_auc_counts_pairs_by_hand():
    """Right 1, 0.5 against wrong 0.5, 0: wins 2 + 1, one tie of four pairs."""
    assert measures.auc([1, 0.5], [0.5, 0]) == (3 + 0.5) / 4
    assert measures.auc([1], [0]) == 1.0
    assert math.isnan(measures.auc([], [1]))


def test_separation():
    """Means 2 and 0, both of variance 2: gap over pooled std is 2 / sqrt(2)."""
    assert measures.separation([1, 3], [-1, 1]) == pytest.approx(math.sqrt(2))
    assert measures.separation([1, 1], [0, 0]) == math.inf
    assert measures.separation([1], [1]) == 0.0


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    a, b = [1.0, 2.0, 2.0, 5.0, 3.0], [0.0, 1.0, 0.5, 0.5, 2.0]
    assert measures.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert measures.spearman([1, 2], [1, 1]) == 0.0


def test_percentile_and_std():
    assert measures.percentile([3, 1, 2], 0.5) == 2
    assert measures.percentile(list(range(1, 101)), 0.99) == 99
    assert measures.std([1, 3]) == pytest.approx(math.sqrt(2))
    assert measures.std([1]) == 0.0


def test_forecast_of_groups():
    """One group of two without spread, one with std sqrt(0.5); a group of one says nothing."""
    forecast = measures.group_forecast({0: [1, 1], 1: [0, 1], 2: [1]})
    assert forecast["frac_reward_zero_std"] == 0.5
    assert forecast["mean_reward"] == 0.75
    assert forecast["mean_reward_std"] == pytest.approx(math.sqrt(0.5) / 2)
    assert measures.group_forecast({0: [1]}) == {}


def test_groups_without_spread_are_told_apart_and_the_advantages_have_a_spread():
    """Groups all right, all wrong, and mixed: two of three carry nothing; the mixed one has advantages ±1/sqrt(2)."""
    forecast = measures.group_forecast({0: [1.1, 1.1], 1: [0, 0], 2: [0, 1]}, right_from=0.5)
    assert forecast["frac_reward_all_right"] == forecast["frac_reward_all_wrong"] == pytest.approx(1 / 3)
    assert forecast["group_size"] == 2.0
    assert forecast["advantage_std"] == pytest.approx(math.sqrt(2 * 0.5 / 5), rel=1e-3)
    assert measures.group_forecast({0: [1, 1]})["frac_reward_all_wrong"] == 1.0
