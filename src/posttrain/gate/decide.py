"""The rules of a gate: from eval reports to a verdict, and before the run, whether a verdict is possible at all.

A test passes only if its one-sided bound clears its line. One that does not clear it is FAIL if the data could have
shown it (the interval lies wholly below the line, or there were as many items as the planned power needs, at the larger
of the assumed and the observed discordance), else INCONCLUSIVE: too few items is not a pass, and not a failure either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from posttrain.errors import GateError
from posttrain.evidence import EvalReport, GateVerdict, TestResult, Verdict
from posttrain.gate.limits import check_limits, errors_as_wrong
from posttrain.gate.measure import EXACT, Measurement, Method, choose, measure
from posttrain.gate.paired import cluster_sums
from posttrain.gate.pairing import PairedItems, PairingError, pair
from posttrain.gate.power import (
    MIN_CLUSTERS,
    MIN_ITEMS,
    design_effect,
    detectable,
    needed_items,
    zero_loss_items,
)
from posttrain.gate.spec import GateSpec, Guard, Primary

Reports = Mapping[str, EvalReport]
_EQUAL = 1e-12  # sums of differences that cancel, up to rounding
_WORST_FIRST = (Verdict.INVALID, Verdict.FAIL, Verdict.INCONCLUSIVE)


def decide(spec: GateSpec, candidate: Reports, baseline: Reports, *, look: int = 1) -> GateVerdict:
    """Judge one candidate against one baseline, each a report per suite. `look` counts looks at these items, from 1.

    Raises: GateError when `look` is past the budget of the spec.
    """
    alpha = spec.alpha_at(look)
    limits = tuple(check_limits(spec, candidate, baseline))
    guards = [_judge(spec, test, alpha, candidate, baseline) for test in spec.guards]
    primaries = [_judge(spec, test, alpha, candidate, baseline) for test in spec.primary]
    tests = (*guards, *_in_sequence(guards, primaries), *limits)
    verdict, reason = _combine(tests)
    digests, problem = _model_digests(spec, candidate, baseline)
    if problem:
        verdict, reason = Verdict.INVALID, problem
    return GateVerdict(
        verdict=verdict,
        reason=reason,
        candidate_digest=digests[0],
        baseline_digest=digests[1],
        spec_digest=spec.digest,
        alpha=alpha,
        tests=tests,
        report_digests={
            suite: (candidate[suite].digest, baseline[suite].digest)
            for suite in spec.suites
            if suite in candidate and suite in baseline and _has_digest(candidate[suite], baseline[suite])
        },
    )


def plan_lines(spec: GateSpec, sizes: Mapping[str, tuple[int, int]], *, look: int = 1) -> list[str]:
    """One line per test, given (number of items, number of clusters) per suite on the gate split.

    Raises: GateError naming the number of items, if a test cannot detect its margin with the planned power.
    """
    alpha = spec.alpha_at(look)  # with a second round: of the first, which the items of its split must suffice for
    lines: list[str] = []
    short: list[str] = []
    for test in (*spec.guards, *spec.primary):
        if test.suite not in sizes:
            known = ", ".join(sorted(sizes)) or "none"
            raise GateError(
                f"the gate names suite {test.suite!r}, which has no items on split {spec.split!r} (has: {known})"
            )
        num_items, num_clusters = sizes[test.suite]
        line, problem = _plan_test(spec, test, alpha, num_items, num_clusters)
        lines.append(line)
        short += [problem] if problem else []
    if short:
        raise GateError("this gate could not decide: " + "; ".join(short))
    return lines


def _plan_test(spec: GateSpec, test: Guard | Primary, alpha: float, items: int, clusters: int) -> tuple[str, str]:
    """What the test needs, in words, and what is wrong ("" if nothing)."""
    clustered = 0 < clusters < items
    effect = design_effect(items, clusters, spec.icc) if clustered else 1.0
    discordance = spec.discordance if test.discordance is None else test.discordance
    needed = math.ceil(needed_items(test.line, alpha, spec.power, discordance) * effect)
    assumed = f"alpha {alpha:.3g}, power {spec.power:g}, discordance {discordance:g}"
    if clustered:
        assumed += f", {clusters} clusters with icc {spec.icc:g}"
    name = f"{_role(test)} {test.suite}"
    if items < MIN_ITEMS:
        return (
            "",
            f"{name} has {items} items, and no test is made on fewer than {MIN_ITEMS}: add items (it needs {needed})",
        )
    if clustered and clusters < MIN_CLUSTERS:
        return "", f"{name} has {clusters} clusters, expected at least {MIN_CLUSTERS}: add items in new clusters"
    finds = detectable(items / effect, alpha, spec.power, discordance)
    if test.line == 0.0:
        return f"{name}: {items} items detect a gain of {finds:.3f} ({assumed})", ""
    what = f"margin {-test.line:g}" if test.line < 0 else f"min_delta {test.line:g}"
    if items < needed:
        return "", (
            f"{name} has {items} items, and {what} needs {needed} ({assumed}): add items, widen the margin, or set the "
            f"discordance you expect"
        )
    return f"{name}: {items} items, {what} needs {needed} ({assumed})", ""


def _role(test: Guard | Primary) -> Literal["guard", "primary"]:
    return "guard" if isinstance(test, Guard) else "primary"


def _judge(spec: GateSpec, test: Guard | Primary, alpha: float, candidate: Reports, baseline: Reports) -> TestResult:
    for side, reports in (("candidate", candidate), ("baseline", baseline)):
        if test.suite not in reports:
            return _invalid(test, f"the {side} has no report on suite {test.suite!r}")
    try:
        ours = errors_as_wrong(candidate[test.suite], spec.limits.errors)
        pairs = pair(ours, baseline[test.suite], spec.split)
    except PairingError as broken:
        return _invalid(test, str(broken))
    method = choose(pairs)
    found = measure(method, pairs, test.line, alpha)
    verdict, reason = _verdict(spec, test, alpha, pairs, method, found)
    return TestResult(
        role=_role(test),
        suite=test.suite,
        method=method.name,
        num_items=len(pairs.differences),
        num_clusters=pairs.num_clusters,
        baseline_mean=round(float(pairs.baseline.mean()), 10),
        candidate_mean=round(float(pairs.candidate.mean()), 10),
        estimate=round(float(pairs.differences.mean()), 10),
        low=found.low,
        high=found.high,
        bound=found.bound,
        line=test.line,
        p_value=found.p_value,
        verdict=verdict,
        reason=reason,
        discordant=pairs.discordant if pairs.binary else None,
    )


def _verdict(
    spec: GateSpec, test: Guard | Primary, alpha: float, pairs: PairedItems, method: Method, found: Measurement
) -> tuple[Verdict, str]:
    num_items = len(pairs.differences)
    if num_items < MIN_ITEMS:
        return Verdict.INCONCLUSIVE, f"{num_items} items, fewer than {MIN_ITEMS}"
    if pairs.clusters is not None and pairs.num_clusters < MIN_CLUSTERS:
        return Verdict.INCONCLUSIVE, f"{pairs.num_clusters} clusters, fewer than {MIN_CLUSTERS}"
    if math.isnan(found.bound):
        return Verdict.INCONCLUSIVE, "all differences are equal, so nothing says how much they vary"
    if unseen := _unseen_losses(test, alpha, pairs, method):
        return Verdict.INCONCLUSIVE, unseen
    if found.bound > test.line:
        return Verdict.PASS, f"bound {found.bound:+.4f} clears {test.line:+.4f}"
    if found.high <= test.line:
        return Verdict.FAIL, f"the whole interval lies below {test.line:+.4f}"
    discordance = spec.discordance if test.discordance is None else test.discordance
    needed = method.needed(test.line, alpha, spec.power, discordance, found.spread)
    if num_items >= needed:
        return (
            Verdict.FAIL,
            f"bound {found.bound:+.4f} does not clear {test.line:+.4f} with {num_items} items ({needed} needed)",
        )
    return (
        Verdict.INCONCLUSIVE,
        f"bound {found.bound:+.4f} does not clear {test.line:+.4f}; {num_items} items, {needed} needed",
    )


def _unseen_losses(test: Guard | Primary, alpha: float, pairs: PairedItems, method: Method) -> str:
    """Why a t test or bootstrap on few non-zero differences says too little: rare losses that it cannot have seen ("" if not)."""
    if method is EXACT:
        return ""
    kind, units, least = "items", len(pairs.differences), MIN_ITEMS
    if pairs.clusters is not None:
        kind, units, least = "clusters", pairs.num_clusters, MIN_CLUSTERS
    sums, _ = cluster_sums(pairs.differences, pairs.clusters)
    differ = int(np.count_nonzero(np.abs(sums) > _EQUAL))
    distance = float(pairs.differences.mean()) - test.line
    distance = min(distance, -test.line) if test.line < 0 else distance
    if differ >= least or distance <= 0.0 or units >= (needed := zero_loss_items(distance, alpha)):
        return ""
    return (
        f"only {differ} {kind} differ, so nothing says how rare losses are: {needed} {kind} without any would exclude "
        f"{distance:.4g}, and there are {units}"
    )


def _invalid(test: Guard | Primary, reason: str) -> TestResult:
    nan = math.nan
    return TestResult(
        role=_role(test), suite=test.suite, method="none", num_items=0, num_clusters=0, baseline_mean=nan,
        candidate_mean=nan, estimate=nan, low=nan, high=nan, bound=nan, line=test.line, p_value=nan,
        verdict=Verdict.INVALID, reason=reason,
    )  # fmt: skip


def _in_sequence(guards: list[TestResult], primaries: list[TestResult]) -> list[TestResult]:
    """A primary counts only if all guards and every primary before it passed; a later one claims nothing."""
    blocked = next((test for test in guards if test.verdict is not Verdict.PASS), None)
    judged: list[TestResult] = []
    for test in primaries:
        if blocked is not None and test.verdict is not Verdict.INVALID:
            reason = f"not tested: {blocked.role} {blocked.suite} did not pass"
            test = replace(test, verdict=Verdict.INCONCLUSIVE, reason=reason)
        elif blocked is None and test.verdict is not Verdict.PASS:
            blocked = test
        judged.append(test)
    return judged


def _combine(tests: tuple[TestResult, ...]) -> tuple[Verdict, str]:
    for verdict in _WORST_FIRST:
        for test in tests:
            if test.verdict is verdict:
                return verdict, f"{test.role} {test.suite}: {test.reason}"
    return Verdict.PASS, f"all {len(tests)} tests cleared their line"


def _model_digests(spec: GateSpec, candidate: Reports, baseline: Reports) -> tuple[tuple[str, str], str]:
    """The one model of each side, and what is wrong if there is not exactly one ("" if nothing)."""
    found: list[str] = []
    problem = ""
    for side, reports in (("candidate", candidate), ("baseline", baseline)):
        digests = sorted({reports[suite].model_digest for suite in spec.suites if suite in reports})
        if len(digests) > 1:
            problem = problem or f"the {side}'s reports are of {len(digests)} models: {', '.join(digests)}"
        found.append(digests[0] if digests else "")
    return (found[0], found[1]), problem


def _has_digest(*reports: EvalReport) -> bool:
    """Whether the records can be written as JSON: a score that is not finite has no digest."""
    return all(math.isfinite(score) for report in reports for item in report.items for score in item.scores)
