"""Choosing among attempts and stages, on items that no verdict is made on: the point estimates decide, nothing is tested."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.evidence import EvalReport, Verdict
from posttrain.gate.limits import check_limits, errors_as_wrong
from posttrain.gate.pairing import PairingError, pair
from posttrain.gate.spec import GateSpec


def promising(
    spec: GateSpec, candidate: Mapping[str, EvalReport], baseline: Mapping[str, EvalReport], split: str
) -> tuple[bool, str]:
    """Whether every point estimate on `split` is beyond its line and no limit is exceeded, and the numbers in words."""
    words: list[str] = []
    good = True
    for test in (*spec.guards, *spec.primary):
        try:
            ours = errors_as_wrong(candidate[test.suite], spec.limits.errors)
            gain = float(pair(ours, baseline[test.suite], split).differences.mean())
        except PairingError as broken:
            return False, f"{test.suite}: {broken}"
        good &= gain > test.line
        words.append(f"{test.suite} {gain:+.4f} (line {test.line:+.4f})")
    for limit in check_limits(spec, candidate, baseline):
        if limit.verdict is not Verdict.PASS:
            good = False
            words.append(f"{limit.suite} {limit.reason}")
    return good, ", ".join(words)
