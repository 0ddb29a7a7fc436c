import subprocess
import sys

import pytest

from posttrain.errors import RewardError
from posttrain.rewards import behaviour
from posttrain.rewards.battery import find_deciding, learn_form, measure_separation
from posttrain.rewards.cases import AnswerForm, PolicySample, Setting, cases_of
from posttrain.rewards.check import RewardCheck, Thresholds
from posttrain.rewards.workers import RewardPool
from posttrain.types import Origin, Prompt

SOURCE = r"""
import os, re, time
BOX = re.compile(r"\\boxed\{([^{}]*)\}")

def correct(completions, answer):
    return [None if a is None else float(BOX.findall(c) == [a]) for c, a in zip(completions, answer)]

def zero_for_no_gold(completions, **columns):
    return [float(BOX.findall(c) == [a]) for c, a in zip(completions, columns.get("answer") or [None] * len(completions))]

def salted(completions, answer):
    return [float(hash(c) % 2) for c in completions]

def stateful(completions, answer, seen=[]):
    seen += completions
    return [float(len(seen)) for _ in completions]

def batch_dependent(completions, answer):
    return [float(max(map(len, completions)) == len(c)) for c in completions]

def longer(completions, answer):
    return [float(a in c) + 0.001 * len(c) for c, a in zip(completions, answer)]

def ignorant(completions):
    return [1.0 for _ in completions]

def late_once(completions, answer):
    if len(completions) == 1 and not os.path.exists(__file__ + ".late"):
        open(__file__ + ".late", "w").close()
        time.sleep(100)
    return correct(completions, answer)

def half(completions, answer):
    return [float(a in c and int(a) % 2 == 0) for c, a in zip(completions, answer)]
"""
FORM = AnswerForm(False, "\\boxed{", "}")
GOLDS = ["11", "14", "17", "20", "23", "26"]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A `Check` of one reward that runs in real workers."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "r.py").write_text(SOURCE)
    pools = []

    def checked(name, golds=GOLDS, samples=()):
        pool = RewardPool([f"r.py:{name}"], folder=folder, timeout_s=5)
        pools.append(pool.__enter__())
        cases = cases_of([Prompt(Origin("p", i), f"Q{i}?", {"answer": gold}) for i, gold in enumerate(golds)])
        check = RewardCheck(pool, cases, samples, Thresholds(repeats=4), lambda text: text.encode())
        find_deciding(check, cases, FORM)
        return check

    yield checked
    for pool in pools:
        pool.close()


def test_separation_of_a_good_and_an_ignorant_reward(checked):
    good = checked("correct")
    measure_separation(good, good.cases, FORM)
    assert good.failures == [] and good.measures["auc"] == good.measures["recall"] == 1.0
    assert good.deciding == ("correct",)
    assert checked("ignorant").deciding == ()


def test_a_reward_that_knows_half_of_the_golds_fails_recall_and_auc(checked):
    check = checked("half")
    measure_separation(check, check.cases, FORM)
    assert check.measures["recall"] == 0.5 and check.measures["auc"] == 0.75
    assert "only 50% of the reference answers" in check.failures[0] and "AUC" in check.failures[1]


def test_natural_wrong_answers_are_used_and_right_ones_left_out(checked):
    samples = [PolicySample(0, r"\boxed{12}"), PolicySample(0, r"\boxed{11}"), PolicySample(1, "I do not know")]
    check = checked("correct", samples=samples)
    measure_separation(check, check.cases, FORM)
    assert check.measures["num_natural_wrong"] == 1 and check.warnings == []


def test_the_form_is_learnt_from_what_the_reward_accepts(checked):
    check = checked("correct")
    assert learn_form(check, check.cases) == FORM


@pytest.mark.parametrize("name", ["salted", "stateful", "batch_dependent"])
def test_what_depends_on_anything_but_the_completion_is_found(checked, name):
    check = checked(name, ["5", "14", "117"])
    behaviour.measure_determinism(check, FORM)
    assert "must be deterministic" in check.failures[0]


