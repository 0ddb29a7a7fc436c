"""Each rule on a history in which it fires and on one in which it is silent."""

import math
import re
from typing import get_args

import pytest

from posttrain.config.kinds import LearnsFrom
from posttrain.errors import ConfigError
from posttrain.health.monitor import Monitor
from posttrain.health.rules import ACTIONS, RULES, rules_for
from posttrain.types import Severity, StepReport

NAN = float("nan")


def series(num_steps, **metrics):
    """Step reports; a metric is a constant, or a function of the step that may return None (not logged)."""
    rows = []
    for step in range(1, num_steps + 1):
        row = {name.replace("__", "/"): value(step) if callable(value) else value for name, value in metrics.items()}
        rows.append(StepReport(step, {name: float(value) for name, value in row.items() if value is not None}))
    return rows


def late(before, after, at=20):
    """`before` until step `at`, then `after`."""
    return lambda step: before if step < at else after


def every(num_steps, value):
    """`value(step)`, logged only every `num_steps` steps."""
    return lambda step: value(step) if step % num_steps == 0 else None


RISING = every(10, lambda s: 1.0 if s <= 30 else 1.0 + (s - 30) / 50)
MISMATCH = "sampling__sampling_logp_difference__mean"
CASES = {
    "nonfinite": ("sft", series(3, loss=late(1.0, NAN, 3)), series(30, loss=1.0, reward=0.0)),
    "zero_gradient": ("sft", series(12, grad_norm=late(1.0, 0.0, 6)), series(12, grad_norm=lambda s: 0.0 if s % 5 else 1.0)),
    "policy_not_moving": (
        "sft",
        series(10, grad_norm=1.0, learning_rate=1e-4, update_norm=0.0),
        series(10, grad_norm=1.0, learning_rate=0.0, update_norm=0.0),
    ),
    "gradient_spike": ("dpo", series(30, grad_norm=late(1.0, 6.0, 30)), series(30, grad_norm=lambda s: 9.0 if s % 7 == 0 else 0.1)),
    "loss_divergence": ("sft", series(40, loss=late(1.0, 1.8)), series(40, loss=lambda s: 1.4 if s % 2 else 0.9)),
    "updates_skipped": ("dpo", series(20, skipped_step=late(None, 1.0, 8)), series(30, skipped_step=lambda s: 1.0 if s % 10 else None)),
    "zero_loss": ("sft", series(10, loss=late(1.0, 0.0, 5)), series(60, loss=lambda s: 1.0 / s**2 + 1e-3)),
    "masked_out": ("sft", series(5, loss_tokens=late(100, 0, 5)), series(5, loss_tokens=1)),
    "overfitting": (
        "sft",
        series(50, eval_loss=every(10, lambda s: 1.0 if s <= 30 else 1.0 + (s - 30) / 50)),
        series(50, eval_loss=every(10, lambda s: 1.0 if s <= 30 else 1.0 + (s - 30) / 1000)),
    ),
    "margins_run_away": (
        "dpo",
        series(60, logps__chosen=lambda s: -40.0 - s, rewards__margins=lambda s: s / 10),
        series(60, logps__chosen=lambda s: -40.0 - s / 6, rewards__margins=lambda s: s / 10),
    ),
    "preference_not_learned": (
        "dpo",
        series(80, loss=0.6931, rewards__accuracies=lambda s: 0.48 + 0.04 * (s % 2)),
        series(80, loss=lambda s: 0.6931 - 0.001 * s, rewards__accuracies=0.52),
    ),
    "router_collapse": ("sft", series(60, router__balance=late(0.9, 0.3)), series(60, router__balance=late(0.9, 0.6))),
    "entropy_collapse": (
        "grpo",
        series(80, entropy=lambda s: math.exp(-s / 6), frac_reward_all_right=0.1),
        series(80, entropy=lambda s: math.exp(-s / 6), frac_reward_all_right=0.9),
    ),
    "entropy_explosion": ("grpo", series(40, entropy=late(0.5, 2.0)), series(40, entropy=late(0.5, 1.2))),
    "kl_drift": ("grpo", series(30, kl=lambda s: s / 30), series(30, kl=lambda s: 2.0 if s % 10 == 0 else 0.05)),
    "advantage_collapse": (
        "grpo",
        series(20, frac_reward_zero_std=0.97, frac_reward_all_right=0.02, frac_reward_all_wrong=0.01),
        series(20, frac_reward_zero_std=0.97, frac_reward_all_right=0.6, frac_reward_all_wrong=0.37),
    ),
    "all_wrong": ("grpo", series(20, frac_reward_all_wrong=0.95), series(20, frac_reward_all_wrong=0.85)),
    "mastered_prompts": ("grpo", series(20, frac_reward_all_right=0.95), series(20, frac_reward_all_right=0.85)),
    "reward_falls": (
        "grpo",
        series(60, reward=lambda s: 0.5 - s / 120, reward_std=0.4),
        series(60, reward=lambda s: 0.5 + 0.2 * (-1) ** s, reward_std=0.4),
    ),
    "reward_without_score": (
        "grpo",
        series(60, reward=lambda s: 0.3 + s / 100, eval_score=every(10, lambda s: 0.5 - s / 1000)),
        series(60, reward=lambda s: 0.3 + s / 100, eval_score=every(10, lambda s: 0.5 + s / 1000)),
    ),
    "length_spiral": ("grpo", series(60, completions__mean_length=lambda s: 40.0 * 1.05**s), series(60, completions__mean_length=lambda s: 40.0 + s)),
    "critic_explains_nothing": (
        "ppo",
        series(60, grad_norm=late(None, 1.0, 10), critic__vf_explained_var=every(2, lambda s: -0.01 * (s % 3))),
        series(60, grad_norm=late(None, 1.0, 45), critic__vf_explained_var=lambda s: 0.01 if s >= 45 and s % 3 == 0 else 0.0),
    ),
    "teacher_gap": ("grpo", series(60, teacher__gap=lambda s: 0.4 + s / 30), series(60, teacher__gap=lambda s: 0.9 - s / 90)),
    "truncation_spiral": ("grpo", series(40, completions__clipped_ratio=late(0.05, 0.4)), series(40, completions__clipped_ratio=0.4)),
    "tool_errors": ("grpo", series(40, tools__failure_frequency=0.7), series(40, tools__failure_frequency=lambda s: 0.9 if s % 3 == 0 else 0.2)),
    "episodes_lost": ("grpo", series(20, env__failed_ratio=0.2), series(20, env__failed_ratio=lambda s: 0.25 if s % 4 == 0 else 0.0)),
    "clip_fraction": ("grpo", series(20, clip_ratio__region_mean=0.35), series(20, clip_ratio__region_mean=lambda s: 0.4 if s % 3 == 0 else 0.1)),
    "ratio_tails": ("grpo", series(20, importance_ratio__max=25.0), series(20, importance_ratio__max=lambda s: 100.0 if s % 3 == 0 else 2.0)),
    "router_mismatch": ("grpo", series(10, router__mismatch=0.3), series(10, router__mismatch=0.1)),
    "sampler_mismatch": ("grpo", series(10, **{MISMATCH: 0.08}), series(10, **{MISMATCH: 0.01})),
    "live_false_passes": (
        "grpo",
        series(60, reward_check__false_pass_rate=every(50, lambda s: 0.02)),
        series(60, reward_check__false_pass_rate=every(50, lambda s: 0.0)),
    ),
    "canary_paid": (
        "grpo",
        series(60, reward_check__canary_paid_rate=every(50, lambda s: 0.25), reward_check__canary_reward=0.3),
        series(60, reward_check__canary_paid_rate=every(50, lambda s: 0.0), reward_check__canary_reward=0.5),
    ),
    "judge_fails": ("grpo", series(10, judge__failed=0.1), series(10, judge__failed=lambda s: 0.0 if s % 5 else 0.05)),
    "judge_drift": ("grpo", series(60, judge__agreement=every(50, lambda s: 0.7)), series(60, judge__agreement=every(50, lambda s: 0.85))),
    "rollout_starvation": (
        "grpo",
        series(20, time__rollout_s=19.0, time__train_s=1.0),
        series(20, time__rollout_s=17.0, time__train_s=3.0),
    ),
}  # fmt: skip


