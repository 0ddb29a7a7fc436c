"""Feature matching against plain loops from the paper, and by enumerating all samples of a small policy."""

import itertools
import math

import pytest
import torch

from posttrain.objectives.feature_matching import MatchingSpec, match, matching_advantages

RNG = torch.Generator().manual_seed(3)


def features(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def by_loops(sampled, answer):
    """Eq. 7 term by term: (alignment, diversity) of each sample."""
    rows = [row.tolist() for row in sampled]
    found = []
    for j, row in enumerate(rows):
        others = [dot(row, other) for k, other in enumerate(rows) if k != j]
        found.append((cosine(row, answer.tolist()), sum(others) / len(others)))
    return found


def whitened(rows, sampled):
    """(XᵀX)^(−1/2) φ by the singular vectors of X, directions without a length being 0."""
    _, lengths, directions = torch.linalg.svd(sampled, full_matrices=False)
    kept = lengths > 1e-5 * lengths.max()
    return rows @ directions[kept].T @ torch.diag(1 / lengths[kept]) @ directions[kept]


@pytest.mark.parametrize("use_whitening", [False, True])
@pytest.mark.parametrize("width", [7, 3])
def test_alignment_and_diversity_are_those_of_plain_loops(use_whitening, width):
    sampled, answer = features(4, width), features(width)
    found = match(sampled, answer, use_whitening=use_whitening)
    seen = (whitened(sampled, sampled), whitened(answer, sampled)) if use_whitening else (sampled, answer)
    expected = by_loops(*seen)
    torch.testing.assert_close(found.alignment_G, torch.tensor([a for a, _ in expected], dtype=torch.float64))
    torch.testing.assert_close(found.diversity_G, torch.tensor([d for _, d in expected], dtype=torch.float64))
    gap = [sum(column) / 4 - y for column, y in zip(zip(*sampled.tolist(), strict=True), answer.tolist(), strict=True)]
    assert found.distance == pytest.approx(dot(gap, gap))


@pytest.mark.parametrize("use_whitening", [False, True])
def test_a_sample_like_the_answer_is_aligned_most(use_whitening):
    """Whitened, samples are orthonormal, so that one that is the answer leaves nothing for the others."""
    sampled = features(4, 9)
    found = match(sampled, sampled[2], use_whitening=use_whitening)
    assert found.alignment_G[2] == pytest.approx(1.0)
    assert found.alignment_G.argmax() == 2
    if use_whitening:
        assert found.alignment_G.tolist() == pytest.approx([0, 0, 1, 0], abs=1e-9)


def test_equal_samples_have_the_full_diversity_penalty():
    one = features(8)
    one = one / one.norm()
    found = match(one.repeat(4, 1), one, use_whitening=False)
    assert found.diversity_G.tolist() == pytest.approx([1.0] * 4)
    assert found.distance == pytest.approx(0.0, abs=1e-12)
    # One direction shared by four: each has a quarter of its length, squared.
    found = match(one.repeat(4, 1), one, use_whitening=True)
    assert found.diversity_G.tolist() == pytest.approx([0.25] * 4)
    assert found.alignment_G.tolist() == pytest.approx([1.0] * 4)


def test_whitened_rewards_do_not_know_the_scale_or_the_axes():
    sampled, answer = features(4, 6), features(6)
    turned = torch.linalg.qr(features(6, 6))[0] * 37.0
    before, after = (
        match(s, a, use_whitening=True) for s, a in ((sampled, answer), (sampled @ turned, answer @ turned))
    )
    torch.testing.assert_close(after.alignment_G, before.alignment_G)
    torch.testing.assert_close(after.diversity_G, before.diversity_G)
    # Of an answer that the samples span nothing is left but its shares in them, whatever the map.
    spanned, bent = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64) @ sampled, features(6, 6)
    first, second = (
        match(sampled, spanned, use_whitening=True),
        match(sampled @ bent, spanned @ bent, use_whitening=True),
    )
    torch.testing.assert_close(first.alignment_G, second.alignment_G)


