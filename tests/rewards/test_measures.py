import math
import random

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


def test_mutual_information_of_a_thing_with_itself_is_its_entropy_and_of_strangers_near_0():
    rng = random.Random(0)
    values = [rng.random() for _ in range(400)]
    assert measures.mutual_information(values, [-v for v in values]) == pytest.approx(math.log(4), abs=0.01)
    found = [
        measures.mutual_information([rng.random() for _ in range(64)], [rng.random() for _ in range(64)])
        for _ in range(50)
    ]
    assert sum(found) / len(found) < 0.06, "without the correction it is 0.08 on average"
    coin = [float(v > 0.5) for v in values]
    assert measures.mutual_information(coin, coin) == pytest.approx(math.log(2), abs=0.02)
    assert measures.mutual_information([1.0] * 9, list(range(9))) == 0.0
    assert measures.mutual_information([], []) == 0.0


def test_shares_of_the_spread_add_up_to_1_and_are_worked_out_by_hand():
    """0, 1 and 2, 0: the sum 2, 1 varies by 1/2; the first goes against it with -1/2, the second with it by 1."""
    assert measures.spread_shares([[0.0, 1.0], [2.0, 0.0]]) == pytest.approx([-1.0, 2.0])
    rng = random.Random(1)
    columns = [[rng.gauss(0, scale) for _ in range(100)] for scale in (1, 2, 0)]
    assert sum(measures.spread_shares(columns)) == pytest.approx(1.0)
    assert measures.spread_shares(columns)[2] == 0.0
    assert measures.spread_shares([[1.0, 1.0], [2.0, 2.0]]) == [0.0, 0.0]