def _findings(kind, reports, changes=None):
    monitor = Monitor(kind, rules_for(kind, changes))
    return [finding for report in reports for finding in monitor.observe(report)]


def test_every_rule_has_a_case():
    assert set(CASES) == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", CASES)
def test_the_rule_fires(name):
    kind, fault, _ = CASES[name]
    finding = next(f for f in _findings(kind, fault) if f.rule == name)
    rule = next(rule for rule in RULES if rule.name == name)
    assert (finding.severity, finding.action) == (rule.severity, rule.action)
    assert finding.evidence and finding.message.endswith(rule.advice)
    assert "{" not in finding.message and len(finding.message) > len(rule.advice) + 10


@pytest.mark.parametrize("name", CASES)
def test_the_rule_is_silent(name):
    kind, _, healthy = CASES[name]
    assert name not in {finding.rule for finding in _findings(kind, healthy)}


def test_hard_rules_are_those_after_which_going_on_is_pointless():
    assert {rule.name for rule in RULES if rule.severity is Severity.HARD} == {
        "nonfinite",
        "zero_gradient",
        "policy_not_moving",
        "updates_skipped",
    }
    assert all(rule.action == "rollback" for rule in RULES if rule.severity is Severity.HARD)


def test_the_table_is_sound():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule.action in ACTIONS and set(rule.learns_from) <= set(get_args(LearnsFrom))
        assert rule.advice.endswith(".") and not rule.message.endswith(".")


