"""Numbers of answers, worked out token by token."""

import math

import pytest
import torch

from posttrain.objectives.pair_scores import summed, wpo_weights

LOGP = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0], dtype=torch.float64)
SEQ = torch.tensor([0, 0, 0, 1, 2, 3, 3])
"""Two pairs: answers of 3 and 1 tokens, and of 1 and 2."""


def test_tokens_beyond_the_other_answers_length_count_by_ld_alpha():
    assert summed(LOGP, SEQ, 4).tolist() == [-7, -8, -16, -96]
    assert summed(LOGP, SEQ, 4, 0.25).tolist() == [-1 - 0.25 * 6, -8, -16, -32 - 0.25 * 64]
    assert torch.equal(summed(LOGP, SEQ, 4, 1.0), summed(LOGP, SEQ, 4))
    assert summed(LOGP, SEQ, 4, 0.0).tolist() == [-1, -8, -16, -32]


def test_ld_alpha_is_the_gradient_of_the_tokens_beyond():
    logp = LOGP.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(summed(logp, SEQ, 4, 0.25).sum(), logp)
    assert gradient.tolist() == [1, 0.25, 0.25, 1, 1, 1, 0.25]


def test_the_order_of_the_sequences_does_not_matter():
    order = torch.tensor([3, 0, 1, 2, 5, 6, 4])
    assert torch.equal(summed(LOGP[order], SEQ[order], 4, 0.25), summed(LOGP, SEQ, 4, 0.25))


def test_wpo_weight_by_hand():
    """Uniform over V tokens, log p = log Σ p² = −log V: weight 1. Else the mean gap of each answer, both added up."""
    uniform = torch.full((7,), -math.log(5), dtype=torch.float64)
    assert wpo_weights(uniform, uniform, SEQ, 4).tolist() == pytest.approx([1.0, 1.0])
    found = wpo_weights(LOGP, torch.full_like(LOGP, -3.0), SEQ, 4)
    assert found.tolist() == pytest.approx([math.exp((-7 / 3 + 3) + (-8 + 3)), math.exp((-16 + 3) + (-48 + 3))])


def test_wpo_weights_are_constants():
    logp = LOGP.clone().requires_grad_()
    assert not wpo_weights(logp, LOGP, SEQ, 4).requires_grad
