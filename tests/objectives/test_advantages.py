import math
import statistics

import numpy as np
import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.objectives.advantages import (
    ADVANTAGES,
    AdvantageSpec,
    as_rewards,
    combine,
    compute_advantages,
    gae_advantage,
    mean_std,
    soft_overlong_penalty,
    turn_advantages,
    whitened,
)

NAN = math.nan
TWO_GROUPS = [[1.0], [0.0], [0.5], [0.0], [0.0], [1.0], [1.0], [None]]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]


def _advantages(rows, groups=None, **spec):
    group_B = torch.tensor(groups if groups is not None else [0] * len(rows))
    return compute_advantages(as_rewards(rows), group_B, AdvantageSpec(**spec))


def _oracle(rewards, groups, estimator, scale, eps):
    """Loops over the definitions with the statistics module; None is unscored."""

    def spread(values):
        return statistics.stdev(values) if len(values) > 1 and len(set(values)) > 1 else 0.0

    scored = [r for r in rewards if r is not None]
    members = {g: [r for r, h in zip(rewards, groups, strict=True) if h == g and r is not None] for g in groups}
    centred = [
        0.0 if r is None or spread(members[g]) == 0 else r - statistics.mean(members[g])
        for r, g in zip(rewards, groups, strict=True)
    ]
    out = []
    for r, g, c in zip(rewards, groups, centred, strict=True):
        if r is None:
            out.append(0.0)
        elif estimator == "group":
            by = {"group": spread(members[g]), "batch": spread(scored), "none": 1 - eps}[scale]
            out.append(c / (by + eps) if c else 0.0)
        elif estimator == "rloo":
            n = len(members[g])
            out.append(r - (sum(members[g]) - r) / (n - 1) if n > 1 else 0.0)
        elif estimator == "reinforce_pp":
            out.append((r - statistics.mean(scored)) / (spread(scored) + eps) if spread(scored) else 0.0)
        elif estimator == "maxrl":
            out.append(c / statistics.mean(members[g]) if c else 0.0)
        else:
            kept = [c for c, r in zip(centred, rewards, strict=True) if r is not None]
            out.append((c - statistics.mean(kept)) / (spread(kept) + eps) if spread(kept) else 0.0)
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("estimator", ADVANTAGES)
@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
def test_oracle(estimator, scale, eps):
    ours = _advantages(TWO_GROUPS, GROUPS, advantage_estimator=estimator, scale_rewards=scale, advantage_eps=eps)
    expected = _oracle([row[0] for row in TWO_GROUPS], GROUPS, estimator, scale, eps)
    assert ours.advantage_B.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_group_values_that_trl_gives():
    """std([1,0,0,1]) = 1/√3 with ddof 1; one unscored leaves mean 1/3, std 1/√3."""
    assert _advantages([[1.0], [0.0], [0.0], [1.0]]).advantage_B.tolist() == pytest.approx(
        [0.86587545, -0.86587545, -0.86587545, 0.86587545], abs=1e-7
    )
    assert _advantages([[1.0], [None], [0.0], [0.0]]).advantage_B.tolist() == pytest.approx(
        [1.1545005, 0.0, -0.5772503, -0.5772503], abs=1e-7
    )


def test_maxrl_of_one_right_in_four_weighs_it_three_times():
    assert _advantages([[1.0], [0.0], [0.0], [0.0]], advantage_estimator="maxrl").advantage_B.tolist() == [
        3,
        -1,
        -1,
        -1,
    ]
    with pytest.raises(ConfigError, match=r"a reward is -0\.5; give rewards of 0 and above"):
        _advantages([[1.0], [-0.5]], advantage_estimator="maxrl")


def test_rloo_by_hand():
    """[3, 1, 2]: 3 − 1.5, 1 − 2.5, 2 − 2."""
    ours = _advantages([[3.0], [1.0], [2.0]], advantage_estimator="rloo")
    assert ours.advantage_B.tolist() == pytest.approx([1.5, -1.5, 0.0])


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_zero_mean_over_what_was_scored(estimator):
    ours = _advantages(TWO_GROUPS, GROUPS, advantage_estimator=estimator).advantage_B
    assert abs(ours.sum().item()) < 1e-12
    assert ours[-1] == 0


@pytest.mark.parametrize("estimator", ADVANTAGES)
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_equal_rewards_give_exactly_zero(estimator, eps):
    """0.1 + 0.2 and 0.3 differ in the last bit; with eps = 0 that bit would become ±1."""
    rows = [[0.1, 0.2], [0.3, 0.0], [0.2, 0.1], [0.0, 0.3]]
    ours = _advantages(rows, advantage_estimator=estimator, advantage_eps=eps)
    assert ours.advantage_B.tolist() == [0.0] * 4
    assert ours.zero_std_P.tolist() == [True]