def test_equal_groups_that_are_solved_or_hopeless_are_not_a_collapse():
    """Mastered prompts are no fault: they are reported as information only."""
    solved = series(20, frac_reward_zero_std=0.98, frac_reward_all_right=0.96, frac_reward_all_wrong=0.0)
    assert {(f.rule, f.severity) for f in _findings("grpo", solved)} == {("mastered_prompts", Severity.INFO)}


def test_metrics_of_a_generation_batch_count_though_they_are_not_logged_every_step():
    """Four optimizer steps per generation batch: the rewards stand in every fourth report."""
    assert "reward_falls" in {
        f.rule
        for f in _findings(
            "grpo", series(64, reward=every(4, lambda s: 0.5 - s / 120), reward_std=every(4, lambda s: 0.4))
        )
    }


def test_steps_without_any_advantage_do_not_count_as_zero_gradient():
    quiet = series(20, grad_norm=0.0, frac_reward_zero_std=1.0)
    assert "zero_gradient" not in {f.rule for f in _findings("grpo", quiet)}
    assert "zero_gradient" in {f.rule for f in _findings("grpo", series(20, grad_norm=0.0, frac_reward_zero_std=0.5))}


def test_missing_metrics_fire_nothing():
    for kind in ("sft", "dpo", "grpo"):
        assert _findings(kind, series(100, learning_rate=1e-4)) == []


