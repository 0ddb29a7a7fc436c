"""The law of answers' lengths: its mean is the one asked for, also where many are cut."""

import pytest

from posttrain.planner.lengths import Lengths


@pytest.mark.parametrize(("mean", "longest"), [(400, 100_000), (3000, 4096), (300, 2048)])
def test_the_mean_after_the_cut_is_the_one_asked_for(mean, longest):
    lengths = Lengths(mean, longest, 0.7)
    drawn = lengths.draw(20_000, seed=3)
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.03)
    # The mean of what may not be below 0 is the area under the share that survives.
    assert sum(alive for _, alive in lengths.surviving(2000)) * longest / 2000 == pytest.approx(mean, rel=0.01)
    assert max(drawn) <= longest and drawn == lengths.draw(20_000, seed=3) != lengths.draw(20_000, seed=4)


def test_without_a_spread_all_are_equal():
    assert Lengths(400, 999, 0.0).draw(3) == [400] * 3
    assert Lengths(999, 999, 0.7).draw(2) == [999] * 2
    assert Lengths(10, 99, 0.0).surviving(2) == [(2.5, 1.0), (7.5, 1.0)]