@pytest.mark.parametrize("estimator", ADVANTAGES)
@pytest.mark.parametrize("rows", [[[None]] * 4, [[1.0], [None], [None], [None]]], ids=["none scored", "one scored"])
def test_too_few_scored_give_zero_not_nan(estimator, rows):
    ours = _advantages(rows, advantage_estimator=estimator)
    assert ours.advantage_B.tolist() == [0.0] * 4
    assert ours.zero_std_P.tolist() == [True]


@pytest.mark.parametrize(("a", "b"), [(0.1, 0.0), (10.0, -3.0), (2.5, 7.0)])
@pytest.mark.parametrize("estimator", ["group", "reinforce_pp", "reinforce_pp_baseline"])
def test_invariant_under_a_scaled_and_shifted_reward(estimator, a, b):
    """eps is added to the std s, so A changes by at most |A|·eps·|1/s − 1/(a·s)|: under 1e-6 at eps 1e-8, a ≥ 0.1."""
    moved = [[None if r is None else a * r + b] for (r,) in TWO_GROUPS]
    for eps, tolerance in ((1e-8, 1e-6), (0.0, 1e-12)):
        spec = {"advantage_estimator": estimator, "advantage_eps": eps}
        before, after = (_advantages(rows, GROUPS, **spec).advantage_B for rows in (TWO_GROUPS, moved))
        torch.testing.assert_close(after, before, rtol=0, atol=tolerance)


def test_order_of_completions_changes_nothing():
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()
    straight = _advantages(TWO_GROUPS, GROUPS).advantage_B
    shuffled = _advantages([TWO_GROUPS[i] for i in order], [GROUPS[i] for i in order]).advantage_B
    torch.testing.assert_close(shuffled, straight[order], rtol=0, atol=1e-14)


def test_combine_skips_what_was_not_scored():
    rewards = as_rewards([[1.0, 0.5], [None, 0.5], [None, None]])
    total = combine(rewards, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert total[:2].tolist() == [2.0, 1.0] and total[2].isnan()


def test_weights_reach_the_reward():
    ours = _advantages([[1.0, 4.0], [0.0, 2.0]], reward_weights=[1.0, 0.5])
    assert ours.reward_B.tolist() == [3.0, 1.0]


def test_ragged_groups():
    count, mean, std = mean_std(torch.tensor([1.0, 3.0, 5.0, NAN], dtype=torch.float64), torch.tensor([0, 0, 1, 2]), 3)
    assert count.tolist() == [2, 1, 0]
    assert mean[:2].tolist() == [2, 5]
    assert std.tolist() == pytest.approx([math.sqrt(2), 0, 0])


def test_gdpo_by_hand():
    """Each reward has its own scale: [0, 1] and [0, 100] normalise to the same ∓1/√2 (eps 0).

    Sums −√2, √2 | 0, 0 have mean 0 and std √(4/3), so A = ∓√(3/2), 0, 0.
    """
    rows = [[0.0, 0.0], [1.0, 100.0], [0.0, 100.0], [1.0, 0.0]]
    ours = _advantages(rows, [0, 0, 1, 1], multi_objective_aggregation="normalize_then_sum", advantage_eps=0.0)
    assert ours.advantage_B.tolist() == pytest.approx([-math.sqrt(1.5), math.sqrt(1.5), 0, 0])
    assert ours.zero_std_P.tolist() == [False, False]


def test_gdpo_unscored_is_zero():
    ours = _advantages([[None, None], [1.0, None], [0.0, 2.0]], multi_objective_aggregation="normalize_then_sum")
    assert ours.advantage_B[0] == 0 and ours.advantage_B.isfinite().all()
    assert ours.advantage_B[1] > 0 > ours.advantage_B[2]


def test_zero_std_is_per_group():
    ours = _advantages([[1.0], [1.0], [0.0], [1.0]], [0, 0, 1, 1])
    assert ours.zero_std_P.tolist() == [True, False]


def test_nothing_sampled():
    empty = compute_advantages(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), AdvantageSpec())
    assert empty.advantage_B.shape == (0,) and empty.zero_std_P.shape == (0,)


@pytest.mark.parametrize(("num_tokens", "penalty"), [(0, 0.0), (60, 0.0), (70, -0.25), (100, -1.0), (130, -1.0)])
def test_soft_overlong_by_hand(num_tokens, penalty):
    """max 100, cache 40: free up to 60, then −1/40 a token."""
    assert soft_overlong_penalty(num_tokens, 100, 40) == penalty


