"""How many items a test needs for its margin, and what a number of items can detect."""

from __future__ import annotations

import math
from functools import lru_cache

from posttrain.gate import exact
from posttrain.gate.distributions import normal_quantile

MIN_ITEMS = 30
MIN_CLUSTERS = 20
UNSTATED_GAIN = 0.05
"""Gain that a primary with `min_delta = 0` is planned for: with no margin there is none to detect."""


def assumed_effect(line: float) -> float:
    """True difference a test is planned at: none for a guard, twice `min_delta` for a primary."""
    if line < 0.0:
        return 0.0
    if line == 0.0:
        return UNSTATED_GAIN
    return min(2.0 * line, 1.0) if line < 1.0 else 2.0 * line


@lru_cache(maxsize=256)
def needed_items(line: float, alpha: float, power: float, discordance: float) -> int:
    """Items from which the exact test clears `line` with `power`, when `discordance` of the items differ.

    To a thousandth of it: the power of a discrete test rises in small teeth. Never fewer than a t test needs at this variance:
    with a large effect all discordance would be gains and their variance small, and scores in [0, 1] that are not binary may vary so.
    """
    effect = assumed_effect(line)
    share = max(discordance, effect)
    least = needed_items_for_variance(line, alpha, power, share)
    if share > 1.0 or line <= -1.0:  # not a difference of two rates
        return least

    def clears(n: int) -> bool:
        return exact.power(n, line, alpha, effect, share) >= power

    if clears(least):
        return least
    low, high = least, math.ceil(1.05 * least)
    while not clears(high):
        low, high = high, math.ceil(1.2 * high)
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if clears(middle) else (middle, high)
    return high


def zero_loss_items(margin: float, alpha: float) -> int:
    """Items of which none was lost that exclude losing a share of `margin`: the smallest n with (1 - margin)^n ≤ alpha."""
    return 1 if margin >= 1.0 else math.ceil(math.log(alpha) / math.log1p(-margin))


def needed_items_for_variance(line: float, alpha: float, power: float, variance: float) -> int:
    """The same for a t test of differences with this variance per item."""
    root = (normal_quantile(1.0 - alpha) + normal_quantile(power)) / (assumed_effect(line) - line)
    return max(MIN_ITEMS, math.ceil(root**2 * variance))


def design_effect(num_items: int, num_clusters: int, icc: float) -> float:
    """Factor by which clusters raise the variance, for an assumed correlation within them. Source: Kish 1965."""
    return 1.0 + max(num_items / max(num_clusters, 1) - 1.0, 0.0) * icc


def detectable(num_items: float, alpha: float, power: float, discordance: float) -> float:
    """Smallest distance from the line that `num_items` detect with `power`."""
    return (normal_quantile(1.0 - alpha) + normal_quantile(power)) * math.sqrt(discordance / num_items)
