"""The exact unconditional test for the difference of two paired proportions, and its bounds by inversion.

Of `n` items, `good` only the candidate got right and `bad` only the baseline. Given the true difference `delta` of the two
rates, one unknown is left: `share`, on how many items the models differ. Three choices make the test:

- order: an outcome is better than another if Tango's lower bound is higher (Buehler: the exact bound under this order);
- the probability of an outcome at least as good as the one seen is taken at the worst share, never at an estimated one;
- worst among the shares that the number of differing items makes plausible: those outside a 1 - gamma interval are paid for by
  adding gamma (Berger and Boos), a hundredth of alpha.

For one outcome, that probability rises with `delta`; so p-value, bound and interval agree, and no error rate is above alpha
at any share. Source: Tango, Statistics in Medicine 17 (1998) 891-908; Hsueh, Liu, Chen, Biometrics 57 (2001) 478-483;
Berger, Boos, JASA 89 (1994) 1012-1016; Buehler, JASA 52 (1957) 482-493.

Shapes: M numbers of differing items from 0, S shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from posttrain.gate import tango
from posttrain.gate.distributions import Floats, Ints, binomial_lower, binomial_upper, normal_quantile

GAMMA = 0.01
"""Share of alpha that pays for looking at plausible shares only."""
_STEP = 0.1
"""Distance between two shares that are tried, in standard errors: between them the probability moves by far less than gamma."""
_REACH = 10
"""Standard errors of the number of differing items beyond which it is not summed (a probability below 1e-20)."""
_LEAST_LEFT_OUT = 4096
"""Numbers of differing items too low to matter are left out of the sum where there are so many of them."""
_TIE = 1e-9
_TINY = 1e-300
_CHUNK_CELLS = 1 << 20
_BOUND_STEPS, _CRITICAL_STEPS = 36, 14


@dataclass(frozen=True, slots=True)
class Tail:
    """The outcomes at least as good as the one seen, and the shares that are plausible for it.

    `first_M`: for each number of differing items, the smallest `good` that belongs to them.
    """

    n: int
    first_M: Ints
    low: float
    high: float
    gamma: float

    def p_value(self, delta: float) -> float:
        """Largest probability of these outcomes when the difference is `delta`; rises with `delta`."""
        shares_S = _shares(self.n, delta, self.low, self.high)
        return min(1.0, float(probability(self.first_M, self.n, delta, shares_S).max()) + self.gamma)


def p_value(good: int, bad: int, n: int, line: float, alpha: float) -> float:
    """One-sided p of H0: difference ≤ line. At most `alpha` exactly when `lower_bound` is at or above the line.

    `alpha` places the order and the interval of plausible shares; p is never below its hundredth.
    """
    if abs(line) >= 1.0:  # no difference of two rates is there
        return 0.0 if line < 0 else 1.0
    return _tail(good, bad, n, alpha).p_value(line)


@lru_cache(maxsize=1024)
def lower_bound(good: int, bad: int, n: int, alpha: float) -> float:
    """One-sided 1 - alpha lower bound: the largest difference that is excluded."""
    tail = _tail(good, bad, n, alpha)
    low, high = -1.0, (good - bad) / n
    for _ in range(_BOUND_STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if tail.p_value(middle) <= alpha else (low, middle)
    return low


def interval(good: int, bad: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval: both one-sided bounds, each at half of 1 - level."""
    tail = (1.0 - level) / 2.0
    return lower_bound(good, bad, n, tail), -lower_bound(bad, good, n, tail)


def power(n: int, line: float, alpha: float, effect: float, share: float) -> float:
    """Probability that the test clears `line` when the difference is `effect` and `share` of the items differ.

    One critical value, that of the expected number of differing items, stands for those of all numbers near it.
    """
    low, high, gamma = _plausible(round(n * share), n, alpha)
    numbers_M = np.arange(n + 1)
    reach = 4.0 * math.sqrt(share / n)
    below, above = max(line - reach, -1.0), min(line + reach, 1.0)
    for _ in range(_CRITICAL_STEPS):
        middle = 0.5 * (below + above)
        clears = Tail(n, _first(numbers_M, n, middle, alpha), low, high, gamma).p_value(line) <= alpha
        below, above = (below, middle) if clears else (middle, above)
    return float(probability(_first(numbers_M, n, above, alpha), n, effect, np.array([share]))[0])


def probability(first_M: Ints, n: int, delta: float, shares_S: Floats) -> Floats:
    """Probability, at each share, that `good` is at least `first_M[good + bad]`. Shapes: [M], [S] → [S].

    P[good ≥ first | m differ] follows from that of m - 1 by one binomial term, since `first` rises by 0 or 1.
    """
    top = min(n, math.ceil(_top(n, float(shares_S.max()))))
    bottom = max(0, math.floor(n - _top(n, 1.0 - float(shares_S.min()))))
    bottom = bottom if bottom >= _LEAST_LEFT_OUT else 0
    first_M = first_M[bottom : top + 1]
    rises_M = np.diff(first_M)
    assert bool(np.all((rises_M == 0) | (rises_M == 1))), "an outcome with one more good or one less bad must be better"
    parts = math.ceil(len(shares_S) * len(first_M) / _CHUNK_CELLS)
    chunks = np.array_split(shares_S, parts)
    return np.concatenate([_probability(first_M, bottom, rises_M == 0, n, delta, chunk[:, None]) for chunk in chunks])