def test_soft_overlong_off():
    assert soft_overlong_penalty(200, 100, 0) == 0.0


def gae_by_loop(rewards, values, gamma, lam):
    """Backwards over each row, in numpy; nothing is to come after its last token."""
    rows = []
    for row, value in zip(rewards, values, strict=True):
        advantages, later, value_after = np.zeros(len(row)), 0.0, 0.0
        for t in reversed(range(len(row))):
            delta = row[t] + gamma * value_after - value[t]
            later = delta + gamma * lam * later
            advantages[t], value_after = later, value[t]
        rows.append(advantages)
    return rows


def ragged(seed, lengths=(1, 5, 3, 0, 8)):
    draw = np.random.default_rng(seed)
    return [draw.normal(size=n) for n in lengths], [draw.normal(size=n) for n in lengths]


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.99, 1.0), (1.0, 1.0)])
def test_gae_is_that_of_a_loop_over_tokens(gamma, lam):
    rewards, values = ragged(1)
    found = gae_advantage(padded(rewards), padded(values), gamma, lam)
    for row, expected in zip(found, gae_by_loop(rewards, values, gamma, lam), strict=True):
        assert row[: len(expected)].tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_gae_with_lambda_and_gamma_of_one_is_monte_carlo():
    """What is still to be earned, less what the critic said: whatever it says of later tokens."""
    rewards, values = ragged(2)
    found = gae_advantage(padded(rewards), padded(values), 1.0, 1.0)
    for row, reward, value in zip(found, rewards, values, strict=True):
        to_come = reward[::-1].cumsum()[::-1] - value
        assert row[: len(to_come)].tolist() == pytest.approx(to_come.tolist(), abs=1e-12)


def test_gae_of_the_docstring():
    found = gae_advantage(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.75]]), 1.0, 0.5)
    assert found.tolist() == [[0.375, 0.25]]


def test_gae_of_no_tokens_is_nothing():
    assert gae_advantage(torch.zeros(2, 0), torch.zeros(2, 0), 1.0, 0.95).shape == (2, 0)
    assert gae_advantage(torch.zeros(0, 3), torch.zeros(0, 3), 1.0, 0.95).shape == (0, 3)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_of_a_critic_that_is_the_exact_value_only_noise_is_left(lam):
    """Two fair coins, each paid 1 for heads, so that 1 is to be expected before the first and ½ before the second.

    All four courses are equally likely. The advantage at a coin is what it paid beyond its half, and λ times the same of the later one: on
    average nothing.
    """
    courses = [(a, b) for a in (0.0, 1.0) for b in (0.0, 1.0)]
    rewards = torch.tensor(courses, dtype=torch.float64)
    values = torch.tensor([[1.0, 0.5]] * 4, dtype=torch.float64)
    found = gae_advantage(rewards, values, 1.0, lam)
    assert found.mean(0).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    expected = [[(a - 0.5) + lam * (b - 0.5), b - 0.5] for a, b in courses]
    assert found.flatten().tolist() == pytest.approx([x for row in expected for x in row], abs=1e-12)
    blind = gae_advantage(rewards, torch.zeros_like(values), 1.0, 1.0)
    assert found.square().mean() < blind.square().mean()


def test_whitened_has_mean_0_and_std_1_and_equal_values_are_0():
    x = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    white = whitened(x)
    assert float(white.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(white.std()) == pytest.approx(1.0, abs=1e-7)
    assert whitened(torch.full((3,), 0.1)).tolist() == [0.0, 0.0, 0.0]
    assert whitened(torch.zeros(0)).tolist() == []


def test_turn_advantages_of_the_docstring():
    found = turn_advantages(
        [[1.0, None, 0.0], [None, 1.0]], torch.tensor([0, 0]), AdvantageSpec(scale_rewards="none"), 1.0
    )
    assert found[0] == pytest.approx([-1 / 3, -2 / 3, -2 / 3]) and found[1] == pytest.approx([1 / 3, 1 / 3])


def test_groups_know_nothing_of_each_others_turns_and_nothing_paid_is_nothing_earned():
    paid = [[1.0, 0.0], [0.5], [None, None], [4.0, 4.0], []]
    found = turn_advantages(paid, torch.tensor([0, 0, 0, 1, 1]), AdvantageSpec(scale_rewards="none"), 0.5)
    assert found == [[0.25, -0.5], [0.0], [0.0, 0.0], [0.0, 0.0], []]
    assert turn_advantages([[None], []], torch.tensor([0, 0]), AdvantageSpec(), 1.0) == [[0.0], []]
