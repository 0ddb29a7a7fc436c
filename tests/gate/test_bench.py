"""The published operating characteristics must be those of the rules that decide."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from posttrain.evidence import Verdict
from posttrain.gate import GateSpec, Guard, Primary, decide, tango
from posttrain.gate.distributions import normal_quantile

ROOT = Path(__file__).parents[2]
COUNTS = [(2, 4, 100), (0, 9, 100), (20, 25, 500), (30, 75, 500), (120, 130, 600), (40, 41, 300), (60, 10, 400)]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / "gate" / f"{name}.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    return bench


@pytest.mark.parametrize("line", [-0.05, 0.05, 0.0])
def test_simulated_rules_are_the_rules(binary_pair, line):
    bench = load("operating_characteristics")
    gate = GateSpec(guards=(Guard("heldout", -line),)) if line < 0 else GateSpec(primary=(Primary("heldout", line),))
    for good, bad, n in COUNTS:
        passed, failed = bench.outcomes(np.array([good]), np.array([bad]), n, line)
        candidate, baseline = binary_pair(good, bad, n)
        verdict = decide(gate, {"heldout": candidate}, {"heldout": baseline}).verdict
        assert (bool(passed[0]), bool(failed[0])) == (verdict is Verdict.PASS, verdict is Verdict.FAIL)


def test_the_table_of_repeated_looks_is_what_the_bench_writes_and_the_ledger_holds_alpha():
    bench = load("looks")
    page = (ROOT / "docs" / "gate.md").read_text()
    text = bench.table()
    assert text in page
    rows = [[float(cell) for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    three_errors = 100 * 3 * (0.05 * 0.95 / bench.NUM_TRIALS) ** 0.5
    for looks, point, full, ledger, dev, _ in rows:
        assert max(ledger, dev) <= 5.0 + three_errors
        assert full == pytest.approx(100 * (1 - 0.95**looks), abs=1.0)
        assert point > 10 * ledger


def test_the_looks_are_judged_by_the_rules(binary_pair):
    """A score above the quantile is a bound above the line."""
    bench = load("looks")
    gate = GateSpec(guards=(Guard("heldout", bench.MARGIN),))
    for good, bad in ((90, 110), (75, 125), (88, 112), (70, 150)):
        candidate, baseline = binary_pair(good, bad, bench.NUM_ITEMS)
        verdict = decide(gate, {"heldout": candidate}, {"heldout": baseline}).verdict
        assert bool(bench.passes(np.array(good), np.array(bad), 0.05)) is (verdict is Verdict.PASS)


def test_two_rounds_at_half_of_alpha_stay_within_alpha():
    """A candidate at the line, 500 items and then 500 more, 20,000 times."""
    spec = GateSpec(guards=(Guard("heldout", 0.05),), rounds=2)
    rng = np.random.default_rng(0)
    rates = [(0.2 - 0.05) / 2, (0.2 + 0.05) / 2, 0.8]
    first, more = (rng.multinomial(500, rates, size=20_000) for _ in range(2))
    critical = normal_quantile(1 - spec.alpha_at(1))
    both = first + more
    early = tango.score_z(first[:, 0], first[:, 1], 500, -0.05) > critical
    late = tango.score_z(both[:, 0], both[:, 1], 1000, -0.05) > critical
    assert 0.03 < (early | late).mean() <= 0.05 + 3 * (0.05 * 0.95 / 20_000) ** 0.5
