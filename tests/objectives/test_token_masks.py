"""Which tokens teach, against loops in float64; and what the policy loss makes of it, value and gradient."""

import math

import numpy as np
import pytest
import torch

from posttrain.objectives.policy import PolicyInputs, PolicySpec, policy_loss
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.token_masks import ROUNDING, entropy_threshold, is_uncertain

ENTROPY = np.array([0.1, 2.0, 0.3, 0.9, 0.0, 1.5, 0.2, 0.4, 1.1, 0.05])
LENGTHS, ADVANTAGE = [3, 5, 2], [1.2, -0.8, 0.5]


def _kept(share):
    return is_uncertain(ENTROPY, entropy_threshold(ENTROPY, share))


def test_the_most_uncertain_fifth_of_ten_tokens_is_two():
    assert np.flatnonzero(_kept(0.2)).tolist() == [1, 5]
    assert entropy_threshold(ENTROPY, 0.2) == pytest.approx(1.1 + 0.2 * (1.5 - 1.1))
    assert _kept(1.0).all()


def test_the_threshold_is_that_of_torch():
    for share in (0.05, 0.2, 0.5, 0.83):
        expected = torch.quantile(torch.from_numpy(ENTROPY), 1 - share).item()
        assert entropy_threshold(ENTROPY, share) == pytest.approx(expected, abs=1e-12)


def test_tokens_of_one_context_stay_together_whatever_scored_them():
    """Four tokens that differ by rounding, at the threshold; the next one lies clearly below it."""
    entropy = np.array([1.0, 1.0 + 2e-7, 1.0 - 2e-7, 1.0 + 1e-7, 1.0 - 2 * ROUNDING, 0.2], np.float32)
    assert is_uncertain(entropy, entropy_threshold(entropy, 0.4)).tolist() == [True] * 4 + [False] * 2


def test_what_is_not_a_number_is_not_left_out_in_silence():
    entropy = np.array([0.1, math.nan, 0.2])
    assert is_uncertain(entropy, entropy_threshold(entropy, 0.2)).all()


@pytest.mark.parametrize(("loss_type", "level"), [("dapo", "token"), ("cispo", "token"), ("grpo", "sequence")])
def test_tokens_left_out_give_no_term_and_still_count(loss_type, level):
    """−Σ_kept r A / N, with N all tokens; the gradient of a sequence's ratio reaches all of its tokens."""
    keep, rng = _kept(0.4), np.random.default_rng(0)
    logp, old = -rng.random(10) * 3, -rng.random(10) * 3
    logp = old + 0.1 * np.sign(logp - old)  # within the clip range
    seq, A = np.repeat(np.arange(3), LENGTHS), np.repeat(ADVANTAGE, LENGTHS)

    def by_loops(x):
        total = 0.0
        for m in np.flatnonzero(keep):
            same = [n for n in range(10) if seq[n] == seq[m]]
            mean = sum(x[n] - old[n] for n in same) / len(same)
            if loss_type == "cispo":
                term = -math.exp(logp[m] - old[m]) * A[m] * x[m]
            else:
                term = -math.exp(x[m] - old[m] if level == "token" else mean) * A[m]
            total += term / (10 if loss_type != "grpo" else len(same) * 3)
        return total

    policy_logp_M = torch.tensor(logp, requires_grad=True)
    inputs = PolicyInputs(
        policy_logp_M, torch.tensor(np.where(keep, A, 0)), torch.tensor(seq), 3, old_logp_M=torch.tensor(old)
    )
    spec = PolicySpec(loss_type=loss_type, importance_sampling_level=level)
    loss = policy_loss(inputs, spec, Normalizer(tokens=10, sequences=3)).loss
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(logp), abs=1e-12)
    h = 1e-6 * np.eye(10)
    slopes = [(by_loops(logp + e) - by_loops(logp - e)) / 2e-6 for e in h]
    np.testing.assert_allclose(policy_logp_M.grad, slopes, atol=1e-8)
