"""The published detection table: its intervals are exact, and its judge is the monitor of the loop."""

import importlib
import math
import sys
from pathlib import Path

import pytest
from scipy.stats import binomtest

from posttrain.health.rules import rules_for

BENCH = Path(__file__).parents[2] / "bench" / "health"


@pytest.fixture(scope="module")
def bench():
    """The modules `judge` and `cases` of the bench."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("judge"), importlib.import_module("cases")
    finally:
        sys.path[:] = before
        for name in ("judge", "cases", "task"):
            sys.modules.pop(name, None)


def run_of(kind, case, seed, ended="done", **metrics):
    reports = [{"step": step, **{name: value(step) for name, value in metrics.items()}} for step in range(1, 21)]
    return {"kind": kind, "case": case, "seed": seed, "ended": ended, "wall_s": 1.0, "cpu_s": 1.0, "reports": reports}


@pytest.mark.parametrize(("count", "number"), [(0, 60), (1, 60), (3, 7), (7, 7)])
def test_intervals_are_clopper_and_pearsons(bench, count, number):
    judge, _ = bench
    exact = binomtest(count, number).proportion_ci(0.95, method="exact")
    assert judge.interval(count, number) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_no_alarm_in_sixty_runs_excludes_six_percent(bench):
    """The upper bound p solves (1 - p)^60 = 0.025."""
    judge, _ = bench
    assert judge.interval(0, 60)[1] == pytest.approx(1 - 0.025 ** (1 / 60))


def test_a_run_is_judged_by_the_rules_of_its_stage(bench):
    judge, cases = bench
    calm = run_of("sft", cases.HEALTHY, 1, loss=lambda step: 1.0)
    wild = run_of("sft", "learning rate × 100", 1, loss=lambda step: 1.0 if step == 1 else 5.0)
    died = run_of("sft", "learning rate × 100", 2, ended="stopped: nan", loss=lambda step: 1.0)
    assert judge.fired(calm) == {}
    assert judge.fired(wild) == {"loss_divergence": 9}
    assert judge.fired(died) == {judge.STOPPED: 21}
    result = judge.judged([calm, wild, died])
    row = result["cases"]["sft/learning rate × 100"]
    assert (row["seeds"], row["first"]) == ([1, 2], [9, 21])
    table = judge.render(result, {}, [case for case in cases.CASES if case.name != cases.HEALTHY])
    assert "| SFT | learning rate × 100 | 1e-1 | 2/2 (16–100 %) | 15 |" in table
    assert "| SFT | 0/1 (0–98 %) | none | – |" in table


def test_every_case_says_keys_that_exist_and_acts_on_nothing(bench, tmp_path):
    from posttrain.config.kinds import STAGE_KINDS

    _, cases = bench
    for case in cases.CASES:
        keys = STAGE_KINDS[case.kind].keys.model_validate(cases.values_of(case, 3, tmp_path))
        assert {rule.action for rule in rules_for(case.kind, keys.health)} == {"log"}
        assert math.isfinite(keys.learning_rate)
