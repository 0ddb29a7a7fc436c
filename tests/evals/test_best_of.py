"""Best-of-n by counting all subsets, and on draws whose answer is known."""

import itertools
import math
import random

import pytest

from posttrain.errors import EvalError
from posttrain.evals.best_of import VerifiedItem, best_of_curve, best_of_n, kl_bound, turns_down
from posttrain.evals.run import pass_at_k


def by_enumeration(ranked_by, worth, n):
    """The mean over all subsets; within one, over all that rank highest."""
    found = []
    for subset in itertools.combinations(range(len(worth)), n):
        top = max(ranked_by[place] for place in subset)
        # Ties: as the estimator has it, any sample of the tied rank that is among the n, all alike over subsets.
        best = [worth[place] for place in subset if ranked_by[place] == top]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_mean_over_all_subsets_with_ties(seed):
    made = random.Random(seed)
    ranked_by = [made.choice([0.0, 0.5, 1.0, -math.inf]) for _ in range(7)]
    worth = [made.random() for _ in range(7)]
    for n in range(1, 8):
        assert best_of_n(ranked_by, worth, n) == pytest.approx(by_enumeration(ranked_by, worth, n), abs=1e-12)


def test_a_perfect_verifier_gives_pass_at_n():
    for right in range(9):
        scores = [1.0] * right + [0.0] * (8 - right)
        for n in range(1, 9):
            assert best_of_n(scores, scores, n) == pytest.approx(pass_at_k(8, right, n), abs=1e-12)


def test_over_many_items_it_is_one_minus_the_chance_that_all_are_wrong():
    made, p, most = random.Random(3), 0.2, 16
    draws = [tuple(float(made.random() < p) for _ in range(most)) for _ in range(2000)]
    curve = best_of_curve([VerifiedItem(str(i), d, {"gold": d}) for i, d in enumerate(draws)], most)
    assert [at.n for at in curve] == [1, 2, 4, 8, 16]
    for at in curve:
        values = at.graders["gold"]
        mean = sum(values) / len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) / len(values))
        assert abs(mean - (1 - (1 - p) ** at.n)) < 3.5 * error


def test_a_verifier_that_likes_what_is_wrong_is_seen_to_turn():
    """A flaw that one sample in ten has, and that the verifier likes best: more samples find it more often."""
    made, items = random.Random(1), []
    for number in range(300):
        worth = [made.random() for _ in range(32)]
        flawed = [made.random() < 0.1 for _ in worth]
        gold = tuple(0.0 if bad else value for value, bad in zip(worth, flawed, strict=True))
        proxy = tuple(2.0 if bad else value for value, bad in zip(worth, flawed, strict=True))
        items.append(VerifiedItem(str(number), proxy, {"gold": gold, "proxy": proxy}))
    curve = best_of_curve(items, 32)
    assert turns_down(curve, "gold") in (2, 4, 8)
    assert turns_down(curve, "proxy") is None
    assert [at.verifier for at in curve] == [at.graders["proxy"] for at in curve]


def test_what_the_verifier_could_not_score_is_chosen_only_where_nothing_else_is():
    item = VerifiedItem("a", (None, 0.2, None), {"gold": (1.0, 0.0, 1.0)})
    assert best_of_curve([item], 3)[-1].graders["gold"] == (0.0,)
    only = VerifiedItem("a", (None, None), {"gold": (1.0, 0.0)})
    assert best_of_curve([only], 2)[-1].graders["gold"] == (0.5,)


def test_the_bound_of_the_kl_is_that_of_the_paper():
    assert kl_bound(1) == 0.0
    assert kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_more_than_was_sampled_is_refused():
    with pytest.raises(EvalError, match=r"best of 3 from 2 samples"):
        best_of_n([1.0, 0.0], [1.0, 0.0], 3)
