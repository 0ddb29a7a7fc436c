import math

import pytest
import torch

from posttrain.objectives.kl import KL_ESTIMATORS, AdaptiveEntropy, AdaptiveKL, kl_in_loss

POLICY, REF = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
OLD = [0.4, 0.4, 0.2]
EXACT = sum(p * math.log(p / q) for p, q in zip(POLICY, REF, strict=True))


def _log(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_values_by_hand():
    """x = ln 2: k1 = ln 2, k2 = (ln 2)²/2, k3 = 1/2 + ln 2 − 1. x = 0 gives 0."""
    new, ref = _log([0.5, 0.25]), _log([0.25, 0.25])
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": math.log(2) - 0.5}
    for name, estimator in KL_ESTIMATORS.items():
        assert estimator(new, ref).tolist() == pytest.approx([expected[name], 0.0], abs=1e-15)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_expectation_is_the_kl(name):
    terms = KL_ESTIMATORS[name](_log(POLICY), _log(REF))
    assert (torch.tensor(POLICY) * terms).sum().item() == pytest.approx(EXACT, rel=1e-7)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@pytest.mark.parametrize("old", [POLICY, OLD], ids=["on-policy", "off-policy"])
def test_expected_gradient_with_the_ratio_is_that_of_the_kl(name, old):
    """Enumerated over all tokens, weighted by who sampled them: no Monte Carlo error."""
    logits = _log(POLICY).requires_grad_()
    logp = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - _log(REF))).sum(), logits, retain_graph=True)
    ratio = torch.exp(logp - _log(old))
    terms = kl_in_loss(name, logp, _log(REF), ratio)
    (ours,) = torch.autograd.grad((torch.tensor(old, dtype=torch.float64) * terms).sum(), logits)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_k1_without_the_ratio_teaches_nothing():
    logits = _log(POLICY).requires_grad_()
    terms = kl_in_loss("k1", torch.log_softmax(logits, 0), _log(REF), None)
    (gradient,) = torch.autograd.grad((torch.tensor(POLICY, dtype=torch.float64) * terms).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_k3_stays_finite_far_from_the_reference():
    new = torch.tensor([-500.0, 0.0], requires_grad=True)
    kl = KL_ESTIMATORS["k3"](new, torch.tensor([0.0, -500.0]))
    kl.sum().backward()
    assert kl.isfinite().all() and kl[1].item() == 499
    assert new.grad is not None and new.grad.isfinite().all()


@pytest.mark.parametrize("weight", [None, 1.0, 3.0], ids=["no ratio", "on policy", "off policy"])
def test_k3_never_pulls_away_from_a_far_reference(weight):
    """The gap x = log π_ref − log π beyond 20 nats counts as 20: the term is constant there, and never pushes π down."""
    gaps = [-400.0, -21.0, -1.0, 0.0, 0.5, 5.0, 19.999, 20.001, 25.0, 60.0, 800.0]
    for gap in gaps:
        new = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
        ratio = None if weight is None else weight * torch.exp(new - new.detach())
        terms = kl_in_loss("k3", new, torch.tensor([-3.0 + gap], dtype=torch.float64), ratio)
        terms.sum().backward()
        x = min(gap, 20.0)
        value = math.exp(x) - x - 1
        # d value / d log π = 1 − e^x, and the ratio adds its own value · r.
        slope = (1 - math.exp(x)) * (gap < 20)
        factor = 1.0 if weight is None else weight
        expected = factor * slope + (0.0 if weight is None else factor * value)
        assert terms.item() == pytest.approx(factor * value, rel=1e-12)
        assert new.grad.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        if weight is None and gap > 0:
            assert new.grad.item() <= 0


def test_adaptive_kl_by_hand():
    """Twice the target: error clipped to 0.2, beta × 1.02. Near it: 6.3/6 − 1 = 0.05, beta × 1.005."""
    controller = AdaptiveKL(beta=0.1, target=6.0)
    assert controller.update(12.0).beta == pytest.approx(0.102)
    assert controller.update(6.3).beta == pytest.approx(0.1005)
    assert controller.update(0.0).beta == pytest.approx(0.098)
    assert controller.update(math.nan) == controller


def test_adaptive_entropy_by_hand():
    start = AdaptiveEntropy(coef=0.0)
    assert start.applied == 0.0
    low = start.update(0.1)
    assert (low.coef, low.applied) == (0.005, 0.005)
    high = low.update(0.5)
    assert (high.coef, high.applied) == (0.0, 0.0)
    assert AdaptiveEntropy(coef=1.0).update(0.1).coef == 1.0
    assert low.update(math.nan) == low
