"""What each action changes, and within which bounds."""

import pytest

from posttrain.health.controls import CHANGES, Controls, after
from posttrain.health.rules import ACTIONS
from posttrain.types import Finding, Severity


def finding(action, **evidence):
    return Finding("rule", Severity.SOFT, 9, evidence, action, "message")


@pytest.mark.parametrize(
    ("action", "changed"),
    [
        ("evaluate", {"evaluate_next": True}),
        ("resample", {"resample": True}),
        ("raise_group_size", {"group_scale": 2}),
        ("lower_learning_rate", {"lr_scale": 0.5}),
        ("raise_beta", {"beta_scale": 2.0}),
        ("raise_entropy", {"entropy_target": 0.2}),
    ],
)
def test_an_action_changes_this_and_nothing_else(action, changed):
    assert after(Controls(), finding(action)) == Controls(**changed)


@pytest.mark.parametrize("action", sorted(set(ACTIONS) - set(CHANGES)))
def test_the_others_change_nothing_from_step_to_step(action):
    assert after(Controls(), finding(action)) == Controls()


@pytest.mark.parametrize(
    ("action", "name", "bound"),
    [
        ("raise_group_size", "group_scale", 4),
        ("resample", "group_scale", 4),
        ("lower_learning_rate", "lr_scale", 1 / 64),
        ("raise_beta", "beta_scale", 64.0),
    ],
)
def test_repeated_for_ever_it_stays_within_its_bound(action, name, bound):
    controls = Controls()
    for _ in range(50):
        controls = after(controls, finding(action))
    assert getattr(controls, name) == bound


def test_a_controller_takes_its_target_from_the_rule_and_keeps_it():
    steered = after(Controls(), finding("raise_beta", kl=0.7, limit=0.5))
    assert steered.kl_target == 0.25
    assert after(steered, finding("raise_beta", kl=9.0, limit=8.0)).kl_target == 0.25
    assert after(Controls(kl_target=0.1), finding("raise_beta", kl=0.7, limit=0.5)).kl_target == 0.1
    assert after(Controls(), finding("raise_entropy", entropy=0.01, target=0.3)).entropy_target == 0.3
    assert after(Controls(entropy_target=0.5), finding("raise_entropy", target=0.3)).entropy_target == 0.5


def test_a_rollback_always_changes_something():
    first = Controls(evaluate_next=True).rolled_back(from_step=9, to_step=6)
    assert first == Controls(lr_scale=0.5, seed_shift=1, skipped=3, rollbacks=1)
    second = first.rolled_back(from_step=8, to_step=4)
    assert second == Controls(lr_scale=0.25, seed_shift=2, skipped=7, rollbacks=2)
    assert len({controls.seed(42) for controls in (Controls(), first, second)}) == 3
    assert Controls().seed(42) == 42


def test_records_of_every_age_are_read():
    controls = Controls(lr_scale=0.5, kl_target=0.1, skipped=3)
    assert Controls.from_json(controls.to_json()) == controls
    assert Controls.from_json({}) == Controls()
    assert Controls.from_json({"lr_scale": 0.5, "of_another_version": 1}) == Controls(lr_scale=0.5)
