import math
from dataclasses import replace

import numpy as np
import pytest

from posttrain.errors import GateError
from posttrain.evidence import Verdict
from posttrain.gate import GateSpec, Guard, Primary, decide, plan_lines
from posttrain.gate.measure import choose, measure
from posttrain.gate.pairing import PairedItems

GUARD = GateSpec(guards=(Guard("heldout", 0.05),))
PRIMARY = GateSpec(primary=(Primary("heldout", 0.05),))
BETTER = GateSpec(primary=(Primary("heldout"),))


def one(spec, candidate, baseline, **keywords):
    verdict = decide(spec, {"heldout": candidate}, {"heldout": baseline}, **keywords)
    return verdict, verdict.tests[0]


# --- which test, and its line ---


def test_guard_uses_the_exact_test_at_minus_margin(binary_pair):
    verdict, test = one(GUARD, *binary_pair(10, 10, 1000))
    assert (verdict.verdict, test.method, test.line) == (Verdict.PASS, "exact", -0.05)
    assert test.discordant == (10, 10)
    assert test.low < test.bound < test.estimate == 0.0 < test.high
    assert test.p_value < 0.05


def test_primary_uses_the_exact_test_at_plus_min_delta(binary_pair):
    verdict, test = one(PRIMARY, *binary_pair(200, 50, 1000))
    assert (verdict.verdict, test.method, test.line, test.estimate) == (Verdict.PASS, "exact", 0.05, 0.15)


def test_primary_without_min_delta_has_the_same_test_at_zero(binary_pair):
    passed, test = one(BETTER, *binary_pair(12, 2, 500))
    assert (passed.verdict, test.method) == (Verdict.PASS, "exact")
    assert test.bound > 0.0 and test.p_value < 0.05
    failed, test = one(BETTER, *binary_pair(8, 3, 1000))
    assert failed.verdict is Verdict.FAIL
    assert test.p_value > 0.05 and test.bound <= 0.0


def test_the_bound_decides_and_not_the_estimate(binary_pair):
    """The gain of 6 points is above the line of 5, its bound is not."""
    verdict, test = one(PRIMARY, *binary_pair(110, 50, 1000))
    assert test.estimate == pytest.approx(0.06) and test.estimate > test.line > test.bound
    assert verdict.verdict is Verdict.FAIL


def test_zero_discordance_is_evidence_under_the_exact_test(binary_pair):
    assert one(GUARD, *binary_pair(0, 0, 100))[0].verdict is Verdict.PASS
    assert one(GUARD, *binary_pair(0, 0, 59))[0].verdict is Verdict.PASS
    assert one(GUARD, *binary_pair(0, 0, 58))[0].verdict is Verdict.INCONCLUSIVE


def test_several_samples_use_t_and_bootstrap(report):
    rng = np.random.default_rng(0)
    baseline = rng.binomial(1, 0.5, (300, 4)).tolist()
    candidate = rng.binomial(1, 0.8, (300, 4)).tolist()
    verdict, test = one(PRIMARY, report(candidate, "c"), report(baseline, "b"))
    assert (verdict.verdict, test.method, test.discordant) == (Verdict.PASS, "paired t + BCa", None)


def test_scores_that_are_not_binary_use_t_and_bootstrap(report):
    rng = np.random.default_rng(1)
    baseline = rng.random(200)
    verdict, test = one(GUARD, report(baseline + rng.normal(0, 0.05, 200), "c"), report(baseline, "b"))
    assert (verdict.verdict, test.method) == (Verdict.PASS, "paired t + BCa")


