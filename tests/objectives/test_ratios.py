import math

import pytest
import torch

from posttrain.objectives.ratios import CORRECTIONS, RATIOS, correction_weights, log_ratios

SEQ = torch.tensor([0, 0, 0, 1, 1])
NEW = [-1.0, -0.5, -2.0, -0.2, -0.9]
OLD = [-1.2, -0.4, -1.5, -0.2, -1.9]


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def _oracle(level, new, old):
    """Ratio at each token of sequences [0:3] and [3:5], from the definitions."""
    out = []
    for start, stop in ((0, 3), (3, 5)):
        steps = [n - o for n, o in zip(new[start:stop], old[start:stop], strict=True)]
        if level == "token":
            out += [math.exp(s) for s in steps]
        elif level == "sequence":
            out += [math.exp(sum(steps) / len(steps))] * len(steps)
        else:
            out += [math.prod(math.exp(s) for s in steps)] * len(steps)
    return out


@pytest.mark.parametrize("level", RATIOS)
def test_value_and_gradient(level):
    new = _tensor(NEW).requires_grad_()
    ratio = RATIOS[level](log_ratios(new, _tensor(OLD)), SEQ, 2)
    assert ratio.tolist() == pytest.approx(_oracle(level, NEW, OLD), rel=1e-14)
    weights = [0.3, -1.0, 2.0, 0.5, 1.5]
    (gradient,) = torch.autograd.grad((ratio * _tensor(weights)).sum(), new)
    for i in range(5):
        up, down = ([x + (h if j == i else 0) for j, x in enumerate(NEW)] for h in (1e-6, -1e-6))
        both = [_oracle(level, x, OLD) for x in (up, down)]
        slope = sum(w * (a - b) for w, a, b in zip(weights, *both, strict=True)) / 2e-6
        assert gradient[i].item() == pytest.approx(slope, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("level", RATIOS)
def test_on_policy_is_exactly_one_with_a_gradient(level):
    new = _tensor(NEW).requires_grad_()
    ratio = RATIOS[level](log_ratios(new, None), SEQ, 2)
    assert torch.equal(ratio, torch.ones(5, dtype=torch.float64))
    ratio[3].backward()
    assert new.grad is not None and new.grad[3] > 0


def test_runaway_log_ratio_is_bounded():
    ratio = RATIOS["token"](_tensor([1000.0, -1000.0]), SEQ[:2], 1)
    assert ratio.tolist() == [math.exp(20), 0.0]


# Sampler differences 0.2, −0.1, unknown | 1.0, 0.5; sequence sums 0.1 and 1.5, means 0.03 and 0.75; the cap is 2.
BEHAVIOR = [-1.4, -0.3, math.nan, -1.2, -2.4]
BY_HAND = {
    "token_truncate": [math.exp(0.2), math.exp(-0.1), 1.0, 2.0, math.exp(0.5)],
    "token_mask": [math.exp(0.2), math.exp(-0.1), 1.0, 0.0, math.exp(0.5)],
    "sequence_truncate": [math.exp(0.1)] * 3 + [2.0] * 2,
    "sequence_mask": [math.exp(0.1)] * 3 + [0.0] * 2,
    "geometric_mask": [1.0] * 3 + [0.0] * 2,
}


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_correction_by_hand(mode):
    weights = correction_weights(mode, 2.0, _tensor(OLD).requires_grad_(), _tensor(BEHAVIOR), SEQ, 2)
    assert weights.tolist() == pytest.approx(BY_HAND[mode], rel=1e-12)
    assert not weights.requires_grad


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_a_sampler_that_agrees_weighs_one(mode):
    assert correction_weights(mode, 2.0, _tensor(OLD), _tensor(OLD), SEQ, 2).tolist() == [1.0] * 5
