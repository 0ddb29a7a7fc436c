import math

import pytest
import torch

from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.surrogates import SURROGATES


def _term(name, ratio, advantage, spec, logp=-0.7):
    """Value and gradient with respect to log π of one token whose ratio is exp(log π − old)."""
    new = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    ratio_1 = torch.exp(new - (logp - math.log(ratio)))
    term = SURROGATES[name].term(ratio_1, torch.tensor([advantage], dtype=torch.float64), new, spec)
    term.sum().backward()
    assert new.grad is not None
    return term.item(), new.grad.item()


# (ratio, A) → −min(rA, clip(r)A) and its slope −rA where the free branch wins, else 0.
CLIPPED = [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # above 1.2: no more credit
    (0.5, 2.0, -1.0, -1.0),  # a good token that became rare is still pulled up
    (0.5, -2.0, 1.6, 0.0),  # below 0.8: no more blame
    (1.5, -2.0, 3.0, 3.0),  # a bad token that became likely is still pushed down
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "value", "slope"), CLIPPED)
def test_clipped_by_hand(ratio, advantage, value, slope):
    assert _term("clipped", ratio, advantage, PolicySpec()) == pytest.approx((value, slope))


def test_clip_higher_by_hand():
    assert _term("clipped", 1.25, 1.0, PolicySpec(epsilon_high=0.28)) == pytest.approx((-1.25, -1.25))
    assert _term("clipped", 1.50, 1.0, PolicySpec(epsilon_high=0.28)) == pytest.approx((-1.28, 0.0))


def test_two_sided_clip_bounds_the_blame():
    """delta = 4: r = 10, A = −1 gives 4 instead of 10, and no gradient."""
    assert _term("clipped", 10.0, -1.0, PolicySpec()) == pytest.approx((10.0, 10.0))
    assert _term("clipped", 10.0, -1.0, PolicySpec(delta=4.0)) == pytest.approx((4.0, 0.0))
    assert _term("clipped", 3.0, -1.0, PolicySpec(delta=4.0)) == pytest.approx((3.0, 3.0))


@pytest.mark.parametrize(("ratio", "weight"), [(0.3, 0.3), (2.0, 2.0), (9.0, 5.0)])
def test_cispo_by_hand(ratio, weight):
    """Value −w·A·log π, slope −w·A: the weight is capped, the gradient never vanishes. log π = −0.7, A = 2."""
    assert _term("cispo", ratio, 2.0, PolicySpec(loss_type="cispo")) == pytest.approx((1.4 * weight, -2.0 * weight))


def test_cispo_cap_is_epsilon_high():
    assert _term("cispo", 9.0, 1.0, PolicySpec(loss_type="cispo", epsilon_high=3.0))[1] == pytest.approx(-3.0)


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
def test_sapo_at_one_has_value_two_over_tau_and_slope_one(advantage, tau):
    value, slope = _term("sapo", 1.0, advantage, PolicySpec(loss_type="sapo"))
    assert value == pytest.approx(-2 / tau * advantage)
    assert slope == pytest.approx(-advantage)


def test_sapo_by_hand():
    """r = 3, tau = 1, A = 1: −4·σ(2); slope −4·σ(2)·σ(−2)·r."""
    gate = 1 / (1 + math.exp(-2))
    spec = PolicySpec(loss_type="sapo")
    assert _term("sapo", 3.0, 1.0, spec) == pytest.approx((-4 * gate, -4 * gate * (1 - gate) * 3))


def test_flags_count_only_the_side_the_advantage_pushes_to():
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 6.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    flags = SURROGATES["clipped"].flags(ratio, advantage, PolicySpec())
    assert flags["clip_ratio/low_mean"].tolist() == [False, True, False, False, False]
    assert flags["clip_ratio/high_mean"].tolist() == [False, False, True, False, True]
    assert flags["clip_ratio/region_mean"].tolist() == [False, True, True, False, True]
    cispo = SURROGATES["cispo"].flags(ratio, advantage, PolicySpec(loss_type="cispo"))
    assert cispo["cispo_clip_ratio"].tolist() == [False, False, False, False, True]
    assert SURROGATES["sapo"].flags(ratio, advantage, PolicySpec(loss_type="sapo")) == {}
