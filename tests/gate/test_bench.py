"""The published operating characteristics must be those of the rules that decide."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from posttrain.gate import GateSpec, Guard, Primary, decide
from posttrain.types import Verdict

BENCH = Path(__file__).parents[2] / "bench" / "gate" / "operating_characteristics.py"
COUNTS = [(2, 4, 100), (0, 9, 100), (20, 25, 500), (30, 75, 500), (120, 130, 600), (40, 41, 300), (60, 10, 400)]


@pytest.mark.parametrize("line", [-0.05, 0.05, 0.0])
def test_simulated_rules_are_the_rules(binary_pair, line):
    spec = importlib.util.spec_from_file_location("operating_characteristics", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    gate = GateSpec(guards=(Guard("heldout", -line),)) if line < 0 else GateSpec(primary=(Primary("heldout", line),))
    for good, bad, n in COUNTS:
        passed, failed = bench.outcomes(np.array([good]), np.array([bad]), n, line)
        candidate, baseline = binary_pair(good, bad, n)
        verdict = decide(gate, {"heldout": candidate}, {"heldout": baseline}).verdict
        assert (bool(passed[0]), bool(failed[0])) == (verdict is Verdict.PASS, verdict is Verdict.FAIL)
