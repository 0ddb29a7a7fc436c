"""The scored groups of one generation batch, and what their rewards say, whichever way they were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from posttrain.config.rl import RewardedKeys
from posttrain.objectives.advantages import as_rewards
from posttrain.protocols import Ranks
from posttrain.recipes.experience.reward_range import judging_weights, shares, widened
from posttrain.rollout.experience import Bounds
from posttrain.types import Rollout, RolloutGroup

Numbered = tuple[int, RolloutGroup]
"""A group with the number of its prompt in the run."""


@dataclass(slots=True)
class Sampled:
    """This rank's groups, and what holds for all ranks. `let_go` were sampled and are not trained on."""

    reward_bounds: Bounds
    kept: list[Numbered] = field(default_factory=list[Numbered])
    let_go: list[Numbered] = field(default_factory=list[Numbered])
    shares: dict[str, float] = field(default_factory=dict[str, float])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    issued: list[int] = field(default_factory=list[int])
    passed_over: list[int] = field(default_factory=list[int])
    rounds: int = 0
    next_prompt: int = 0

    @property
    def of_this_rank(self) -> list[Numbered]:
        return self.kept + self.let_go

    def judge(self, bounds: Bounds, keys: RewardedKeys, ranks: Ranks) -> None:
        """What the rewards say of all that was sampled, on all ranks, whether it is kept or not; `bounds` are those before it."""
        mine = [[reward_parts(rollout) for rollout in group.rollouts] for _, group in self.of_this_rank]
        groups = [group for rank in ranks.gather(mine) for group in rank]
        rewards_BK = as_rewards([row for group in groups for row in group])
        self.reward_bounds = widened(bounds, rewards_BK)
        weights = judging_weights(keys.reward_funcs, list(keys.reward_weights or [1.0] * len(keys.reward_funcs)))
        self.shares = shares(rewards_BK, group_indices([len(group) for group in groups]), self.reward_bounds, weights)


def group_indices(sizes: Sequence[int]) -> torch.Tensor:
    """The group of each completion. Shape: [B] int64."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))


def reward_parts(rollout: Rollout) -> list[float | None]:
    """Reward per function; a completion that could not be scored counts in none of them."""
    parts = list(rollout.reward.parts.values())
    return [None] * len(parts) if rollout.status == "unscored" else parts


def has_spread(group: RolloutGroup) -> bool:
    totals = {round(rollout.reward.total, 9) for rollout in group.rollouts if rollout.reward.total is not None}
    return len(totals) > 1
