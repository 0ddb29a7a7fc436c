"""Advantages from rewards: what each completion scored against a baseline. Float64, on all ranks' rewards together.

An unscored reward is NaN (None in lists): it enters no mean and no std, and its completion's advantage is 0.
std is the sample std (ddof = 1) and `eps` is added to it, as in TRL. Of tokens only `gae_advantage` knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.errors import ConfigError

_EQUAL = 1e-9
"""Rewards count as equal if they differ by less than this share of their size: sums of floats differ in the last bits."""


@dataclass(frozen=True, slots=True)
class AdvantageSpec:
    """Knobs under their configuration names. `reward_weights=None` weighs every function 1."""

    advantage_estimator: str = "group"
    scale_rewards: str = "group"
    advantage_eps: float = 1e-4
    multi_objective_aggregation: str = "sum_then_normalize"
    reward_weights: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Advantages:
    """Per completion: advantage (0 if unscored) and weighted reward (NaN if unscored). Per group: all rewards equal.

    A group with fewer than two scored completions has `zero_std` too: it teaches nothing.
    """

    advantage_B: Tensor
    reward_B: Tensor
    zero_std_P: Tensor


def as_rewards(rows: Sequence[Sequence[float | None]]) -> Tensor:
    """One row per completion, one column per reward function, None → NaN. Shapes: → [B, K] float64."""
    return torch.tensor([[math.nan if r is None else float(r) for r in row] for row in rows], dtype=torch.float64)


def combine(rewards_BK: Tensor, weights_K: Tensor) -> Tensor:
    """Weighted sum over what was scored; NaN if nothing was. Missing rewards count 0, weights are not renormalised (TRL)."""
    total_B = (rewards_BK * weights_K).nansum(1)
    return total_B.masked_fill(rewards_BK.isnan().all(1), math.nan)


def mean_std(x_B: Tensor, group_B: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scored count, mean and sample std per group; the std of fewer than two, or of equal values, is 0. Shapes: → [P]."""
    scored_B = ~x_B.isnan()
    value_B, index_B = x_B[scored_B], group_B[scored_B]
    zeros_P = torch.zeros(num_groups, dtype=x_B.dtype)
    count_P = zeros_P.index_add(0, index_B, torch.ones_like(value_B))
    mean_P = zeros_P.index_add(0, index_B, value_B) / count_P.clamp(min=1)
    square_P = zeros_P.index_add(0, index_B, (value_B - mean_P[index_B]) ** 2)
    std_P = torch.sqrt(square_P / (count_P - 1).clamp(min=1))
    low_P = zeros_P.scatter_reduce(0, index_B, value_B, "amin", include_self=False)
    high_P = zeros_P.scatter_reduce(0, index_B, value_B, "amax", include_self=False)
    equal_P = high_P - low_P <= _EQUAL * torch.maximum(low_P.abs(), high_P.abs())
    return count_P, mean_P, std_P.masked_fill(equal_P, 0.0)


def _standardize(x_B: Tensor, group_B: Tensor, num_groups: int, eps: float) -> Tensor:
    """(x − mean_g) / (std_g + eps); exactly 0 where a group has no spread, even with eps = 0."""
    _, mean_P, std_P = mean_std(x_B, group_B, num_groups)
    scale_P = torch.where(std_P > 0, std_P + eps, math.inf)
    return (x_B - mean_P[group_B]) / scale_P[group_B]


def _centre(x_B: Tensor, group_B: Tensor, num_groups: int) -> Tensor:
    """x − mean_g; exactly 0 where a group has no spread, NaN where x is."""
    _, mean_P, std_P = mean_std(x_B, group_B, num_groups)
    return torch.where(std_P[group_B] > 0, x_B - mean_P[group_B], 0.0 * x_B)


def group_advantage(reward_B: Tensor, group_B: Tensor, num_groups: int, spec: AdvantageSpec) -> Tensor:
    """(r − mean_g) / (std + eps), std of the group, of the batch, or 1. Source: GRPO, arXiv 2402.03300 sec. 4.1.

    scale "none": Dr. GRPO, arXiv 2503.20783; "batch": Lite PPO, arXiv 2508.08221.
    """
    if spec.scale_rewards == "group":
        return _standardize(reward_B, group_B, num_groups, spec.advantage_eps)
    centred_B = _centre(reward_B, group_B, num_groups)
    if spec.scale_rewards == "none":
        return centred_B
    assert spec.scale_rewards == "batch", spec.scale_rewards
    _, _, std_1 = mean_std(reward_B, torch.zeros_like(group_B), 1)
    return centred_B / torch.where(std_1 > 0, std_1 + spec.advantage_eps, math.inf)


