"""Whether answers are as good as they get: by what the library says of its rewards, else by what the run itself has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives.advantages import combine, mean_std
from posttrain.rewards.library import REWARDS
from posttrain.rollout.experience import Bounds

_TINY = 1e-9


def stated_bounds(specs: list[str]) -> Bounds:
    """What is known of the rewards before a run: the bounds of those from the library."""
    return tuple((REWARDS[spec].low, REWARDS[spec].high) if spec in REWARDS else None for spec in specs)


def judging_weights(specs: list[str], weights: list[float]) -> list[float]:
    """The weights, with 0 for the library's penalties: a right answer is right however long it is."""
    penalty = [spec in REWARDS and REWARDS[spec].high <= 0 for spec in specs]
    return weights if all(penalty) else [0.0 if is_one else w for w, is_one in zip(weights, penalty, strict=True)]


def widened(bounds: Bounds, rewards_BK: Tensor) -> Bounds:
    """The bounds with these rewards taken in. Shapes: [B, K], NaN where unscored."""
    result: list[tuple[float, float] | None] = []
    for known, column_B in zip(bounds, rewards_BK.unbind(1), strict=True):
        values = column_B[~column_B.isnan()].tolist()
        values += [] if known is None else known
        result.append((min(values), max(values)) if values else None)
    return tuple(result)


def shares(rewards_BK: Tensor, group_B: Tensor, bounds: Bounds, weights: list[float]) -> dict[str, float]:
    """Of the groups with a score the shares that are all right, and all equal without being right.

    Right is at the best of every function that weighs something. While none of them has ever differed nothing is known to be right.
    """
    num_groups = int(group_B.max()) + 1 if group_B.numel() else 0
    value_B = combine(rewards_BK, torch.tensor(weights, dtype=torch.float64))
    count_P, _, std_P = mean_std(value_B, group_B, num_groups)
    below_B = ~_is_best(rewards_BK, bounds, weights) & ~value_B.isnan()
    below_P = torch.zeros(num_groups).index_add(0, group_B, below_B.float())
    right_P = (below_P == 0) & (count_P > 0)
    wrong_P = (std_P == 0) & (count_P > 0) & ~right_P
    return {
        "frac_reward_all_right": float(right_P.double().mean()),
        "frac_reward_all_wrong": float(wrong_P.double().mean()),
    }


def _is_best(rewards_BK: Tensor, bounds: Bounds, weights: list[float]) -> Tensor:
    """Per completion whether each of its scored functions is at its best. Shapes: [B, K] → [B] bool."""
    best_B = torch.zeros(len(rewards_BK), dtype=torch.bool)
    if not any(w and known and known[0] < known[1] for known, w in zip(bounds, weights, strict=True)):
        return best_B
    best_B = ~best_B
    for column_B, known, weight in zip(rewards_BK.unbind(1), bounds, weights, strict=True):
        if weight and known is not None:
            low, high = known
            room = _TINY * max(1.0, abs(low), abs(high))
            at_best_B = column_B >= high - room if weight > 0 else column_B <= low + room
            best_B &= at_best_B | column_B.isnan()
    return best_B
