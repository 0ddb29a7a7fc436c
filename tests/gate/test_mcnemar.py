import pytest
import scipy.stats
from numpy.testing import assert_allclose
from statsmodels.stats.contingency_tables import mcnemar as reference

from posttrain.gate import mcnemar

PAIRS = [(0, 0), (5, 0), (0, 5), (12, 2), (9, 9), (40, 25)]


@pytest.mark.parametrize(("good", "bad"), PAIRS)
def test_p_value_is_the_exact_binomial_tail(good, bad):
    expected = scipy.stats.binomtest(good, good + bad, 0.5, "greater").pvalue if good + bad else 1.0
    assert_allclose(mcnemar.p_value(good, bad), expected, rtol=1e-10)
    two_sided = min(1.0, 2 * min(mcnemar.p_value(good, bad), mcnemar.p_value(bad, good)))
    assert_allclose(two_sided, reference([[50, good], [bad, 50]], exact=True).pvalue, rtol=1e-9)


@pytest.mark.parametrize(("good", "bad"), PAIRS)
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_bound_clears_zero_exactly_when_the_test_rejects(good, bad, alpha):
    assert (mcnemar.lower_bound(good, bad, 100, alpha) > 0) == (mcnemar.p_value(good, bad) < alpha)
