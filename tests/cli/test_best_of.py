"""A fall under a grader is over-optimisation where it is more than chance."""

import json

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


def process_reward_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForTokenClassification"]}))
    return f"model:{folder}"


def test_a_process_reward_model_that_chooses_has_the_options_that_it_has_as_a_reward(tmp_path):
    spec = process_reward_model(tmp_path / "prm")
    asked = asked_best_of(4, spec, (), None, ("aggregate=product", "step_separator=a=b"))
    assert asked is not None
    assert asked.verifier_kwargs == {"aggregate": "product", "step_separator": "a=b"}


@pytest.mark.parametrize(
    ("most", "verifier", "given", "said"),
    [
        (None, None, ("aggregate=min",), "--verifier-kwargs does nothing without --best-of"),
        (4, None, ("aggregate=min",), "the scorer of the suite takes no options"),
        (4, "boxed", ("aggregate=min",), "boxed takes no options"),
        (4, "prm", ("aggregate",), "expected KEY=VALUE"),
        (4, "prm", ("aggregate=max",), "--verifier-kwargs: prm: aggregate: got 'max', expected one of min"),
        (4, "prm", ("agregate=min",), "--verifier-kwargs: prm: agregate: a process reward model has"),
    ],
)
def test_options_that_a_verifier_has_not_are_refused_before_anything_is_asked(most, verifier, given, said, tmp_path):
    spec = process_reward_model(tmp_path / "prm") if verifier == "prm" else verifier
    with pytest.raises(ConfigError, match=said):
        asked_best_of(most, spec, (), None, given)
