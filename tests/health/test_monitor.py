"""The monitor: bounded, quiet after an alarm, and the same after a restart."""

import json
import math
import random
from itertools import pairwise

from posttrain.health.monitor import KEPT_EVALS, QUIET_STEPS, START_STEPS, WINDOW_STEPS, Monitor
from posttrain.health.rules import rules_for
from posttrain.types import StepReport


def _run(num_steps, seed=0):
    draw = random.Random(seed)
    for step in range(1, num_steps + 1):
        metrics = {
            "reward": 0.3 + step / 300 + draw.gauss(0, 0.05), "reward_std": 0.4, "entropy": max(0.005, 1.0 - step / 100),
            "kl": step / 200, "grad_norm": 1.0 + draw.random(), "completions/clipped_ratio": min(0.6, step / 300),
        }  # fmt: skip
        if step % 10 == 0:
            metrics["eval_score"] = 0.4 - step / 2000
        if step == 77:
            metrics["loss"] = math.nan
        yield StepReport(step, metrics)


def test_a_restart_changes_nothing():
    """Findings of a run equal those of the same run stopped after each of several steps and continued."""
    whole = Monitor("grpo")
    expected = [finding for report in _run(250) for finding in whole.observe(report)]
    assert len({finding.rule for finding in expected}) >= 5
    for stop in (3, 60, 77, 78, 190):
        monitor, found = Monitor("grpo"), []
        for report in _run(250):
            found += monitor.observe(report)
            if report.step == stop:
                saved = json.dumps(monitor.state(), allow_nan=False)
                monitor = Monitor("grpo")
                monitor.load_state(json.loads(saved))
        assert repr(found) == repr(expected)
        assert monitor.state() == whole.state()


def test_what_it_remembers_is_bounded():
    monitor = Monitor("grpo")
    for report in _run(2000):
        monitor.observe(report)
    state = monitor.state()
    assert (len(state["first"]), len(state["recent"]), len(state["evaluated"])) == (
        START_STEPS,
        WINDOW_STEPS,
        KEPT_EVALS,
    )


def test_a_rule_that_fired_stays_quiet_for_a_while():
    monitor = Monitor("grpo")
    fired = [report.step for report in _run(400) for f in monitor.observe(report) if f.rule == "kl_drift"]
    assert len(fired) > 5
    assert all(later - earlier == QUIET_STEPS for earlier, later in pairwise(fired))


def test_healthy_noise_raises_no_alarm():
    """Twenty seeds of a run that learns: reward and held-out score rise, the rest wobbles."""
    for seed in range(20):
        draw, monitor = random.Random(seed), Monitor("grpo")
        for step in range(1, 301):
            done = step / 300
            metrics = {
                "reward": 0.3 + 0.5 * done + draw.gauss(0, 0.06), "reward_std": 0.4 - 0.2 * done, "entropy": 1.0 - 0.9 * done + draw.gauss(0, 0.02),
                "kl": 0.08 * done, "grad_norm": math.exp(draw.gauss(0, 0.5)), "update_norm": 0.01, "learning_rate": 1e-5, "loss": draw.gauss(0, 0.05),
                "frac_reward_zero_std": 0.2 + 0.5 * done, "frac_reward_all_right": 0.05 + 0.6 * done, "frac_reward_all_wrong": 0.15 - 0.1 * done,
                "completions/mean_length": 60 + 30 * done + draw.gauss(0, 5), "completions/clipped_ratio": abs(draw.gauss(0, 0.03)), "importance_ratio/max": 1 + abs(draw.gauss(0, 1)),
            }  # fmt: skip
            if step % 20 == 0:
                metrics["eval_score"] = 0.3 + 0.4 * done + draw.gauss(0, 0.04)
            assert monitor.observe(StepReport(step, metrics)) == []


def _spikes(monitor, steps, spiking):
    """Findings before and after the update of each step; grad_norm 100 in the steps of `spiking`, else 1."""
    found = []
    for step in range(1, steps + 1):
        report = StepReport(step, {"grad_norm": 100.0 if step in spiking else 1.0})
        early, late = monitor.before_update(report), monitor.observe(report)
        found += [(step, "early", f.rule) for f in early] + [(step, "late", f.rule) for f in late]
    return found


def test_an_early_rule_is_judged_before_the_update_and_once_a_step():
    assert _spikes(Monitor("sft"), 30, {20}) == [(20, "early", "gradient_spike")]
    assert _spikes(Monitor("sft"), 30, set()) == []


def test_an_early_look_is_not_remembered():
    looked, plain = Monitor("sft"), Monitor("sft")
    for step in range(1, 20):
        report = StepReport(step, {"grad_norm": 1.0, "loss": 1.0})
        looked.before_update(report)
        looked.before_update(StepReport(step, {"grad_norm": 1.0, "loss": 2.0}))
        assert looked.observe(report) == plain.observe(report) == []
    assert looked.state() == plain.state()


def test_a_rule_that_guards_the_weights_is_never_quiet():
    """Two bad steps within a quiet spell: both are kept out. The report of a skipped step has no gradient norm."""
    guard = Monitor("sft", rules_for("sft", {"gradient_spike": {"action": "skip_step"}}))
    found = []
    for step in range(1, 31):
        bad = step in (20, 22)
        found += [(step, f.rule) for f in guard.before_update(StepReport(step, {"grad_norm": 100.0 if bad else 1.0}))]
        guard.observe(StepReport(step, {"skipped_step": 1.0} if bad else {"grad_norm": 1.0}))
    assert found == [(20, "gradient_spike"), (22, "gradient_spike")]


def test_the_evidence_says_since_when():
    monitor = Monitor("grpo")
    found = [f for step in range(1, 8) for f in monitor.observe(StepReport(step, {"grad_norm": 0.0}))]
    assert [(f.rule, f.step, f.since) for f in found] == [("zero_gradient", 5, 1)]
    monitor, found = Monitor("sft"), []
    for step in range(1, 41):
        loss = {"eval_loss": 1.0 + max(0, step - 20) / 10} if step % 10 == 0 else {}
        found += monitor.observe(StepReport(step, loss))
    assert [(f.rule, f.step, f.since) for f in found] == [("overfitting", 40, 30)]


def test_a_rule_sees_as_many_batches_as_it_asks_for_however_many_steps_are_between_them():
    """What is known of samples is logged in the first step of a batch alone."""
    per_batch = 16
    for kind, name, metric, value in (
        ("ppo", "critic_explains_nothing", "critic/vf_explained_var", 0.0),
        ("grpo", "all_wrong", "frac_reward_all_wrong", 1.0),
    ):
        monitor, fired = Monitor(kind, steps_per_batch=per_batch), []
        for step in range(1, 12 * per_batch + 1):
            metrics = {"grad_norm": 1.0} | ({metric: value} if step % per_batch == 1 else {})
            fired += [finding.step for finding in monitor.observe(StepReport(step, metrics)) if finding.rule == name]
        assert fired[0] == 9 * per_batch + 1
    asked = rules_for("sft", {"zero_gradient": {"steps": 100}})
    monitor, found = Monitor("sft", asked), []
    for step in range(1, 111):
        found += monitor.observe(StepReport(step, {"grad_norm": 0.0}))
    assert [finding.step for finding in found if finding.rule == "zero_gradient"] == [100]