def rloo_advantage(reward_B: Tensor, group_B: Tensor, num_groups: int, spec: AdvantageSpec) -> Tensor:
    """r − mean of the group's other scored rewards = n/(n−1)·(r − mean_g); never scaled. Source: arXiv 2402.14740."""
    count_P, mean_P, std_P = mean_std(reward_B, group_B, num_groups)
    factor_P = torch.where(std_P > 0, count_P / (count_P - 1).clamp(min=1), 0.0)
    return factor_P[group_B] * (reward_B - mean_P[group_B])


def reinforce_pp_advantage(reward_B: Tensor, group_B: Tensor, num_groups: int, spec: AdvantageSpec) -> Tensor:
    """(r − mean) / (std + eps) over the whole batch; groups play no part. Source: REINFORCE++, arXiv 2501.03262.

    Whitened per completion; implementations that whiten per token weight long completions more.
    """
    return _standardize(reward_B, torch.zeros_like(group_B), 1, spec.advantage_eps)


def reinforce_pp_baseline_advantage(reward_B: Tensor, group_B: Tensor, num_groups: int, spec: AdvantageSpec) -> Tensor:
    """r − mean_g, then whitened over the batch. Source: REINFORCE++-baseline, arXiv 2501.03262."""
    return _standardize(_centre(reward_B, group_B, num_groups), torch.zeros_like(group_B), 1, spec.advantage_eps)


def maxrl_advantage(reward_B: Tensor, group_B: Tensor, num_groups: int, spec: AdvantageSpec) -> Tensor:
    """(r − mean_g) / mean_g: the gradient of log of the mean reward, as far as G samples tell it. Source: MaxRL, arXiv 2602.02710.

    Raises: ConfigError for a reward below 0, of which there is no logarithm.
    """
    if bool((reward_B < 0).any()):
        raise ConfigError(
            f"advantage_estimator: maxrl divides by a group's mean reward, and a reward is {reward_B.nan_to_num(0.0).min():g}; give rewards "
            "of 0 and above (soft_overlong_cache and kl_in_reward subtract), or set advantage_estimator: group"
        )
    _, mean_P, std_P = mean_std(reward_B, group_B, num_groups)
    scale_P = torch.where(std_P > 0, mean_P, math.inf)
    return (reward_B - mean_P[group_B]) / scale_P[group_B]


Estimator = Callable[[Tensor, Tensor, int, AdvantageSpec], Tensor]
"""(reward_B, group_B, num_groups, spec) → advantage_B, NaN where the reward is."""

ADVANTAGES: dict[str, Estimator] = {
    "group": group_advantage,
    "rloo": rloo_advantage,
    "reinforce_pp": reinforce_pp_advantage,
    "reinforce_pp_baseline": reinforce_pp_baseline_advantage,
    "maxrl": maxrl_advantage,
}


def gdpo_advantage(rewards_BK: Tensor, weights_K: Tensor, group_B: Tensor, num_groups: int, eps: float) -> Tensor:
    """Normalise each reward in its group, add them weighted, whiten over the batch. Source: GDPO, arXiv 2601.05242."""
    columns = [_standardize(column_B, group_B, num_groups, eps) for column_B in rewards_BK.unbind(1)]
    return _standardize(combine(torch.stack(columns, 1), weights_K), torch.zeros_like(group_B), 1, eps)


def compute_advantages(rewards_BK: Tensor, group_B: Tensor, spec: AdvantageSpec) -> Advantages:
    """Advantages of a whole generation batch (all ranks: batch statistics are over everything given).

    Shapes: rewards_BK [B, K] with NaN for unscored; group_B [B] int64, the group 0..P−1 of each completion.
    """
    rewards_BK = rewards_BK.double()
    num_functions = rewards_BK.shape[1]
    weights_K = torch.tensor(list(spec.reward_weights or [1.0] * num_functions), dtype=torch.float64)
    num_groups = int(group_B.max()) + 1 if group_B.numel() else 0
    reward_B = combine(rewards_BK, weights_K)
    if spec.multi_objective_aggregation == "normalize_then_sum":
        assert spec.advantage_estimator == "group", "normalize_then_sum (GDPO) is defined on group advantages"
        advantage_B = gdpo_advantage(rewards_BK, weights_K, group_B, num_groups, spec.advantage_eps)
        spreads = [mean_std(column_B, group_B, num_groups)[2] for column_B in rewards_BK.unbind(1)]
        zero_std_P = torch.stack(spreads).amax(0) == 0
    else:
        advantage_B = ADVANTAGES[spec.advantage_estimator](reward_B, group_B, num_groups, spec)
        zero_std_P = mean_std(reward_B, group_B, num_groups)[2] == 0
    return Advantages(advantage_B.nan_to_num(nan=0.0), reward_B, zero_std_P)