def test_clusters_use_the_clustered_tests_and_can_change_the_verdict(report):
    """15 clusters gain and 10 lose: 400 items in 25 clusters are no more than 25 observations."""
    gains = np.repeat([1, 0], [15 * 16, 10 * 16])
    names = [f"topic{row // 16}" for row in range(400)]
    candidate, baseline = gains, 1 - gains
    clustered = one(BETTER, report(candidate, "c", clusters=names), report(baseline, "b", clusters=names))
    alone = one(BETTER, report(candidate, "c"), report(baseline, "b"))
    assert (clustered[1].method, clustered[1].num_clusters) == ("clustered t + BCa", 25)
    assert alone[0].verdict is Verdict.PASS
    assert clustered[0].verdict is not Verdict.PASS


def test_items_without_a_cluster_stand_alone(report):
    names = ["topic0", "topic0", *([None] * 58)]
    candidate, baseline = [1] * 40 + [0] * 20, [0] * 20 + [1] * 40
    _, test = one(GUARD, report(candidate, "c", clusters=names), report(baseline, "b", clusters=names))
    assert (test.method, test.num_clusters) == ("clustered t + BCa", 59)


# --- FAIL or INCONCLUSIVE ---


def test_an_interval_below_the_line_fails_whatever_the_size(binary_pair):
    verdict, test = one(GUARD, *binary_pair(0, 30, 60))
    assert verdict.verdict is Verdict.FAIL and test.high < -0.05
    assert "lies below" in verdict.reason


def test_enough_items_that_do_not_clear_fail(binary_pair):
    """504 items are planned for 5 points at discordance 0.2."""
    assert one(GUARD, *binary_pair(40, 60, 504))[0].verdict is Verdict.FAIL
    verdict, _ = one(GUARD, *binary_pair(40, 60, 503))
    assert verdict.verdict is Verdict.INCONCLUSIVE
    assert "504 needed" in verdict.reason


def test_more_discordance_than_assumed_is_inconclusive(binary_pair):
    """At discordance 0.5 the 507 items do not have the power that was planned."""
    assert one(GUARD, *binary_pair(120, 133, 507))[0].verdict is Verdict.INCONCLUSIVE


def test_discordance_of_a_test_wins_over_the_gates(binary_pair):
    spec = GateSpec(guards=(Guard("heldout", 0.05, discordance=0.9),))
    assert one(spec, *binary_pair(40, 60, 507))[0].verdict is Verdict.INCONCLUSIVE


def test_few_items_are_inconclusive_even_if_all_gained(binary_pair):
    verdict, _ = one(BETTER, *binary_pair(29, 0, 29))
    assert verdict.verdict is Verdict.INCONCLUSIVE and "fewer than 30" in verdict.reason
    assert one(BETTER, *binary_pair(30, 0, 30))[0].verdict is Verdict.PASS
    assert one(GUARD, *binary_pair(1, 0, 1))[0].verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(("num_clusters", "expected"), [(19, Verdict.INCONCLUSIVE), (20, Verdict.PASS)])
def test_few_clusters_are_inconclusive(report, num_clusters, expected):
    names = [f"topic{row % num_clusters}" for row in range(400)]
    candidate = [float(row % 7 != 0) for row in range(400)]
    baseline = [float(row % 7 == 1) for row in range(400)]
    verdict, _ = one(BETTER, report(candidate, "c", clusters=names), report(baseline, "b", clusters=names))
    assert verdict.verdict is expected


def test_all_ties_are_inconclusive_in_a_t_test(report):
    tied = report([[0.5, 0.5]] * 100, "c"), report([[0.25, 0.25]] * 100, "b")
    verdict, test = one(BETTER, *tied)
    assert verdict.verdict is Verdict.INCONCLUSIVE and "all differences are equal" in verdict.reason
    assert math.isnan(test.bound)


def quarters(report, *, gains, losses, n, names=None):
    """Two samples an item; `gains` items gain half a point, `losses` lose it, the rest are equal."""
    candidate = [[1, 1]] * gains + [[1, 0]] * losses + [[1, 1]] * (n - gains - losses)
    baseline = [[1, 0]] * gains + [[1, 1]] * (n - gains)
    return report(candidate, "c", clusters=names), report(baseline, "b", clusters=names)


