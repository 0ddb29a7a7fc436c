import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from numpy.testing import assert_allclose

from posttrain.gate import tango


def interval(good, bad, n, level=0.95):
    """Two-sided, from the two one-sided bounds."""
    tail = (1 - level) / 2
    return tango.lower_bound(good, bad, n, tail), -tango.lower_bound(bad, good, n, tail)


COUNTS = [(1, 7, 21), (12, 2, 50), (28, 25, 618), (0, 5, 100), (40, 20, 160), (3, 0, 40)]


@pytest.mark.parametrize(
    ("good", "bad", "n", "level", "low", "high"),
    [
        # Fagerland, Lydersen, Laake (2014), airway hyper-responsiveness, cells (1, 1, 7, 12).
        (1, 7, 21, 0.95, -0.517, -0.026),
        # R, PropCIs::scoreci.mp(25, 28, 618, 0.90).
        (28, 25, 618, 0.90, -0.0148, 0.0247),
    ],
)
def test_published_intervals(good, bad, n, level, low, high):
    got = interval(good, bad, n, level)
    digits = 3 if n == 21 else 4
    assert (round(float(got[0]), digits), round(float(got[1]), digits)) == (low, high)


@pytest.mark.parametrize(("good", "bad", "n"), COUNTS)
@pytest.mark.parametrize("delta", [-0.3, -0.05, 0.0, 0.04, 0.25])
def test_null_rate_maximises_the_constrained_likelihood(good, bad, n, delta):
    """Oracle: maximise the trinomial likelihood with p_good - p_bad = delta numerically."""

    def minus_log_likelihood(p_bad):
        p_good = p_bad + delta
        rest = 1 - p_bad - p_good
        terms = [(good, p_good), (bad, p_bad), (n - good - bad, rest)]
        return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

    bounds = (max(0.0, -delta), (1 - delta) / 2)
    best = scipy.optimize.minimize_scalar(
        minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-10}
    )
    got = float(tango.null_bad_rate(good, bad, n, delta))
    assert_allclose(got, best.x, atol=1e-6)
    variance = (2 * got + delta * (1 - delta)) / n
    assert_allclose(
        float(tango.score_z(good, bad, n, delta)), ((good - bad) / n - delta) / math.sqrt(variance), rtol=1e-9
    )


@pytest.mark.parametrize(("good", "bad", "n"), COUNTS)
def test_interval_inverts_the_test(good, bad, n):
    low, high = interval(good, bad, n)
    assert_allclose(float(tango.score_z(good, bad, n, low)), 1.959964, atol=1e-5)
    assert_allclose(float(tango.score_z(good, bad, n, high)), -1.959964, atol=1e-5)
    assert_allclose(float(tango.score_z(good, bad, n, tango.lower_bound(good, bad, n, 0.05))), 1.644854, atol=1e-5)
    deltas = np.linspace(-0.99, 0.99, 199)
    assert np.all(np.diff(tango.score_z(good, bad, n, deltas)) < 0)


@pytest.mark.parametrize(("good", "bad", "n"), COUNTS)
def test_intervals_are_the_roots_of_the_quartic(good, bad, n):
    """Oracle: the non-iterative form. Source: Yang, Sun, Hardin, Statistics in Medicine 32 (2013) 1336-1342."""
    g = scipy.stats.norm.ppf(0.975) ** 2
    d, s = good - bad, good + bad
    coefficients = [
        n**2 * (n / g + 1) ** 2,
        -n * d * (n / g + 1) * (4 * n / g + 1),
        2 * n * d**2 * (3 * n / g + 2) / g - n**2 * (s / g + 1),
        n * d * (2 * s / g + 1) - d**3 * (4 * n / g + 1) / g,
        d**2 * (d**2 / g - s) / g,
    ]
    roots = np.roots(coefficients)
    real = np.sort(roots[np.abs(roots.imag) < 1e-6].real)
    for limit in interval(good, bad, n):
        assert np.min(np.abs(real - float(limit))) < 1e-6


def test_zero_discordance_is_evidence():
    """z = sqrt(n m / (1 - m)), so 5 points are excluded from 52 items on, not from 51."""
    assert_allclose(float(tango.score_z(0, 0, 100, -0.05)), math.sqrt(100 * 0.05 / 0.95))
    assert float(tango.lower_bound(0, 0, 52, 0.05)) > -0.05 > float(tango.lower_bound(0, 0, 51, 0.05))


def test_swapping_the_models_mirrors_the_interval():
    low, high = interval(12, 2, 50)
    assert_allclose(interval(2, 12, 50), (-high, -low), atol=1e-12)


def test_without_a_margin_it_is_the_mcnemar_statistic():
    assert_allclose(float(tango.score_z(12, 2, 50, 0.0)), 10 / math.sqrt(14))


def test_all_items_gained_or_lost_stay_within_the_range():
    assert -1 <= float(interval(30, 0, 30)[0]) <= float(interval(30, 0, 30)[1]) <= 1
    assert float(tango.lower_bound(0, 30, 30, 0.05)) == -1.0
