"""Paired t and BCa bootstrap for the mean of per-item differences, with clusters or without."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from posttrain.gate.distributions import Floats, Ints, normal_cdf, normal_quantile, t_cdf, t_quantile

NUM_RESAMPLES = 10_000
SEED = 20_240_229
_CHUNK_DRAWS = 1 << 21


@dataclass(frozen=True, slots=True)
class TFit:
    """Mean, its standard error and the degrees of freedom of its t."""

    mean: float
    se: float
    df: int

    def lower(self, alpha: float) -> float:
        """One-sided 1 - alpha lower bound."""
        return self.mean - t_quantile(1.0 - alpha, self.df) * self.se

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        half = t_quantile((1.0 + level) / 2.0, self.df) * self.se
        return self.mean - half, self.mean + half

    def p_value(self, line: float) -> float:
        """One-sided p of H0: mean ≤ line."""
        if self.se == 0.0:
            return 0.0 if self.mean > line else 1.0
        return 1.0 - t_cdf((self.mean - line) / self.se, self.df)


def cluster_sums(values: Floats, clusters: Ints | None) -> tuple[Floats, Floats]:
    """Sum and number of items of each cluster; without clusters every item is its own."""
    if clusters is None:
        return values, np.ones_like(values)
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.asarray(np.bincount(index, weights=values), dtype=np.float64)
    return sums, np.bincount(index).astype(np.float64)


def fit_t(values: Floats, clusters: Ints | None = None) -> TFit:
    """Paired t of differences; with clusters, G - 1 degrees of freedom and the cluster-robust standard error.

    Source: Miller, arXiv 2411.00640 eq. 4; differs: small-sample factor G / (G - 1).
    """
    sums, sizes = cluster_sums(values, clusters)
    num_clusters, num_items = len(sums), float(sizes.sum())
    mean = float(sums.sum() / num_items)
    residuals = sums - sizes * mean
    variance = num_clusters / (num_clusters - 1) * float(np.sum(residuals**2))
    return TFit(mean, math.sqrt(variance) / num_items, num_clusters - 1)


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Sorted resampled means with BCa's two corrections."""

    means: Floats
    bias: float
    acceleration: float

    def quantile(self, p: float) -> float:
        """BCa-corrected p-quantile. Source: Efron 1987, eq. 3.9 and 3.10."""
        z = self.bias + normal_quantile(p)
        corrected = normal_cdf(self.bias + z / (1.0 - self.acceleration * z))
        return float(np.quantile(self.means, corrected))

    def lower(self, alpha: float) -> float:
        return self.quantile(alpha)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        return self.quantile((1.0 - level) / 2.0), self.quantile((1.0 + level) / 2.0)


def fit_bootstrap(values: Floats, clusters: Ints | None = None, num_resamples: int = NUM_RESAMPLES) -> Bootstrap:
    """Resample items, or whole clusters where there are any. The seed is fixed, so a verdict can be recomputed."""
    sums, sizes = cluster_sums(values, clusters)
    means = np.sort(_resampled_means(sums, sizes, num_resamples))
    mean = sums.sum() / sizes.sum()
    # Means equal up to rounding are ties; each counts half on either side.
    slack = 1e-12 * max(1.0, abs(float(mean)))
    below = float(np.sum(means < mean - slack))
    not_above = float(np.sum(means <= mean + slack))
    share = min(max((below + not_above) / (2.0 * num_resamples), 0.5 / num_resamples), 1.0 - 0.5 / num_resamples)
    return Bootstrap(means, normal_quantile(share), _acceleration(sums, sizes))


def _resampled_means(sums: Floats, sizes: Floats, num_resamples: int) -> Floats:
    rng = np.random.default_rng(SEED)
    num_clusters = len(sums)
    rows = max(1, _CHUNK_DRAWS // num_clusters)
    equal_sizes = float(np.ptp(sizes)) == 0.0
    chunks: list[Floats] = []
    for start in range(0, num_resamples, rows):
        draws = rng.integers(0, num_clusters, size=(min(rows, num_resamples - start), num_clusters), dtype=np.int32)
        totals = sums[draws].sum(axis=1)
        counts = num_clusters * sizes[0] if equal_sizes else sizes[draws].sum(axis=1)
        chunks.append(np.asarray(totals / counts, dtype=np.float64))
    return np.concatenate(chunks)


def _acceleration(sums: Floats, sizes: Floats) -> float:
    """Skewness of the jackknifed means, over six."""
    left_out = (sums.sum() - sums) / (sizes.sum() - sizes)
    deviations = left_out.mean() - left_out
    spread = float(np.sum(deviations**2)) ** 1.5
    return 0.0 if spread == 0.0 else float(np.sum(deviations**3)) / (6.0 * spread)