def turn_advantages(
    paid: Sequence[Sequence[float | None]], group_B: Tensor, spec: AdvantageSpec, gamma: float
) -> list[list[float]]:
    """Σ_{j ≥ k} γ^(j−k) r̃_j for each turn k of each episode; r̃ is a turn's reward against all that turns of its group were paid.

    A turn that was paid nothing (None) has no r̃, and enters no mean. Source: DeepSeekMath, arXiv 2402.03300 sec. 4.1.3, process
    supervision with turns as its steps; γ = 1 there. Where one turn of each episode is paid, and no turn comes after it, every turn has
    the advantage of the episode. Example: rewards (1, None, 0) and (None, 1) of a group, centred and not scaled: the mean is 2/3, r̃ is
    1/3, −2/3 and 1/3; advantages −1/3 −2/3 −2/3 and 1/3 1/3.
    """
    earned = [(b, k, reward) for b, turns in enumerate(paid) for k, reward in enumerate(turns) if reward is not None]
    rewards = as_rewards([[reward] for *_, reward in earned]).reshape(len(earned), 1)
    of_groups = group_B[torch.tensor([b for b, *_ in earned], dtype=torch.long)]
    found = compute_advantages(rewards, of_groups, replace(spec, reward_weights=None)).advantage_B
    values = [[0.0] * len(turns) for turns in paid]
    for place, (b, k, _) in enumerate(earned):
        values[b][k] = found[place].item()
    for turns in values:
        for k in reversed(range(len(turns) - 1)):
            turns[k] += gamma * turns[k + 1]
    return values


def gae_advantage(reward_BT: Tensor, value_BT: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} − V_t: generalised advantage estimation. Source: arXiv 1506.02438 eq. 16.

    After the last token of a row, which zeros follow, nothing is to come: V is 0 there, for a completion that was cut off too.
    Example: rewards 0 1 of two tokens, values 0.5 0.75, γ = 1, λ = 0.5: δ = 0.25 0.25, advantages 0.375 0.25.
    """
    delta_BT = reward_BT + gamma * torch.nn.functional.pad(value_BT[:, 1:], (0, 1)) - value_BT
    advantage_BT = torch.zeros_like(delta_BT)
    after_B = torch.zeros_like(delta_BT[:, 0]) if delta_BT.numel() else delta_BT.new_zeros(0)
    for t in reversed(range(delta_BT.shape[1])):
        after_B = advantage_BT[:, t] = delta_BT[:, t] + gamma * gae_lambda * after_B
    return advantage_BT


def whitened(x_M: Tensor, eps: float = 1e-8) -> Tensor:
    """(x − mean) / (std + eps) over all of it; 0 where all values are equal. Source: PPO as OpenAI's baselines have it, arXiv 2005.12729."""
    return _standardize(x_M, torch.zeros(len(x_M), dtype=torch.long), 1, eps)


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int] | None:
    """Places of the highest and the lowest of a group's rewards, NaN being none; of equals the first. None where all are equal, or fewer than two."""
    scored = [place for place, reward in enumerate(rewards) if not math.isnan(reward)]
    if not scored:
        return None
    best, worst = max(scored, key=lambda place: rewards[place]), min(scored, key=lambda place: rewards[place])
    high, low = rewards[best], rewards[worst]
    return None if high - low <= _EQUAL * max(abs(high), abs(low)) else (best, worst)


def soft_overlong_penalty(num_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """0 up to max − cache, then linearly down to −1 at max, −1 beyond. Source: DAPO, arXiv 2503.14476 eq. 13."""
    if cache_tokens == 0:
        return 0.0
    return max(-1.0, min(0.0, (max_tokens - cache_tokens - num_tokens) / cache_tokens))
