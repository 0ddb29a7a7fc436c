"""Every outcome of an exact test at one line: what passes, what fails, and with which probability. No simulation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.stats import binom

from posttrain.gate import exact
from posttrain.gate.power import needed_items

LEVEL = 0.95


@lru_cache(maxsize=64)
def first_passing(n: int, line: float, alpha: float) -> np.ndarray:
    """For each number of differing items, the smallest `good` whose p-value is at most alpha (one more than all if none)."""
    first, good = np.empty(n + 1, dtype=np.int64), 0
    for differing in range(n + 1):
        while good > 0 and _passes(good - 1, differing, n, line, alpha):
            good -= 1
        while good <= differing and not _passes(good, differing, n, line, alpha):
            good += 1
        first[differing] = good
    return first


def _passes(good: int, differing: int, n: int, line: float, alpha: float) -> bool:
    return good <= differing and exact.p_value(good, differing - good, n, line, alpha) <= alpha


def all_shares(delta: float, num: int = 4000) -> np.ndarray:
    """Shares of differing items from the smallest that allows `delta` to all, dense where few events are rare."""
    smallest = max(abs(delta), 1e-6)
    return smallest + (1.0 - smallest) * np.linspace(0.0, 1.0, num) ** 2


def worst_size(n: int, line: float, alpha: float) -> tuple[float, float]:
    """Largest probability of a pass at the line over all shares of differing items, and the share where it is."""
    shares = all_shares(line)
    sizes = exact.probability(first_passing(n, line, alpha), n, line, shares)
    return float(sizes.max()), float(shares[sizes.argmax()])


@dataclass(frozen=True)
class Rates:
    passed: float
    failed: float

    @property
    def inconclusive(self) -> float:
        return max(0.0, 1.0 - self.passed - self.failed)


def rates(n: int, line: float, alpha: float, power: float, assumed: float, gain: float, share: float) -> Rates:
    """Probability of each verdict when the true difference is `gain` and `share` of the items differ. The rules of `decide`."""
    differing = np.arange(n + 1)
    weight, better = binom.pmf(differing, n, share), (share + gain) / (2.0 * share)
    passed = binom.sf(first_passing(n, line, alpha) - 1, differing, better)
    below = binom.sf(first_passing(n, -line, (1.0 - LEVEL) / 2.0) - 1, differing, 1.0 - better)
    enough = differing <= _most_differing_planned_for(n, line, alpha, power, assumed)
    return Rates(
        float(weight @ passed), float(weight @ np.where(enough, 1.0 - passed, np.minimum(below, 1.0 - passed)))
    )


@lru_cache(maxsize=256)
def _most_differing_planned_for(n: int, line: float, alpha: float, power: float, assumed: float) -> int:
    """The largest number of differing items, observed, at which n items are as many as the planned power needs; -1 if none."""
    low, high = -1, n + 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = n >= needed_items(line, alpha, power, max(assumed, middle / n))
        low, high = (middle, high) if enough else (low, middle)
    return low


def shipped_by_estimate(n: int, limit: float, gain: float, share: float, *, strict: bool) -> float:
    """Probability that the estimate is at least `limit` (or, strictly, above it): what a rule on the point ships."""
    differing = np.arange(n + 1)
    least = (differing + n * limit) / 2.0
    good = np.floor(least + 1e-9) + 1 if strict else np.ceil(least - 1e-9)
    return float(binom.pmf(differing, n, share) @ binom.sf(good - 1, differing, (share + gain) / (2.0 * share)))


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def write_between(page: Path, start: str, end: str, text: str) -> None:
    """Replace what stands between two markers of a page."""
    old = page.read_text()
    before, after = old.index(start) + len(start), old.index(end)
    page.write_text(f"{old[:before]}\n\n{text}\n\n{old[after:]}")
