import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from posttrain.gate import distributions as ours

PROBABILITIES = [1e-6, 0.01, 0.05, 0.3, 0.5, 0.8, 0.975, 0.9999]


@pytest.mark.parametrize("df", [1, 2, 5, 29, 999, 20_000])
def test_t_agrees_with_scipy(df):
    points = [-30.0, -2.0, -0.1, 0.0, 0.5, 3.0, 12.0]
    assert_allclose([ours.t_cdf(t, df) for t in points], scipy.stats.t.cdf(points, df), rtol=1e-9, atol=1e-13)
    expected = scipy.stats.t.ppf(PROBABILITIES, df)
    assert_allclose([ours.t_quantile(p, df) for p in PROBABILITIES], expected, rtol=1e-7, atol=1e-10)


def test_normal_agrees_with_scipy():
    assert_allclose(
        [ours.normal_quantile(p) for p in PROBABILITIES], scipy.stats.norm.ppf(PROBABILITIES), rtol=1e-9, atol=1e-12
    )
    assert_allclose(
        [ours.normal_cdf(z) for z in (-8.0, -1.0, 0.0, 2.5)], scipy.stats.norm.cdf([-8.0, -1.0, 0.0, 2.5]), rtol=1e-12
    )


def test_beta_agrees_with_scipy():
    rng = np.random.default_rng(0)
    for x, a, b in zip(rng.random(200), 10 ** rng.uniform(-0.5, 3, 200), 10 ** rng.uniform(-0.5, 3, 200), strict=True):
        assert_allclose(ours.beta_cdf(x, a, b), scipy.stats.beta.cdf(x, a, b), rtol=1e-9, atol=1e-14)
    assert ours.beta_cdf(0.0, 2, 3) == 0.0
    assert ours.beta_cdf(1.0, 2, 3) == 1.0


def test_binomial_tail_and_exact_bounds_agree_with_scipy():
    for k, n in [(0, 10), (1, 10), (5, 10), (10, 10), (61, 100)]:
        assert_allclose(ours.binomial_at_least(k, n, 0.5), scipy.stats.binom.sf(k - 1, n, 0.5), rtol=1e-10)
        exact = scipy.stats.binomtest(k, n).proportion_ci(0.9, "exact")
        assert_allclose(ours.binomial_lower(k, n, 0.05), exact.low, atol=1e-9)
        assert_allclose(ours.binomial_upper(k, n, 0.05), exact.high, atol=1e-9)
    assert ours.binomial_at_least(11, 10, 0.5) == 0.0
