"""Which groups are all right: by the library's word, else by the run's own best and worst."""

import math

import torch

from posttrain.recipes.experience.reward_range import judging_weights, shares, stated_bounds, widened

NAN = math.nan


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def judged(rewards_BK, specs, *, groups=2, weights=None, bounds=None):
    weights = weights or [1.0] * len(specs)
    group_B = torch.arange(len(rewards_BK)) // groups
    bounds = widened(stated_bounds(specs) if bounds is None else bounds, rewards_BK)
    found = shares(rewards_BK, group_B, bounds, judging_weights(specs, weights))
    return found["frac_reward_all_right"], found["frac_reward_all_wrong"]


def test_the_library_says_what_its_best_is():
    assert judged(table([1.0], [1.0], [1.0], [1.0]), ["boxed"]) == (1.0, 0.0)
    assert judged(table([0.0], [0.0], [0.0], [1.0]), ["boxed"]) == (0.0, 0.5)
    assert judged(table([1.0, 0.0], [1.0, 0.0]), ["boxed", "clean"]) == (0.0, 1.0)


def test_an_own_reward_is_judged_by_the_best_and_worst_of_the_run():
    ones = table([1.0], [1.0], [1.0], [1.0])
    assert judged(ones, ["r.py:f"], bounds=((0.0, 1.0),)) == (1.0, 0.0)
    assert judged(ones, ["r.py:f"], bounds=((0.0, 2.0),)) == (0.0, 1.0)
    assert judged(table([1.0], [1.0], [0.0], [0.0]), ["r.py:f"]) == (0.5, 0.5)


def test_a_reward_that_never_differed_is_not_known_to_be_right():
    assert judged(table([1.0], [1.0]), ["r.py:f"]) == (0.0, 1.0)
    # Beside one that did, it counts as at its best.
    rewards_BK = table([1.0, 0.5], [1.0, 0.5], [0.0, 0.5], [1.0, 0.5])
    assert judged(rewards_BK, ["r.py:f", "r.py:g"]) == (0.5, 0.0)


def test_penalties_of_the_library_do_not_make_a_right_answer_wrong():
    rewards_BK = table([1.0, -0.1], [1.0, -0.3], [0.0, -0.2], [0.0, -0.1])
    assert judged(rewards_BK, ["boxed", "length_penalty"]) == (0.5, 0.5)
    assert judging_weights(["length_penalty"], [1.0]) == [1.0]


def test_a_negative_weight_makes_the_lowest_the_best():
    assert judged(table([0.0], [0.0], [3.0], [3.0]), ["r.py:f"], weights=[-1.0]) == (0.5, 0.5)


def test_what_could_not_be_scored_says_nothing():
    """A group without any score is neither; a function that scored nothing does not spoil the others."""
    assert judged(table([NAN], [NAN], [1.0], [NAN]), ["boxed"]) == (0.5, 0.0)
    assert judged(table([1.0, NAN], [1.0, NAN], [NAN, 0.0], [NAN, 0.0]), ["boxed", "code_tests"]) == (0.5, 0.5)


def test_bounds_widen_and_are_none_until_something_is_scored():
    bounds = widened((None, None), table([0.5, NAN], [0.25, NAN]))
    assert bounds == ((0.25, 0.5), None)
    assert widened(bounds, table([0.3, 2.0])) == ((0.25, 0.5), (2.0, 2.0))
