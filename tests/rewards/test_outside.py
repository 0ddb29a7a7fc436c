"""Other people's tools over our rewards: they find nothing but what docs/rewards.md lists."""

import importlib.util
from pathlib import Path

import pytest

from posttrain.rewards.library import REWARDS

_PATH = Path(__file__).parents[2] / "bench" / "rewards" / "outside.py"
_SPEC = importlib.util.spec_from_file_location("outside", _PATH)
outside = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(outside)


@pytest.mark.parametrize("name", ["boxed", "math_equivalence", "number", "choice", "exact"])
def test_reward_doctor_finds_no_wrong_answer_that_is_paid(name):
    accepted, refused, raised = outside.reward_doctor(name)
    assert (accepted, raised) == ([], [])
    if name in outside.REFUSED:
        assert set(refused) == outside.REFUSED[name]


def test_reward_doctor_sees_a_hole(monkeypatch):
    """The same call on a reward that looks for the reference anywhere."""
    hole = lambda prompts, completions, answer: [float(a in c) for c, a in zip(completions, answer, strict=True)]  # noqa: E731
    monkeypatch.setitem(outside.REWARDS, "boxed", REWARDS["boxed"].__class__(hole, (), 0.0, 1.0, "", "\\boxed{ANSWER}"))
    assert "x.negation.plain" in outside.reward_doctor("boxed")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", outside.HINTS)
def test_falsepass_finds_what_is_listed(name):
    assert set(outside.falsepass(name)) == outside.LEFT.get(name, set())
