"""A fall under a grader is over-optimisation where it is more than chance."""

import pytest

from posttrain.cli.best_of import asked_best_of, over_optimised_from
from posttrain.errors import ConfigError
from posttrain.evals.best_of import VerifiedItem, best_of_curve


def seen_as(*graded):
    """Items of two samples, of which the verifier takes the first, as a grader sees them."""
    return [VerifiedItem(f"q{n}", (1.0, 0.0), {"own": one}) for n, one in enumerate(graded)]


def test_what_falls_on_every_item_is_over_optimised_and_what_falls_by_chance_is_not():
    on_all = seen_as(*[(0.0, 1.0), (0.1, 1.0)] * 10)
    assert over_optimised_from(best_of_curve(on_all, 2), "own", on_all) == 1
    by_chance = seen_as(*[(0.0, 1.0), (1.0, 0.0)] * 10, (0.0, 1.0))
    curve = best_of_curve(by_chance, 2)
    assert sum(curve[1].graders["own"]) < sum(curve[0].graders["own"]), "the mean does fall"
    assert over_optimised_from(curve, "own", by_chance) is None


def test_what_an_environment_pays_is_no_verifier_of_texts():
    with pytest.raises(ConfigError, match="no opinion of a text"):
        asked_best_of(4, "environment", (), None)
