from dataclasses import replace

import pytest

from posttrain.errors import GateError
from posttrain.evidence import Verdict
from posttrain.gate import GateSpec, Guard, Primary, decide, verdict_table
from posttrain.gate.limits import errors_as_wrong
from posttrain.gate.spec import Limits

N = 400


@pytest.fixture
def sides(report):
    """Candidate and baseline, the candidate 100 points better, with answers of 10 tokens that end by themselves."""

    def make(*, truncated=0, length=10, errors=0):
        candidate, baseline = report([1] * N, "model-c"), report([0] * N, "model-b")
        baseline = replace(
            baseline, items=tuple(replace(i, finishes=("stop",), num_tokens=(10,)) for i in baseline.items)
        )
        items = [
            replace(item, finishes=("length" if n < truncated else "stop",), num_tokens=(length,))
            for n, item in enumerate(candidate.items)
        ]
        items[:errors] = [replace(item, error="the judge did not answer", scores=()) for item in items[:errors]]
        return {"heldout": replace(candidate, items=tuple(items))}, {"heldout": baseline}

    return make


def gate(**limits):
    return GateSpec(primary=(Primary("heldout", 0.05),), limits=Limits(**limits))


AT_AND_ABOVE = {
    "truncated": ({"truncated": 0.1}, {"truncated": 40}, {"truncated": 41}, "10.2% of the answers were cut off, at most 10.0%"),
    "length_ratio": ({"length_ratio": 2.0}, {"length": 20}, {"length": 21}, "21.0 tokens on average, at most 20.0"),
    "errors": ({"errors": 0.01}, {"errors": 4}, {"errors": 5}, "1.2% of the items ended in an error, at most 1.0%"),
}  # fmt: skip


@pytest.mark.parametrize("limit", AT_AND_ABOVE)
def test_what_exceeds_a_limit_fails_with_the_reason_and_what_is_at_it_passes(sides, limit):
    limits, at, above, reason = AT_AND_ABOVE[limit]
    passed = decide(gate(**limits), *sides(**at))
    assert (passed.verdict, [test.role for test in passed.tests]) == (Verdict.PASS, ["primary", "limit"])
    failed = decide(gate(**limits), *sides(**above))
    assert failed.verdict is Verdict.FAIL
    assert reason in failed.reason
    assert failed.reason.startswith("limit heldout")
    assert reason in verdict_table(failed)


@pytest.mark.parametrize("above", [{"truncated": N}, {"length": 10_000}])
def test_limits_are_off_by_default(sides, above):
    verdict = decide(gate(), *sides(**above))
    assert (verdict.verdict, len(verdict.tests)) == (Verdict.PASS, 1)


def test_without_a_limit_an_error_is_invalid_and_within_it_counts_as_wrong(sides):
    assert decide(gate(), *sides(errors=1)).verdict is Verdict.INVALID
    verdict = decide(gate(errors=0.1), *sides(errors=40))
    assert verdict.tests[0].candidate_mean == pytest.approx(0.9)
    candidate, _ = sides(errors=40)
    assert errors_as_wrong(candidate["heldout"], 0.1).items[0].scores == (0.0,)


def test_an_error_of_the_baseline_is_invalid_whatever_the_limit(sides):
    candidate, baseline = sides()
    items = (replace(baseline["heldout"].items[0], error="lost"), *baseline["heldout"].items[1:])
    baseline = {"heldout": replace(baseline["heldout"], items=items)}
    assert decide(gate(errors=0.5), candidate, baseline).verdict is Verdict.INVALID


def test_a_suite_without_generated_answers_has_no_length(report):
    """Choices are ranked, not generated."""
    spec = GateSpec(guards=(Guard("heldout", 0.5),), limits=Limits(truncated=0.0, length_ratio=1.0))
    verdict = decide(spec, {"heldout": report([1] * N, "c")}, {"heldout": report([0] * N, "b")})
    assert (verdict.verdict, len(verdict.tests)) == (Verdict.PASS, 1)


@pytest.mark.parametrize("limits", [{"truncated": 1.5}, {"errors": -0.1}, {"length_ratio": "long"}])
def test_a_limit_that_makes_no_sense_is_refused(limits):
    with pytest.raises(GateError, match=rf"gate\.limits\.{next(iter(limits))}"):
        gate(**limits)
