"""The published operating characteristics must be those of the rules that decide."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, multinomial

from posttrain.evidence import Verdict
from posttrain.gate import GateSpec, Guard, Primary, decide, exact

PAGE = (Path(__file__).parents[2] / "docs" / "gate.md").read_text()


def gate_at(line):
    return GateSpec(guards=(Guard("heldout", -line),)) if line < 0 else GateSpec(primary=(Primary("heldout", line),))


@pytest.mark.parametrize("line", [-0.2, 0.2, 0.0])
def test_enumerated_verdicts_are_the_verdicts(binary_pair, bench, line):
    """The outcomes of 30 items, but for the rarest, through `decide`, weighed by their probability."""
    n, gain, share = 30, 0.0, 0.3
    expected = dict.fromkeys(Verdict, 0.0)
    for good in range(n + 1):
        for bad in range(n + 1 - good):
            weight = multinomial.pmf(
                (good, bad, n - good - bad), n, [(share + gain) / 2, (share - gain) / 2, 1 - share]
            )
            if weight > 1e-3:
                candidate, baseline = binary_pair(good, bad, n)
                expected[decide(gate_at(line), {"heldout": candidate}, {"heldout": baseline}).verdict] += weight
    rates = bench("enumeration").rates(n, line, 0.05, 0.8, 0.2, gain, share)
    left_out = 1.0 - sum(expected.values())
    assert left_out < 0.05
    assert 0.0 <= rates.passed - expected[Verdict.PASS] <= left_out
    assert 0.0 <= rates.failed - expected[Verdict.FAIL] <= left_out


def test_the_point_rules_ship_by_the_estimate(bench):
    """Two of three shares of four items: P[good - bad ≥ -1] by hand from the binomial."""
    shipped = bench("enumeration").shipped_by_estimate
    assert shipped(4, 0.0, 0.0, 1.0, strict=True) == pytest.approx(binom.sf(2, 4, 0.5))
    assert shipped(4, 0.0, 0.0, 1.0, strict=False) == pytest.approx(binom.sf(1, 4, 0.5))
    assert shipped(4, -0.5, 0.0, 1.0, strict=False) == pytest.approx(binom.sf(0, 4, 0.5))


def published(start, column):
    """A column of the table that begins with `start`, as text."""
    rows = PAGE[PAGE.index(start) :].split("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1:-1][column].strip() for row in rows]


def test_the_published_worst_cases_hold_alpha():
    for column in (1, 2, 3):
        worst = [float(cell.split(" at ")[0]) for cell in published("| n | guard, margin 5 |", column)]
        assert len(worst) == 5 and all(4.5 < size <= 5.0 for size in worst)
    worst = [float(cell) for cell in published("| looks |", 4)]
    assert len(worst) == 5 and all(2.9 < size <= 5.0 for size in worst)


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_published_tables_are_what_the_bench_writes(bench, n):
    tables = bench("operating_characteristics")
    tables.SIZES = (n,)
    for text in (
        tables.worst_table(),
        tables.binary_table(-0.05, {"drop ≤ 5": -0.05, "better": 0.0}, (-0.07, -0.05, 0.0)),
    ):
        assert all(row in PAGE for row in text[2:])


@pytest.mark.slow
def test_the_table_of_repeated_looks_is_what_the_bench_writes(bench):
    looks = bench("looks")
    assert looks.table() in PAGE
    for count in looks.LOOKS:
        point, full, ledger, worst, dev, _ = looks.row(count)
        assert ledger <= worst <= 0.05 and dev <= 0.05
        assert full == pytest.approx(1 - (1 - dev) ** count) and point > 5 * ledger


def test_two_rounds_at_half_of_alpha_stay_within_alpha(bench):
    """60 items and then 60 more, the candidate at the line: the union of the two exact rates, at the worst share."""
    alpha = GateSpec(guards=(Guard("heldout", 0.05),), rounds=2).alpha_at(1)
    firsts = [bench("enumeration").first_passing(n, -0.05, alpha) for n in (60, 120)]
    shares = bench("enumeration").all_shares(-0.05)
    both = sum(exact.probability(first, n, -0.05, shares) for first, n in zip(firsts, (60, 120), strict=True))
    assert 0.03 < np.max(both) <= 0.05
