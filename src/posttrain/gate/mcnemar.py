"""The exact McNemar test: is the candidate better at all? Only the discordant items say."""

from __future__ import annotations

from posttrain.gate.distributions import binomial_at_least, binomial_lower


def p_value(good: int, bad: int) -> float:
    """One-sided P[Bin(good + bad, 1/2) ≥ good]."""
    return binomial_at_least(good, good + bad, 0.5)


def lower_bound(good: int, bad: int, n: int, alpha: float) -> float:
    """Lower bound of the difference given the number of discordant items; above 0 exactly when `p_value` < alpha.

    The Clopper-Pearson bound of good / (good + bad), mapped to a difference of rates.
    """
    discordant = good + bad
    return (2.0 * binomial_lower(good, discordant, alpha) - 1.0) * discordant / n
