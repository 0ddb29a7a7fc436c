"""Which tokens are treated otherwise, against loops in float64; and what the policy loss makes of it, value and gradient."""

import math

import numpy as np
import pytest
import torch

from posttrain.objectives.policy import PolicyInputs, PolicySpec, policy_loss
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.token_masks import ROUNDING, TOKEN_SELECTIONS, StepTokens, entropy_threshold, is_uncertain

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


def _step(seed=3, length=400):
    """Old log-probs about the present ones, and the advantages of completions of ten tokens."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(2.0, length)
    advantage = np.repeat(rng.normal(size=length // 10), 10)
    return StepTokens(logp, np.minimum(logp + 0.3 * rng.normal(size=length), 0), advantage)


def _covariances(tokens):
    size = len(tokens.logp_M)
    logp, advantage = sum(tokens.logp_M) / size, sum(tokens.advantage_M) / size
    return [(a - advantage) * (x - logp) for a, x in zip(tokens.advantage_M, tokens.logp_M, strict=True)]


def _chosen(tokens, seed=0, **knobs):
    spec = PolicySpec(**knobs)
    found = TOKEN_SELECTIONS[spec.loss_type](tokens, spec, np.random.default_rng(seed))
    return set(np.flatnonzero(found).tolist())


def test_clip_cov_draws_as_many_tokens_as_asked_from_between_its_bounds_and_none_that_the_clip_has():
    tokens, drawn = _step(), set()
    allowed = set()
    for m, covariance in enumerate(_covariances(tokens)):
        ratio, A = math.exp(tokens.logp_M[m] - tokens.old_logp_M[m]), tokens.advantage_M[m]
        plain, clipped = -A * ratio, -A * min(max(ratio, 0.8), 1.28)
        if 1 < covariance < 5 and not clipped > plain:
            allowed.add(m)
    assert 20 < len(allowed) < 200
    for seed in range(200):
        one = _chosen(tokens, seed, loss_type="clip_cov", clip_cov_ratio=0.02, epsilon_high=0.28)
        assert len(one) == 8 and one <= allowed
        drawn |= one
    assert drawn == allowed, "each of them can be drawn"
    assert _chosen(tokens, loss_type="clip_cov", clip_cov_ratio=1.0, epsilon_high=0.28) == allowed
    assert len(_chosen(tokens, loss_type="clip_cov")) == 1, "of a share below one token, one"
    assert _chosen(tokens, loss_type="clip_cov", clip_cov_lb=1e6, clip_cov_ub=2e6) == set()


def test_a_token_that_comes_into_the_bounds_of_clip_cov_takes_the_place_of_at_most_one_other():
    tokens = _step()
    bounds = sorted(c for c in _covariances(tokens) if 1 < c < 5)
    one, other = (
        _chosen(tokens, 5, loss_type="clip_cov", clip_cov_ratio=0.02, clip_cov_lb=lb)
        for lb in (bounds[0] - 1e-9, bounds[0])
    )
    assert len(one ^ other) <= 2


def test_kl_cov_takes_the_tokens_of_highest_covariance():
    tokens = _step()
    ranked = sorted(range(400), key=lambda m: -_covariances(tokens)[m])
    assert _chosen(tokens, loss_type="kl_cov", kl_cov_ratio=0.05) == set(ranked[:20])
    assert _chosen(tokens, loss_type="kl_cov") == {ranked[0]}


def test_what_rounding_does_to_equals_does_not_change_which_of_them_kl_cov_takes():
    """Ten tokens of one covariance, but for 1e-7: the first three, however they are rounded."""
    rng = np.random.default_rng(1)
    A = np.array([1.0] * 10 + [-1.0] * 10)
    for _ in range(20):
        logp = np.concatenate([np.full(10, -0.001), np.full(10, -1.0)]) + 1e-7 * rng.normal(size=20)
        assert _chosen(StepTokens(logp, logp, A), loss_type="kl_cov", kl_cov_ratio=0.15) <= {0, 1, 2, 10, 11, 12}


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
def test_the_loss_of_chosen_tokens_is_the_published_one(loss_type):
    """By loops: −min(r A, clip(r) A) · (0 if drawn) and −r A + (c |log r| if held), over N; and their slopes."""
    tokens = _step(length=40)
    spec = PolicySpec(loss_type=loss_type, clip_cov_ratio=0.1, clip_cov_lb=-3, kl_cov_ratio=0.1, ppo_kl_coef=0.3)
    chosen = TOKEN_SELECTIONS[loss_type](tokens, spec, np.random.default_rng(0))
    assert chosen.sum() == 4
    old, A = tokens.old_logp_M, tokens.advantage_M

    def by_loops(x):
        total = 0.0
        for m in range(40):
            ratio = math.exp(x[m] - old[m])
            if loss_type == "clip_cov":
                total += 0.0 if chosen[m] else max(-ratio * A[m], -min(max(ratio, 0.8), 1.2) * A[m])
            else:
                total += -ratio * A[m] + (0.3 * abs(x[m] - old[m]) if chosen[m] else 0.0)
        return total / 40

    policy_logp_M = torch.tensor(tokens.logp_M, requires_grad=True)
    inputs = PolicyInputs(
        policy_logp_M,
        torch.tensor(np.where(chosen, 0, A) if loss_type == "clip_cov" else A),
        torch.repeat_interleave(torch.arange(4), 10),
        4,
        old_logp_M=torch.tensor(old),
        penalty_M=torch.tensor(chosen * 0.3) if loss_type == "kl_cov" else None,
    )
    loss = policy_loss(inputs, spec, Normalizer(tokens=40, sequences=4)).loss
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(tokens.logp_M), abs=1e-12)
    slopes = [(by_loops(tokens.logp_M + e) - by_loops(tokens.logp_M - e)) / 2e-6 for e in 1e-6 * np.eye(40)]
    np.testing.assert_allclose(policy_logp_M.grad, slopes, atol=1e-8)


def test_on_the_weights_that_sampled_a_penalty_has_neither_value_nor_gradient():
    logp_M = torch.tensor([-1.0, -2.0], requires_grad=True)
    inputs = PolicyInputs(logp_M, torch.zeros(2), torch.zeros(2, dtype=torch.long), 1, penalty_M=torch.ones(2))
    loss = policy_loss(inputs, PolicySpec(loss_type="kl_cov"), Normalizer(tokens=2, sequences=1)).loss
    loss.backward()
    assert (loss.item(), logp_M.grad.tolist()) == (0.0, [0.0, 0.0])
