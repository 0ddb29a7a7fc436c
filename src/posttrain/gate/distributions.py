"""Normal, Student t, binomial and beta: what the tests need and numpy does not have."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_NORMAL = NormalDist()
_TINY = 1e-300
_BISECTIONS = 200


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def normal_quantile(p: float) -> float:
    """Raises: statistics.StatisticsError unless 0 < p < 1."""
    return _NORMAL.inv_cdf(p)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b). Source: Numerical Recipes 3rd ed. 6.4, Lentz's method."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # The continued fraction converges fast only on this side; the other is its complement.
    if x < (a + 1.0) / (a + b + 2.0):
        return math.exp(log_front) * _beta_fraction(x, a, b) / a
    return 1.0 - math.exp(log_front) * _beta_fraction(1.0 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    c, d = 1.0, _reciprocal(1.0 - (a + b) * x / (a + 1.0))
    fraction = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = _reciprocal(1.0 + even * d), _nonzero(1.0 + even / c)
        fraction *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = _reciprocal(1.0 + odd * d), _nonzero(1.0 + odd / c)
        fraction *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return fraction


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _reciprocal(value: float) -> float:
    return 1.0 / _nonzero(value)


def t_cdf(t: float, df: float) -> float:
    """P[T ≤ t] of Student's t."""
    if math.isinf(t):
        return 0.0 if t < 0 else 1.0
    tail = 0.5 * beta_cdf(df / (df + t * t), df / 2.0, 0.5)
    return tail if t < 0 else 1.0 - tail


def t_quantile(p: float, df: float) -> float:
    """The t with `t_cdf(t, df) = p`, for 0 < p < 1."""
    if p < 0.5:
        return -t_quantile(1.0 - p, df)
    high = 1.0
    while t_cdf(high, df) < p:
        high *= 2.0
    low = 0.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
        if high - low <= 1e-13 * high:
            break
    return 0.5 * (low + high)


def binomial_at_least(k: int, n: int, p: float) -> float:
    """P[Bin(n, p) ≥ k]."""
    if k <= 0:
        return 1.0
    return 0.0 if k > n else beta_cdf(p, k, n - k + 1)


def binomial_lower(k: int, n: int, alpha: float) -> float:
    """Clopper-Pearson one-sided 1 - alpha lower bound of a proportion: the p with P[Bin(n, p) ≥ k] = alpha."""
    if k <= 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if binomial_at_least(k, n, middle) < alpha else (low, middle)
    return low


def binomial_upper(k: int, n: int, alpha: float) -> float:
    """Clopper-Pearson one-sided 1 - alpha upper bound of a proportion."""
    return 1.0 - binomial_lower(n - k, n, alpha)
