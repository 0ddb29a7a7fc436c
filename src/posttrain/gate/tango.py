"""Tango's score for the difference of two paired proportions, and its bound: what orders the outcomes of the exact test.

Counts: `good` items only the candidate got right, `bad` items only the baseline got right, `n` all items. Every
function broadcasts over arrays. Source: Tango, Statistics in Medicine 17 (1998) 891-908.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from posttrain.gate.distributions import Floats, normal_quantile

_BISECTIONS = 60


def null_bad_rate(good: npt.ArrayLike, bad: npt.ArrayLike, n: npt.ArrayLike, delta: npt.ArrayLike) -> Floats:
    """Maximum-likelihood rate of `bad` items when the true difference is `delta`. Source: Tango eq. 4."""
    g, b, n_, d = (np.asarray(value, dtype=np.float64) for value in (good, bad, n, delta))
    B = -g - b + (2.0 * n_ - g + b) * d
    C = -b * d * (1.0 - d)
    root = np.sqrt(np.maximum(B * B - 8.0 * n_ * C, 0.0))
    return np.asarray((root - B) / (4.0 * n_), dtype=np.float64)


def score_z(good: npt.ArrayLike, bad: npt.ArrayLike, n: npt.ArrayLike, delta: npt.ArrayLike) -> Floats:
    """Score statistic of H0: difference = delta; large means the difference is larger. Falls as delta rises."""
    g, b, n_, d = (np.asarray(value, dtype=np.float64) for value in (good, bad, n, delta))
    distance = g - b - n_ * d
    variance = np.maximum(n_ * (2.0 * null_bad_rate(g, b, n_, d) + d * (1.0 - d)), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = distance / np.sqrt(variance)
    return np.where(np.isnan(z), 0.0, z)


def lower_bound(good: npt.ArrayLike, bad: npt.ArrayLike, n: npt.ArrayLike, alpha: float) -> Floats:
    """One-sided 1 - alpha lower bound of the difference: the delta whose score is the normal quantile."""
    g, b, n_ = (np.asarray(value, dtype=np.float64) for value in (good, bad, n))
    critical = normal_quantile(1.0 - alpha)
    high: Floats = np.asarray((g - b) / n_, dtype=np.float64)
    low: Floats = np.full_like(high, -1.0)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        rejected = score_z(g, b, n_, middle) > critical
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return low