@pytest.mark.parametrize(
    ("n", "expected"), [(30, Verdict.INCONCLUSIVE), (58, Verdict.INCONCLUSIVE), (59, Verdict.PASS)]
)
def test_few_non_zero_differences_need_the_items_at_which_no_seen_loss_excludes_the_margin(report, n, expected):
    """28 equal of 30: a candidate that loses every twentieth item whole shows none of them in 21 % of the cases."""
    verdict, test = one(GUARD, *quarters(report, gains=1, losses=1, n=n))
    assert test.bound > test.line
    assert verdict.verdict is expected
    assert ("only 2 items differ" in verdict.reason) is (expected is Verdict.INCONCLUSIVE)


def test_few_gains_of_few_items_are_no_proof_of_a_gain(report):
    """5 of 40 items gain half a point, 6 points in all: losses of every sixteenth item would undo it, and 40 may not show one."""
    verdict, test = one(BETTER, *quarters(report, gains=5, losses=0, n=40))
    assert test.bound > 0.0
    assert verdict.verdict is Verdict.INCONCLUSIVE and "47 items without any would exclude 0.0625" in verdict.reason
    assert one(BETTER, *quarters(report, gains=12, losses=0, n=40))[0].verdict is Verdict.PASS


def test_few_non_zero_differences_are_counted_against_the_clusters(report):
    names = [f"topic{row // 10}" for row in range(300)]
    pair = quarters(report, gains=2, losses=0, n=300, names=names)
    verdict, test = one(GUARD, *pair)
    assert test.bound > test.line and verdict.verdict is Verdict.INCONCLUSIVE
    assert "59 clusters without any" in verdict.reason and "there are 30" in verdict.reason


def test_what_differs_in_few_clusters_is_few_however_many_items_they_have(report):
    """40 gains, all in 4 of 30 topics: a candidate that loses every twentieth topic whole may not show one."""
    names = [f"topic{row // 10}" for row in range(300)]
    verdict, test = one(GUARD, *quarters(report, gains=40, losses=0, n=300, names=names))
    assert test.bound > test.line and verdict.verdict is Verdict.INCONCLUSIVE
    assert "only 4 clusters differ" in verdict.reason and "59 clusters without any" in verdict.reason


def test_many_non_zero_differences_of_few_items_are_judged_by_their_spread(report):
    rng = np.random.default_rng(2)
    baseline = rng.random(40)
    verdict, _ = one(GUARD, report(baseline + rng.normal(0, 0.02, 40), "c"), report(baseline, "b"))
    assert verdict.verdict is Verdict.PASS


def test_clusters_that_all_balance_out_are_inconclusive(report):
    names = [f"topic{row // 2}" for row in range(100)]
    candidate, baseline = [0, 1] * 50, [1, 0] * 50
    verdict, _ = one(GUARD, report(candidate, "c", clusters=names), report(baseline, "b", clusters=names))
    assert verdict.verdict is Verdict.INCONCLUSIVE


# --- INVALID ---


def _changed(report, **fields):
    return replace(report, **fields)


