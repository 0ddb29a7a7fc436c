"""How many items a test needs for its margin, and what a number of items can detect."""

from __future__ import annotations

import math

from posttrain.gate.distributions import normal_quantile
from posttrain.gate.tango import null_bad_rate

MIN_ITEMS = 30
MIN_CLUSTERS = 20
UNSTATED_GAIN = 0.05
"""Gain that a primary with `min_delta = 0` is planned for: with no margin there is none to detect."""


def assumed_effect(line: float) -> float:
    """True difference a test is planned at: none for a guard, twice `min_delta` for a primary."""
    if line < 0.0:
        return 0.0
    return min(2.0 * line, 1.0) if line > 0.0 else UNSTATED_GAIN


def needed_items(line: float, alpha: float, power: float, discordance: float) -> int:
    """Items at which Tango's test clears `line` with `power`, when `discordance` of the items differ.

    Scores in [0, 1] that are not binary vary no more than this, so it holds for them too.
    Source: asymptotic power of a score test; the null variance is Tango's constrained one.
    """
    effect = assumed_effect(line)
    share = max(discordance, effect)
    good, bad = (share + effect) / 2.0, (share - effect) / 2.0
    null_sd = math.sqrt(2.0 * float(null_bad_rate(good, bad, 1.0, line)) + line * (1.0 - line))
    true_sd = math.sqrt(share - effect**2)
    root = (normal_quantile(1.0 - alpha) * null_sd + normal_quantile(power) * true_sd) / (effect - line)
    plain = needed_items_for_variance(line, alpha, power, share)
    # With a large effect all discordance would be gains and their variance small; do not count on it.
    return max(plain, math.ceil(root**2))


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