def test_samples_in_another_order_have_their_own_rewards():
    sampled, answer, order = features(5, 7), features(7), torch.tensor([3, 0, 4, 1, 2])
    before, after = (match(rows, answer, use_whitening=True) for rows in (sampled, sampled[order]))
    torch.testing.assert_close(after.alignment_G, before.alignment_G[order])
    torch.testing.assert_close(after.diversity_G, before.diversity_G[order])


def test_nothing_is_not_a_number():
    """An answer that has nothing in common with the samples, and features of length 0."""
    axes = torch.eye(4, dtype=torch.float64)
    for sampled, answer in ((axes[:2], axes[3]), (torch.zeros(3, 4, dtype=torch.float64), axes[0])):
        for use_whitening in (False, True):
            found = match(sampled, answer, use_whitening=use_whitening)
            assert found.alignment_G.tolist() == [0.0] * len(sampled)
            assert found.diversity_G.tolist() == [0.0] * len(sampled)


def expected_gradient(spec, group):
    """Σ over all samples of a policy with five outcomes: probability · mean of A_j ∇ log p(ŷ_j); and −∇‖E φ − φ(y)‖²."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    phi, answer = torch.nn.functional.normalize(features(5, 3), dim=-1), features(3)
    answer = answer / answer.norm()
    logp = torch.log_softmax(logits, 0)
    loss = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(5), repeat=group):
        places = list(drawn)
        advantages = matching_advantages([match(phi[places], answer, use_whitening=False)], spec).advantage_B
        probability = logp.detach()[places].sum().exp()
        loss = loss + probability * (advantages * logp[places]).mean()
    (sampled,) = torch.autograd.grad(loss, logits)
    distance = ((torch.softmax(logits, 0) @ phi - answer) ** 2).sum()
    (exact,) = torch.autograd.grad(-distance, logits)
    return sampled, exact


def test_the_sampled_gradient_is_that_of_the_distance():
    sampled, exact = expected_gradient(MatchingSpec(), 4)
    torch.testing.assert_close(sampled, exact)


def test_the_usual_baseline_takes_a_share_of_the_diversity():
    """With rewards of the others as they are, two of three shares are left of four samples'; the paper's own is whole."""
    biased, exact = expected_gradient(MatchingSpec(unbiased_baseline=False), 4)
    assert not torch.allclose(biased, exact, rtol=1e-3)
    spec = MatchingSpec(unbiased_baseline=False, diversity_coef=1.5)
    sampled, exact = expected_gradient(spec, 4)
    torch.testing.assert_close(sampled, exact)


def test_advantages_are_leave_one_out_in_each_group():
    """r = 2·alignment − 2·diversity; a group against the others of its own alone."""
    first, second = (
        match(features(3, 5), features(5), use_whitening=False),
        match(features(4, 5), features(5), use_whitening=False),
    )
    found = matching_advantages(
        [first, second], MatchingSpec(unbiased_baseline=False, alignment_coef=0.5, diversity_coef=2.0)
    )
    place = 0
    for one in (first, second):
        rewards = [a - 4 * d for a, d in zip(one.alignment_G.tolist(), one.diversity_G.tolist(), strict=True)]
        for j, reward in enumerate(rewards):
            others = [other for k, other in enumerate(rewards) if k != j]
            assert found.reward_B[place].item() == pytest.approx(reward)
            assert found.advantage_B[place].item() == pytest.approx(reward - sum(others) / len(others))
            place += 1


def test_the_reward_that_is_logged_is_the_reward():
    """Whatever the baseline: the factor is the advantage's."""
    one = match(features(4, 5), features(5), use_whitening=False)
    usual, own = (matching_advantages([one], MatchingSpec(unbiased_baseline=b)) for b in (False, True))
    torch.testing.assert_close(own.reward_B, usual.reward_B)
    assert not torch.allclose(own.advantage_B, usual.advantage_B)


def test_group_advantages_are_divided_by_their_spread():
    one = match(features(4, 5), features(5), use_whitening=False)
    found = matching_advantages(
        [one], MatchingSpec(advantage_estimator="group", unbiased_baseline=False, advantage_eps=0.0)
    )
    assert found.advantage_B.std().item() == pytest.approx(1.0)