def test_a_deterministic_reward_passes_and_is_timed(checked):
    check = checked("correct")
    behaviour.measure_determinism(check, FORM)
    assert check.failures == [] and 0 < check.measures["latency_p50_s"] <= check.measures["latency_max_s"]


def test_a_row_without_reference_must_not_score(checked):
    good, bad = checked("correct"), checked("zero_for_no_gold")
    for check in (good, bad):
        behaviour.check_missing_gold(check, check.cases, FORM, True)
    assert good.failures == []
    assert "scores 0 for a row without a reference answer" in bad.failures[0]
    assert [(row.name, row.num, row.violations) for c in (good, bad) for row in c.rows] == [
        ("None and missing columns", 2, 0),
        ("None and missing columns", 2, 2),
    ]


def test_policies_that_do_not_read_must_not_earn(checked):
    good, bad = checked("correct"), checked("longer")
    for check in (good, bad):
        measure_separation(check, check.cases, FORM)
        check.failures.clear()
        behaviour.measure_policies(check, Setting.of(check.cases, FORM), True)
    assert good.failures == [] and good.measures["length correlation, wrong"] == 0.0
    assert bad.measures["best degenerate policy: longest"] == bad.measures["policy: longest"] > 0
    assert any(name.startswith("best degenerate policy") for name in good.measures)
    assert any("'longest' earns" in failure for failure in bad.failures)
    assert bad.measures["length correlation, wrong"] == pytest.approx(1.0, abs=0.2)


def test_the_kill_is_tested_on_a_hanging_reward(checked):
    check = checked("correct")
    behaviour.measure_kill(check)
    assert check.failures == check.warnings == []
    assert 2 * behaviour._MIN_PROBE_TIMEOUT_S <= check.measures["kill_wall_s"] < 60


def test_the_kill_probe_holds_on_a_busy_machine(checked):
    """Eight processes that never wait compete with it for the CPUs."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        check = checked("correct")
        behaviour.measure_kill(check)
        behaviour.measure_determinism(check, FORM)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert check.failures == []


def test_a_machine_too_busy_to_tell_is_no_failure(checked, monkeypatch):
    late = ("hang", "hang", "crash", "outage", "b")
    monkeypatch.setattr(behaviour, "_PROBE_TEXTS", late)
    monkeypatch.setattr(behaviour, "_PROBE_TRIES", 1)
    check = checked("correct")
    behaviour.measure_kill(check)
    assert check.failures == [] and "too busy to tell" in check.warnings[0]
    assert "kill_wall_s" not in check.measures


def test_a_score_that_came_too_late_once_is_no_other_score(checked):
    check = checked("late_once")
    check.pool.timeout_s = 1.0
    behaviour.measure_determinism(check, FORM)
    assert check.failures == [] and "too busy to tell" in check.warnings[0]


def test_a_crash_and_an_outage_leave_their_completions_unscored_never_0():
    specs = [f"{behaviour._PROBES}:{name}" for name in ("crashing", "unreachable")]
    with RewardPool(specs, timeout_s=5) as pool:
        scored = pool.score(["p"] * 4, ["a", "crash", "outage", "b"], {})
        assert [b.total for b in scored] == [2.0, None, None, 2.0]
        assert "the reward process died" in scored[1].error and "connection refused" in scored[2].error
        with pytest.raises(RewardError, match=r"of 2 completions are unscored( already)?; at most 10% may be"):
            pool.score(["p"] * 2, ["outage"] * 2, {}, max_unscored=0.1)


def test_no_signal_is_said_before_training(checked):
    flat = [PolicySample(0, r"\boxed{1}"), PolicySample(0, r"\boxed{2}"), PolicySample(1, "x"), PolicySample(1, "y")]
    check = checked("correct", samples=flat)
    behaviour.forecast_signal(check)
    assert "RL would get no signal" in check.warnings[0]
    check = checked("correct", samples=[*flat, PolicySample(2, r"\boxed{17}"), PolicySample(2, "z")])
    behaviour.forecast_signal(check)
    assert check.warnings == [] and check.measures["forecast: frac_reward_zero_std"] == pytest.approx(2 / 3)