def test_thresholds_severity_and_action_can_be_changed():
    reports = series(10, kl=0.3)
    assert _findings("grpo", reports) == []
    (finding,) = _findings("grpo", reports, {"kl_drift": {"limit": 0.2, "severity": "hard", "action": "stop"}})
    assert (finding.rule, finding.severity, finding.action) == ("kl_drift", Severity.HARD, "stop")
    assert _findings("grpo", reports, {"kl_drift": {"limit": 0.2, "enabled": False}}) == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"kl_drfit": {}}, "health.kl_drfit: no such rule; did you mean kl_drift?"),
    ({"kl_drift": {"limt": 1}}, "health.kl_drift.limt: no such key; did you mean limit?"),
    ({"kl_drift": {"limit": "high"}}, "health.kl_drift.limit: got 'high', expected a number"),
    ({"kl_drift": {"action": "panic"}}, "health.kl_drift.action: got 'panic', expected one of log, warn"),
    ({"kl_drift": {"action": "skip_step"}}, "health.kl_drift.action: skip_step needs a rule that is judged before the update (nonfinite,"),
    ({"kl_drift": {"severity": "bad"}}, "health.kl_drift.severity: got 'bad', expected one of info, soft, hard"),
])  # fmt: skip
def test_a_wrong_change_is_refused_with_the_fix(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        rules_for("grpo", changes)


@pytest.mark.parametrize("action", ["resample", "raise_group_size", "raise_entropy"])
def test_what_only_rl_can_do_is_refused_elsewhere(action):
    change = {"nonfinite": {"action": action}}
    assert rules_for("grpo", change)[0].action == action
    for kind in ("sft", "dpo"):
        with pytest.raises(ConfigError, match=f"health.nonfinite.action: got '{action}', expected one of log, warn"):
            rules_for(kind, change)


@pytest.mark.parametrize(("severity", "action"), [("info", "log"), ("soft", "evaluate"), ("hard", "rollback")])
def test_another_severity_brings_its_action(severity, action):
    rules = {
        rule.name: rule
        for rule in rules_for("grpo", {"kl_drift": {"severity": severity}, "nonfinite": {"severity": severity}})
    }
    assert rules["kl_drift"].action == rules["nonfinite"].action == action


def test_the_action_of_a_row_stays_with_its_own_severity():
    (rule,) = [r for r in rules_for("grpo", {"all_wrong": {"severity": "soft"}}) if r.name == "all_wrong"]
    assert rule.action == "resample"


AHEAD = {"time__rollout_s": 0.0, "time__train_s": 1.0}


@pytest.mark.parametrize(
    ("trainer", "engine", "needed"),
    [(0.6, 0.0, "need 2.5 times the engines"), (0.0, 0.8, "need 0.2 times the engines")],
)
def test_starvation_says_which_side_to_give_more_and_how_much(trainer, engine, needed):
    reports = series(20, time__trainer_idle=trainer, time__engine_idle=engine, **AHEAD)
    found = [f for f in _findings("grpo", reports) if f.rule == "rollout_starvation"]
    assert found and needed in found[0].message
    assert f"the trainer waits {trainer:.0%} of the time and the engine {engine:.0%}" in found[0].message
    quiet = series(20, time__trainer_idle=0.4, time__engine_idle=0.4, **AHEAD)
    assert not [f for f in _findings("grpo", quiet) if f.rule == "rollout_starvation"]


def test_samples_of_older_weights_are_no_mismatch_of_the_sampler():
    far = {"sampling__sampling_logp_difference__mean": 0.2}
    assert [f.rule for f in _findings("grpo", series(20, **far))] == ["sampler_mismatch"]
    assert not _findings("grpo", series(20, sampling__staleness__mean=0.9, **far))


def test_a_validation_set_with_a_name_is_watched_for_overfitting_and_a_part_of_its_loss_is_not():
    def fired(**metrics):
        monitor = Monitor("sft")
        return [f.rule for report in series(50, **metrics) for f in monitor.observe(report) if f.rule == "overfitting"]

    assert fired(eval_math_loss=RISING, eval_chat_loss=every(10, lambda s: 1.0))
    assert fired(eval_math_loss=RISING, eval_loss=every(10, lambda s: 1.0))
    assert not fired(eval_nll_loss=RISING, nll_loss=1.0, eval_loss=every(10, lambda s: 1.0))
    assert not fired(eval_math_aux_loss=RISING, aux_loss=1.0, eval_math_loss=every(10, lambda s: 1.0))