def _item(report, place=3, **fields):
    items = list(report.items)
    items[place] = replace(items[place], **fields)
    return replace(report, items=tuple(items))


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda c, b: (_changed(c, suite_digest="other"), b), "suite digest differs"),
        (lambda c, b: (_changed(c, split="dev"), b), "split differs"),
        (lambda c, b: (_changed(c, split="dev"), _changed(b, split="dev")), "the gate decides on 'gate'"),
        (lambda c, b: (_changed(c, scorer="other"), b), "scorer differs"),
        (lambda c, b: (_changed(c, model_digest=b.model_digest), b), "the same model"),
        (lambda c, b: (_changed(c, items=()), b), "the candidate's report has no items"),
        (lambda c, b: (c, _changed(b, items=())), "the baseline's report has no items"),
        (lambda c, b: (_changed(c, items=c.items[1:]), b), "1 items are in one report only: q0"),
        (lambda c, b: (_item(c, id="q4"), b), "duplicate item ids in the candidate's report: q4"),
        (lambda c, b: (_item(c, prompt_digest="changed"), b), "1 items differ in their prompt digest: q3"),
        (lambda c, b: (_item(c, cluster="a"), b), "1 items differ in their cluster: q3"),
        (lambda c, b: (_item(c, scores=(1.0, 1.0)), b), "1 items differ in their number of samples: q3"),
        (lambda c, b: (c, _item(b, error="engine died")), "1 items of the baseline ended in an error: q3"),
        (lambda c, b: (_item(c, scores=(math.nan,)), b), "1 items of the candidate have no finite score: q3"),
        (lambda c, b: (_item(c, scores=(math.inf,)), b), "no finite score"),
        (lambda c, b: (_item(c, scores=()), b), "no finite score"),
    ],
)
def test_what_cannot_be_compared_is_invalid(binary_pair, break_it, reason):
    verdict, test = one(GUARD, *break_it(*binary_pair(10, 10, 1000)))
    assert (verdict.verdict, test.verdict) == (Verdict.INVALID, Verdict.INVALID)
    assert reason in verdict.reason
    assert verdict.digest


def test_a_missing_report_is_invalid(binary_pair):
    candidate, _ = binary_pair(1, 1, 100)
    verdict = decide(GUARD, {"heldout": candidate}, {})
    assert verdict.verdict is Verdict.INVALID
    assert "the baseline has no report on suite 'heldout'" in verdict.reason


def test_reports_of_two_models_are_invalid(binary_pair):
    spec = GateSpec(guards=(Guard("heldout", 0.05), Guard("format", 0.05)))
    (c1, b1), (c2, b2) = binary_pair(0, 0, 200), binary_pair(0, 0, 200, "format")
    stray = {"heldout": c1, "format": replace(c2, model_digest="another")}
    verdict = decide(spec, stray, {"heldout": b1, "format": b2})
    assert verdict.verdict is Verdict.INVALID
    assert "the candidate's reports are of 2 models: another, model-c" in verdict.reason


# --- several tests ---


def both(binary_pair, format_counts, heldout_counts, second=(200, 50, 1000)):
    spec = GateSpec((Guard("format", 0.05),), (Primary("heldout", 0.05), Primary("hard", 0.05)))
    pairs = {
        "format": binary_pair(*format_counts, "format"),
        "heldout": binary_pair(*heldout_counts),
        "hard": binary_pair(*second, "hard"),
    }
    sides = [{suite: pair[side] for suite, pair in pairs.items()} for side in (0, 1)]
    verdict = decide(spec, *sides)
    return verdict, [test.verdict for test in verdict.tests]


def test_everything_must_pass(binary_pair):
    verdict, each = both(binary_pair, (5, 5, 1000), (200, 50, 1000))
    assert each == [Verdict.PASS] * 3
    assert (verdict.verdict, verdict.reason) == (Verdict.PASS, "all 3 tests cleared their line")
    assert (verdict.candidate_digest, verdict.baseline_digest) == ("model-c", "model-b")
    assert set(verdict.report_digests) == {"format", "heldout", "hard"}


def test_a_failed_guard_stops_the_sequence(binary_pair):
    verdict, each = both(binary_pair, (0, 200, 1000), (200, 50, 1000))
    assert each == [Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE]
    assert verdict.verdict is Verdict.FAIL and verdict.reason.startswith("guard format")
    assert verdict.tests[2].reason == "not tested: guard format did not pass"


def test_primaries_are_tested_in_sequence(binary_pair):
    verdict, each = both(binary_pair, (5, 5, 1000), (50, 50, 1000))
    assert each == [Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE]
    assert verdict.tests[2].reason == "not tested: primary heldout did not pass"


def test_the_worst_verdict_wins(binary_pair):
    verdict, each = both(binary_pair, (0, 0, 40), (200, 50, 1000))
    assert each[0] is Verdict.INCONCLUSIVE and verdict.verdict is Verdict.INCONCLUSIVE


