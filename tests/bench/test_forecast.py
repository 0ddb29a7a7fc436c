"""How often the intervals of a forecast hold the truth, on simulated curves."""

import pytest

from forecast import SCENES, coverage


def _held(scenes, num):
    total, kept = 0, 0
    for scene in scenes:
        given, held, _ = coverage(scene, num)
        total, kept = total + given, kept + held.get("asymptote", 0)
        if given >= 25:
            assert min(held.values()) / given >= 0.8, (scene, given, held)
    return total, kept / total


def test_nine_of_ten_intervals_hold_the_asymptote_in_short():
    given, share = _held((SCENES[0], SCENES[3], SCENES[5]), 40)
    assert given >= 30
    assert share >= 0.85


@pytest.mark.slow
def test_nine_of_ten_intervals_hold_the_asymptote_also_where_noise_is_shared_by_neighbours():
    given, share = _held(SCENES, 300)
    assert given >= 600
    assert share >= 0.88
