"""Order and shares: pure functions of (seed, epoch)."""

from collections import Counter

import pytest

from posttrain.data.dataset import Dataset, DataSummary, epoch_shares, length_percentiles


def dataset(sizes, weights):
    return Dataset(list(range(sum(sizes))), DataSummary((), "off"), "d", tuple(sizes), tuple(weights))


def test_without_weights_each_epoch_is_a_permutation_of_its_own():
    data = dataset([50, 30], [None, None])
    orders = [data.order(7, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(80)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[1] == dataset([50, 30], [None, None]).order(7, 1)
    assert orders[1] != data.order(8, 1)
    assert {i < 50 for i in orders[0][:10]} == {True, False}  # the sources are mixed


def test_weights_decide_the_share_and_small_sources_repeat_evenly():
    data = dataset([900, 100], [1.0, 1.0])
    counts = Counter(data.order(0, 0))
    assert len(data.order(0, 0)) == 1000
    assert sum(n for i, n in counts.items() if i < 900) == 500
    assert {counts[i] for i in range(900, 1000)} == {5}


def test_a_large_source_is_seen_whole_before_it_repeats():
    data = dataset([900, 100], [1.0, 1.0])
    seen = [i for epoch in range(9) for i in data.order(3, epoch) if i < 900]
    assert Counter(seen) == dict.fromkeys(range(900), 5)
    assert {i for epoch in range(2) for i in data.order(3, epoch) if i < 900} == set(range(900))


def test_sources_without_a_weight_give_each_row_once_beside_weighted_ones():
    data = dataset([10, 30, 60], [None, 1.0, 2.0])
    counts = Counter(data.order(0, 5))
    assert [counts[i] for i in range(10)] == [1] * 10
    assert sum(n for i, n in counts.items() if 10 <= i < 40) == 30
    assert sum(counts.values()) == 100


@pytest.mark.parametrize(
    ("sizes", "weights", "shares"),
    [
        ([10, 10, 10], [1, 1, 1], [10, 10, 10]),
        ([3, 4, 3], [1, 1, 1], [4, 3, 3]),  # 3⅓ each: the first of equal remainders rounds up
        ([10, 90], [0.7, 0.3], [70, 30]),
        ([5, 5], [None, 3.0], [5, 5]),
        ([5, 0], [1.0, 1.0], [5, 0]),
    ],
)
def test_shares_add_up_to_all_rows(sizes, weights, shares):
    assert epoch_shares(sizes, weights) == shares


def test_percentiles_are_nearest_rank():
    assert length_percentiles([5, 1, 3, 2, 4]) == {"p50": 3, "p90": 5, "p99": 5, "max": 5}
    assert length_percentiles([]) == {}