def test_guards_are_each_at_full_alpha(binary_pair):
    spec = GateSpec(guards=tuple(Guard(name, 0.05) for name in ("a", "b", "c")))
    pairs = {name: binary_pair(10, 10, 1000, name) for name in ("a", "b", "c")}
    verdict = decide(spec, {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()})
    alone, test = one(GUARD, *binary_pair(10, 10, 1000))
    assert {result.bound for result in verdict.tests} == {test.bound}
    assert verdict.alpha == alone.alpha == 0.05


def test_later_looks_are_stricter(binary_pair):
    spec = replace(BETTER, looks=5)
    pair = binary_pair(15, 5, 1000)
    first, second = one(spec, *pair), one(spec, *pair, look=2)
    assert first[0].alpha == pytest.approx(4 * second[0].alpha)
    assert (first[0].verdict, second[0].verdict) == (Verdict.PASS, Verdict.FAIL)


def test_the_order_of_items_changes_nothing(report):
    rng = np.random.default_rng(5)
    candidate, baseline = report(rng.random(60), "c"), report(rng.random(60), "b")
    shuffled = replace(candidate, items=tuple(reversed(candidate.items)))
    assert one(GUARD, shuffled, baseline)[1] == one(GUARD, candidate, baseline)[1]


@pytest.mark.parametrize("samples", [1, 4])
def test_false_ship_rate_of_the_chosen_test(samples):
    """Candidates exactly at the margin clear it in at most 5 % of the cases, within simulation error."""
    rng = np.random.default_rng(6)
    num_trials, passed = 100, 0
    for _ in range(num_trials):
        draws = rng.choice([1, -1, 0], (100, samples), p=[0.05, 0.15, 0.8])
        candidate, baseline = (draws >= 0).mean(axis=1), (draws <= 0).mean(axis=1)
        pairs = PairedItems(candidate, baseline, None, 100, binary=samples == 1)
        method = choose(pairs)
        passed += measure(method, pairs, -0.1, 0.05).bound > -0.1
    assert passed <= 11  # P[Bin(100, 0.05) > 11] = 0.004


# --- plan ---


def test_plan_accepts_what_can_be_decided():
    spec = GateSpec((Guard("format", 0.05),), (Primary("heldout", 0.05), Primary("hard")))
    lines = plan_lines(spec, {"format": (504, 504), "heldout": (1000, 0), "hard": (100, 100)})
    assert lines[0].startswith("guard format: 504 items, margin 0.05 needs 504")
    assert lines[2].startswith("primary hard: 100 items detect a gain of 0.111")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heldout": (503, 503)}, "503 items, and margin 0.05 needs 504"),
        ({"heldout": (20, 20)}, "fewer than 30: add items .it needs 504"),
        ({"heldout": (1000, 10)}, "10 clusters, expected at least 20"),
        ({"heldout": (900, 90)}, "margin 0.05 needs 958"),
        ({}, "no items on split 'gate'"),
    ],
)
def test_plan_refuses_with_the_items_it_needs(sizes, message):
    with pytest.raises(GateError, match=message):
        plan_lines(GUARD, sizes)


def test_plan_names_every_test_that_is_short():
    spec = GateSpec((Guard("format", 0.02), Guard("tone", 0.05)), (Primary("heldout", 0.05),))
    with pytest.raises(GateError, match=r"guard format .* needs 3111 .*; primary heldout .* needs 495"):
        plan_lines(spec, {"format": (1000, 0), "tone": (1000, 0), "heldout": (400, 0)})


def test_a_planned_gate_uses_the_alpha_of_the_look():
    spec = replace(GUARD, looks=3)
    with pytest.raises(GateError, match="needs"):
        plan_lines(spec, {"heldout": (507, 0)})
    assert plan_lines(spec, {"heldout": (650, 0)})
