"""The value loss against float64 loops, value and gradient; and how much values explain."""

import pytest
import torch

from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.value import explained_variance, value_loss

OLD = [0.0, 0.0, 0.0, 0.0, 0.5]
RETURNS = [1.0, 1.0, 0.25, -1.0, 0.5]
VALUES = [0.1, 0.4, 0.4, 0.4, 0.5]
"""Within the range; beyond it towards the return (clipped); beyond it past the return; away from the return; right."""


def by_loop(values, clip):
    """Loss and gradient of a mean over tokens."""
    total, slopes = 0.0, []
    for value, old, wanted in zip(values, OLD, RETURNS, strict=True):
        free, bound = (value - wanted) ** 2, 0.0
        slope = value - wanted
        if clip is not None:
            bounded = min(max(value, old - clip), old + clip)
            bound = (bounded - wanted) ** 2
            if bound > free:
                slope = bounded - wanted if bounded == value else 0.0
        total += 0.5 * max(free, bound)
        slopes.append(slope / len(values))
    return total / len(values), slopes


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_is_that_of_the_loop_with_its_gradient(clip):
    value_M = torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)
    terms = value_loss(value_M, torch.tensor(OLD), torch.tensor(RETURNS), clip, Normalizer(5.0, 2.0))
    expected, slopes = by_loop(VALUES, clip)
    assert float(terms.loss.detach()) == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(terms.loss, value_M)
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-12)


def test_a_value_that_has_moved_out_of_its_range_towards_the_return_is_not_pulled_further():
    value_M = torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)
    terms = value_loss(value_M, torch.tensor(OLD), torch.tensor(RETURNS), 0.2, Normalizer(5.0, 2.0))
    (gradient,) = torch.autograd.grad(terms.loss, value_M)
    assert gradient[1] == 0 and gradient[0] < 0 and gradient[3] > 0
    assert terms.metrics["critic/vf_clipfrac"].value == 1 / 5


def test_parts_of_a_step_add_up_to_its_value_loss():
    norm = Normalizer(5.0, 2.0)
    parts = [
        value_loss(torch.tensor(VALUES[at]), torch.tensor(OLD[at]), torch.tensor(RETURNS[at]), 0.2, norm)
        for at in (slice(0, 2), slice(2, 5), slice(5, 5))
    ]
    whole = value_loss(torch.tensor(VALUES), torch.tensor(OLD), torch.tensor(RETURNS), 0.2, norm)
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(whole.loss))
    metric = (
        parts[0].metrics["critic/vf_loss"] + parts[1].metrics["critic/vf_loss"] + parts[2].metrics["critic/vf_loss"]
    )
    assert metric.value == pytest.approx(whole.metrics["critic/vf_loss"].value)


def test_explained_variance_is_one_for_the_returns_none_for_a_constant_and_less_for_what_is_worse():
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((4,), 3.0), returns) == pytest.approx(0.0, abs=1e-12)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(4)) is None