def _probability(
    first_M: Ints, bottom: int, stays_M: npt.NDArray[np.bool_], n: int, delta: float, share_S1: Floats
) -> Floats:
    """`first_M` begins with that of `bottom` differing items; fewer have no part in the sum."""
    log_good, log_bad = _log((share_S1 + delta) / (2.0 * share_S1)), _log((share_S1 - delta) / (2.0 * share_S1))
    log_factorial = _log_factorials(n)
    numbers_M = bottom + np.arange(len(first_M))
    before_M = numbers_M[:-1]
    # With m + 1 items: the same `first` gains the outcomes one short of it, a `first` one higher loses those just at it.
    good_M = first_M[:-1] - stays_M
    inside_M = (good_M >= 0) & (good_M <= before_M)
    good_M = np.clip(good_M, 0, before_M)
    bad_M = before_M - good_M
    log_term = log_factorial[before_M] - log_factorial[good_M] - log_factorial[bad_M]
    log_term = log_term + good_M * log_good + bad_M * log_bad + np.where(stays_M, log_good, log_bad)
    change = np.where(inside_M, np.where(stays_M, 1.0, -1.0), 0.0) * np.exp(log_term)
    start = _at_least(int(first_M[0]), bottom, log_good, log_bad)
    given_number = np.cumsum(np.concatenate([start, change], axis=1), axis=1)
    log_number = log_factorial[n] - log_factorial[numbers_M] - log_factorial[n - numbers_M]
    log_number = log_number + numbers_M * _log(share_S1) + (n - numbers_M) * _log(1.0 - share_S1)
    return np.asarray(np.sum(np.exp(log_number) * given_number, axis=1), dtype=np.float64)


def _at_least(k: int, m: int, log_good_S1: Floats, log_bad_S1: Floats) -> Floats:
    """P[good ≥ k] of `m` differing items, summed over the numbers within reach of the mean."""
    if k <= 0 or m == 0:
        return np.full((len(log_good_S1), 1), float(k <= 0))
    good_S1 = np.exp(log_good_S1)
    reach = _REACH * (math.sqrt(m) / 2.0 + 1.0)
    low, high = (
        max(k, math.floor(m * float(good_S1.min()) - reach)),
        min(m, math.ceil(m * float(good_S1.max()) + reach)),
    )
    good_K, log_factorial = np.arange(low, high + 1), _log_factorials(m)
    log_term = log_factorial[m] - log_factorial[good_K] - log_factorial[m - good_K]
    log_term = log_term + good_K * log_good_S1 + (m - good_K) * log_bad_S1
    return np.sum(np.exp(log_term), axis=1, keepdims=True)


@lru_cache(maxsize=8)
def _log_factorials(n: int) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def _tail(good: int, bad: int, n: int, alpha: float) -> Tail:
    seen = float(tango.lower_bound(good, bad, n, alpha))
    return Tail(n, _first(np.arange(n + 1), n, seen, alpha), *_plausible(good + bad, n, alpha))


def _first(numbers_M: Ints, n: int, bound: float, alpha: float) -> Ints:
    """Smallest `good` with a Tango bound of at least `bound`; m + 1 where none has. Its score at `bound` says so."""
    critical = normal_quantile(1.0 - alpha) - _TIE
    low, high = np.full_like(numbers_M, -1), numbers_M + 1
    while bool(np.any(high - low > 1)):
        middle = (low + high) // 2
        reached = tango.score_z(middle, numbers_M - middle, n, bound) >= critical
        open_ = high - low > 1
        low, high = np.where(open_ & ~reached, middle, low), np.where(open_ & reached, middle, high)
    return high


@lru_cache(maxsize=1024)
def _plausible(differing: int, n: int, alpha: float) -> tuple[float, float, float]:
    """Clopper-Pearson interval of the share, and the probability gamma that it misses."""
    gamma = GAMMA * alpha
    return binomial_lower(differing, n, gamma / 2.0), binomial_upper(differing, n, gamma / 2.0), gamma


def _shares(n: int, delta: float, low: float, high: float) -> Floats:
    """The plausible shares that allow `delta`, in steps of equal statistical distance (by the Fisher information)."""
    smallest = max(abs(delta), _TIE)
    low, high = max(low, smallest), max(high, smallest)
    # Dense at both ends, where the information has its poles.
    fine = low + (high - low) * (1.0 - np.cos(np.linspace(0.0, math.pi, 513))) / 2.0
    middle = (fine[1:] + fine[:-1]) / 2.0
    information = middle / np.maximum(middle**2 - delta**2, _TINY) + 1.0 / np.maximum(1.0 - middle, _TINY)
    arc: Floats = np.concatenate([np.zeros(1), np.cumsum(np.sqrt(n * information) * np.diff(fine))])
    length = float(arc[-1])
    return np.asarray(np.interp(np.linspace(0.0, length, int(length / _STEP) + 2), arc, fine), dtype=np.float64)


def _top(n: int, share: float) -> float:
    return n * share + _REACH * (math.sqrt(n * share * (1.0 - share)) + 1.0)


def _log(value: Floats) -> Floats:
    return np.log(np.maximum(value, _TINY))
