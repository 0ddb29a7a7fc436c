"""The statistical tests of a gate, each a row of one table: pairs in, interval and bound out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from posttrain.gate import exact
from posttrain.gate.paired import fit_bootstrap, fit_t
from posttrain.gate.pairing import PairedItems
from posttrain.gate.power import needed_items, needed_items_for_variance


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a test found. `spread` is the variance of the mean times the number of items (clusters included)."""

    low: float
    high: float
    bound: float
    p_value: float
    spread: float


_DECIMALS = 10
_UNKNOWN = Measurement(math.nan, math.nan, math.nan, math.nan, math.nan)
"""All differences (or all clusters' means) are equal: nothing says how much they vary."""
_NO_SPREAD = 1e-12


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table. `needed(line, alpha, power, discordance, spread)` is the number of items it plans with."""

    name: str
    measure: Callable[[PairedItems, float, float], Measurement]
    needed: Callable[[float, float, float, float, float], int]


def _exact(pairs: PairedItems, line: float, alpha: float) -> Measurement:
    good, bad = pairs.discordant
    n = len(pairs.differences)
    low, high = exact.interval(good, bad, n)
    bound = exact.lower_bound(good, bad, n, alpha)
    return Measurement(low, high, bound, exact.p_value(good, bad, n, line, alpha), (good + bad) / n)


def _t_and_bootstrap(pairs: PairedItems, line: float, alpha: float) -> Measurement:
    """Both must clear, so the bound is the smaller of the two and the interval the wider."""
    values = pairs.differences
    if pairs.num_clusters < 2 or float(np.ptp(values)) == 0.0:
        return _UNKNOWN
    fit = fit_t(values, pairs.clusters)
    if fit.se < _NO_SPREAD:
        return _UNKNOWN
    bootstrap = fit_bootstrap(values, pairs.clusters)
    lows, highs = zip(fit.interval(), bootstrap.interval(), strict=True)
    bound = min(fit.lower(alpha), bootstrap.lower(alpha))
    return Measurement(min(lows), max(highs), bound, fit.p_value(line), fit.se**2 * len(values))


def _needed_binary(line: float, alpha: float, power: float, discordance: float, spread: float) -> int:
    return needed_items(line, alpha, power, max(discordance, spread))


def _needed_t(line: float, alpha: float, power: float, discordance: float, spread: float) -> int:
    return needed_items_for_variance(line, alpha, power, max(discordance, spread))


EXACT = Method("exact", _exact, _needed_binary)
PAIRED = Method("paired t + BCa", _t_and_bootstrap, _needed_t)
CLUSTERED = Method("clustered t + BCa", _t_and_bootstrap, _needed_t)


def measure(method: Method, pairs: PairedItems, line: float, alpha: float) -> Measurement:
    """Rounded to ten decimals, so that another machine's order of summation does not change the record."""
    found = method.measure(pairs, line, alpha)
    return Measurement(*(round(getattr(found, name), _DECIMALS) for name in Measurement.__slots__))


def choose(pairs: PairedItems) -> Method:
    """Binary, one sample, unclustered: the exact test; anything else t and bootstrap."""
    if pairs.clusters is not None:
        return CLUSTERED
    return EXACT if pairs.binary else PAIRED
