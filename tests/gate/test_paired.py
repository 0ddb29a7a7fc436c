import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
from numpy.testing import assert_allclose

from posttrain.gate import paired


def test_t_agrees_with_scipy():
    values = np.random.default_rng(0).normal(0.1, 0.4, 77)
    fit = paired.fit_t(values)
    reference = scipy.stats.ttest_1samp(values, 0.03, alternative="greater")
    assert_allclose(fit.p_value(0.03), reference.pvalue, rtol=1e-9)
    assert_allclose(fit.interval(), scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95), rtol=1e-9)
    one_sided = scipy.stats.ttest_1samp(values, 0, alternative="greater").confidence_interval(0.95)
    assert_allclose(fit.lower(0.05), one_sided.low, rtol=1e-9)


def test_clustered_t_agrees_with_statsmodels():
    rng = np.random.default_rng(1)
    clusters = rng.integers(0, 25, 300)
    values = rng.normal(0, 1, 300) + rng.normal(0, 0.5, 25)[clusters]
    ols = sm.OLS(values, np.ones(300)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False}, use_t=True
    )
    fit = paired.fit_t(values, clusters)
    num_clusters = len(np.unique(clusters))
    assert_allclose(fit.se, ols.bse[0] * np.sqrt(num_clusters / (num_clusters - 1)), rtol=1e-9)
    assert fit.df == num_clusters - 1


def test_singleton_clusters_change_nothing():
    values = np.random.default_rng(2).normal(size=40)
    assert paired.fit_t(values, np.arange(40)) == paired.fit_t(values)


def test_clusters_widen_the_interval_when_items_move_together():
    clusters = np.repeat(np.arange(30), 10)
    values = np.random.default_rng(3).normal(size=30)[clusters]
    assert_allclose(paired.fit_t(values, clusters).se / paired.fit_t(values).se, np.sqrt(10), rtol=0.05)


@pytest.mark.parametrize("skewed", [False, True])
def test_bca_agrees_with_scipy(skewed):
    rng = np.random.default_rng(4)
    values = rng.exponential(1, 60) if skewed else rng.normal(0.2, 1, 80)
    ours = paired.fit_bootstrap(values, num_resamples=40_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.95, method="BCa", n_resamples=40_000, rng=np.random.default_rng(5)
    )
    # Two bootstraps of 40,000 resamples: their 2.5 % quantiles differ by about 1 % of the standard error.
    tolerance = 0.05 * values.std() / np.sqrt(len(values))
    assert_allclose(ours.interval(), theirs.confidence_interval, atol=tolerance)


def test_acceleration_is_the_jackknife_skewness():
    """Oracle: leave each value out, one by one."""
    values = np.random.default_rng(6).exponential(1, 35)
    left_out = np.array([np.delete(values, place).mean() for place in range(35)])
    deviations = left_out.mean() - left_out
    expected = np.sum(deviations**3) / (6 * np.sum(deviations**2) ** 1.5)
    assert_allclose(paired.fit_bootstrap(values, num_resamples=100).acceleration, expected, rtol=1e-9)


def test_bootstrap_resamples_whole_clusters():
    clusters = np.repeat(np.arange(40), 8)
    rng = np.random.default_rng(7)
    values = rng.normal(size=40)[clusters] + rng.normal(0, 0.1, 320)
    spread = paired.fit_bootstrap(values, clusters).means.std()
    assert_allclose(spread, paired.fit_t(values, clusters).se, rtol=0.05)


def test_bootstrap_of_unequal_clusters_divides_by_the_items_drawn():
    clusters = np.repeat(np.arange(30), np.arange(1, 31))
    values = np.ones(len(clusters))
    values[clusters == 29] = 2.0
    means = paired.fit_bootstrap(values, clusters).means
    assert means.min() == 1.0
    assert 1.0 < means.max() < 2.0


def test_bootstrap_is_the_same_every_time():
    values = np.random.default_rng(8).normal(size=50)
    assert paired.fit_bootstrap(values).interval() == paired.fit_bootstrap(values).interval()


def test_clustered_type_one_error():
    """50 clusters of 10 with correlation 0.3: the cluster-robust t keeps its level, the naive one does not."""
    rng = np.random.default_rng(9)
    clusters = np.repeat(np.arange(50), 10)
    naive = robust = 0
    for _ in range(1000):
        values = rng.normal(0, np.sqrt(0.3), 50)[clusters] + rng.normal(0, np.sqrt(0.7), 500)
        naive += paired.fit_t(values).p_value(0.0) < 0.05
        robust += paired.fit_t(values, clusters).p_value(0.0) < 0.05
    assert 0.03 < robust / 1000 < 0.07
    assert naive / 1000 > 0.13
