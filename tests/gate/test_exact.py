"""The exact test: against plain loops from its definition, and its error rates by enumeration of every outcome."""

import math

import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from posttrain.gate import GateSpec, Primary, exact, tango

COUNTS = [(1, 7, 21), (12, 2, 50), (28, 25, 618), (0, 5, 100), (40, 20, 160), (3, 0, 40), (0, 0, 59), (834, 31, 1000)]


def tail_probability(outcomes, n, delta, share):
    """Trinomial probability of (good, bad) pairs. Source: the definition."""
    cells = [(share + delta) / 2, (share - delta) / 2, 1 - share]
    counts = [(good, bad, n - good - bad) for good, bad in outcomes]
    return float(scipy.stats.multinomial.pmf(counts, n, cells).sum()) if counts else 0.0


@pytest.mark.parametrize(("good", "bad", "n"), [(1, 3, 12), (5, 0, 14), (0, 0, 10), (4, 4, 15)])
@pytest.mark.parametrize("line", [-0.1, 0.0, 0.2])
def test_the_p_value_is_the_worst_tail_over_the_plausible_shares(good, bad, n, line):
    """Oracle: every outcome in Tango's order, a dense grid of the shares in the Clopper-Pearson interval, plus gamma."""
    alpha, gamma = 0.05, 0.0005

    def bound(g, b):
        return float(tango.lower_bound(g, b, n, alpha))

    better = [(g, b) for g in range(n + 1) for b in range(n + 1 - g) if bound(g, b) >= bound(good, bad) - 1e-9]
    differing = good + bad
    low = scipy.stats.beta.ppf(gamma / 2, differing, n - differing + 1) if differing else 0.0
    high = scipy.stats.beta.ppf(1 - gamma / 2, differing + 1, n - differing)
    shares = np.linspace(max(low, abs(line), 1e-9), max(high, abs(line)), 800)
    worst = max(tail_probability(better, n, line, share) for share in shares)
    assert_allclose(exact.p_value(good, bad, n, line, alpha), min(1.0, worst + gamma), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("delta", [-0.3, -0.05, 0.0, 0.1])
def test_probability_of_a_tail_is_the_sum_over_its_outcomes(delta):
    n = 25
    first = np.array([min(m + 1, math.ceil(m / 2) + 1) for m in range(n + 1)])
    outcomes = [(g, m - g) for m in range(n + 1) for g in range(first[m], m + 1)]
    shares = np.array([abs(delta) + 1e-12, 0.35, 0.8, 1.0])
    expected = [tail_probability(outcomes, n, delta, share) for share in shares]
    assert_allclose(exact.probability(first, n, delta, shares), expected, atol=1e-12)


@pytest.mark.parametrize(("good", "bad", "n"), COUNTS)
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_bound_and_p_value_say_the_same(good, bad, n, alpha):
    bound = exact.lower_bound(good, bad, n, alpha)
    assert -1.0 <= bound <= (good - bad) / n
    for line in (-0.3, -0.05, 0.0, 0.05, bound - 1e-6, bound + 1e-6):
        assert (exact.p_value(good, bad, n, line, alpha) <= alpha) is (line <= bound)


@pytest.mark.parametrize(("good", "bad", "n"), COUNTS)
def test_the_interval_holds_the_estimate_mirrors_and_is_near_tangos(good, bad, n):
    low, high = exact.interval(good, bad, n)
    assert low <= (good - bad) / n <= high
    assert_allclose(exact.interval(bad, good, n), (-high, -low), atol=1e-9)
    assert low <= exact.lower_bound(good, bad, n, 0.05)
    assert_allclose(low, float(tango.lower_bound(good, bad, n, 0.025)), atol=0.5 / n + 0.015)


def test_zero_lost_items_exclude_five_points_from_59_on():
    """0.95^59 = 0.0485 and 0.95^58 = 0.0510."""
    assert exact.lower_bound(0, 0, 59, 0.05) > -0.05 > exact.lower_bound(0, 0, 58, 0.05)


def test_one_more_good_or_one_less_bad_never_lowers_the_bound_of_the_same_number_of_differing_items():
    for differing in (3, 11, 30):
        bounds = [exact.lower_bound(good, differing - good, 60, 0.05) for good in range(differing + 1)]
        assert bounds == sorted(bounds)


# --- error rates, by enumeration of every outcome at every share ---

SIZES = [30, 59, 60, 100, *(pytest.param(n, marks=pytest.mark.slow) for n in (250, 507, 1000, 2000))]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("line", [-0.1, -0.05, 0.0, 0.05])
def test_no_share_of_differing_items_ships_falsely_more_often_than_alpha(bench, n, line):
    for alpha in (0.05, GateSpec(primary=(Primary("a"),), spend=True).alpha_at(10)):
        size, share = bench("enumeration").worst_size(n, line, alpha)
        assert 0.7 * alpha < size <= alpha, (alpha, share)


@pytest.mark.parametrize("n", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_ten_looks_together_hold_alpha_whatever_their_correlation(bench, n):
    """The union bound over the exact worst size of each look."""
    spec = GateSpec(primary=(Primary("a"),), spend=True)
    sizes = [bench("enumeration").worst_size(n, -0.05, spec.alpha_at(look))[0] for look in range(1, 11)]
    assert 0.04 < sum(sizes) <= 0.05


@pytest.mark.parametrize("delta", [-0.9, 0.0, *(pytest.param(delta, marks=pytest.mark.slow) for delta in (-0.1, 0.3))])
def test_the_interval_covers_as_often_as_it_says(delta):
    n, level = 40, 0.95
    shares = np.linspace(max(abs(delta), 1e-6), 1.0, 300)
    missed = np.zeros(len(shares))
    for good in range(n + 1):
        for bad in range(n + 1 - good):
            above = exact.p_value(good, bad, n, delta, (1 - level) / 2) <= (1 - level) / 2
            below = exact.p_value(bad, good, n, -delta, (1 - level) / 2) <= (1 - level) / 2
            if above or below:
                missed += outcome_probability(good, bad, n, delta)(shares)
    assert missed.max() <= 1 - level


def outcome_probability(good, bad, n, delta):
    """Trinomial probability of one outcome as a function of the share."""
    ways = math.comb(n, good) * math.comb(n - good, bad)
    return lambda share: (
        ways * ((share + delta) / 2) ** good * ((share - delta) / 2) ** bad * (1 - share) ** (n - good - bad)
    )


def test_the_score_with_the_normal_quantile_would_not_hold_alpha():
    """Why the exact test: Tango's own size at 60 items and a gain of 5 points is 8.8 % where almost all differ one way."""
    n, line, critical = 60, 0.05, scipy.stats.norm.ppf(0.95)
    outcomes = [(g, b) for g in range(n + 1) for b in range(n + 1 - g) if tango.score_z(g, b, n, line) > critical]
    assert tail_probability(outcomes, n, line, 0.0749) == pytest.approx(0.088, abs=1e-3)


@pytest.mark.parametrize(
    ("n", "line", "share"), [(60, -0.1, 0.1), (134, -0.1, 0.2), (274, -0.05, 0.1), (400, 0.0, 0.2)]
)
def test_power_is_that_of_the_test_itself(bench, n, line, share):
    """One critical value stands for those of all numbers of differing items: against the enumeration, to half a point."""
    effect = 0.05 if line == 0.0 else 0.0
    enumerated = exact.probability(bench("enumeration").first_passing(n, line, 0.05), n, effect, np.array([share]))
    assert_allclose(exact.power(n, line, 0.05, effect, share), enumerated[0], atol=0.005)


def test_numbers_that_are_left_out_of_the_sum_change_nothing(monkeypatch):
    """At 40,000 items: each difference of rates on both sides of the one seen, and one far away."""
    n, good, bad = 40_000, 4_400, 3_600
    tail = exact._tail(good, bad, n, 0.05)
    for delta in (-0.3, -0.01, 0.0, 0.015, 0.02, 0.025):
        shares = exact._shares(n, delta, tail.low, tail.high)[::7]
        left_out = exact.probability(tail.first_M, n, delta, shares)
        monkeypatch.setattr(exact, "_LEAST_LEFT_OUT", n + 1)
        whole = exact.probability(tail.first_M, n, delta, shares)
        monkeypatch.undo()
        assert_allclose(left_out, whole, rtol=1e-9, atol=1e-13)


def test_what_a_bound_sums_grows_slower_than_the_items(monkeypatch):
    """Numbers of differing items looked at, at the shares that are plausible: as the root of the items, not as the items."""
    summed, original = {}, exact._probability

    def counting(first_M, *rest):
        summed[n] = summed.get(n, 0) + len(first_M)
        return original(first_M, *rest)

    monkeypatch.setattr(exact, "_probability", counting)
    for n in (30_000, 120_000):
        exact._tail(n // 5, n // 5 - 300, n, 0.05).p_value(0.0)
    assert summed[120_000] < 2.5 * summed[30_000] < 2.5 * 30_000
