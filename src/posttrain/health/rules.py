"""The table of health rules, and how a configuration changes a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from posttrain.config.kinds import LearnsFrom, stage_kind
from posttrain.config.schema import did_you_mean_or_one_of
from posttrain.errors import ConfigError
from posttrain.health import checks
from posttrain.health.checks import Evidence
from posttrain.types import Severity

ACTIONS: dict[str, str] = {
    "log": "write it down",
    "warn": "write it down and show it",
    "evaluate": "evaluate now, and hold promotion",
    "hold": "hold promotion",
    "resample": "pass over prompts that were last all solved or all failed; the next time, double num_generations",
    "raise_group_size": "double num_generations, up to four times what was set",
    "skip_step": "throw this step's update away",
    "lower_learning_rate": "halve the learning rate",
    "raise_beta": "double the pull to the reference, then steer it",
    "raise_entropy": "steer an entropy bonus until the entropy is back",
    "rollback": "return to the last healthy checkpoint with something changed; after the last allowed time, stop",
    "stop": "stop with the diagnosis",
}
"""What a finding makes the loop do."""

GUARDS = frozenset({"skip_step", "rollback", "stop"})
"""Actions that keep a bad update out; an early rule with one of them is never quiet."""

HOLDING = frozenset({"evaluate", "hold"})
"""Actions after which a model is not promoted."""

_DEFAULT_ACTION = {Severity.INFO: "log", Severity.SOFT: "evaluate", Severity.HARD: "rollback"}
_SAMPLING_ONLY = frozenset({"resample", "raise_group_size"})

_IMITATING: tuple[LearnsFrom, ...] = ("examples",)
_PREFERRING: tuple[LearnsFrom, ...] = ("pairs",)
_COMPARING: tuple[LearnsFrom, ...] = (*_PREFERRING, "rated pairs")
_RATING: tuple[LearnsFrom, ...] = ("rated steps",)
_SAMPLING: tuple[LearnsFrom, ...] = ("samples",)
_TAUGHT: tuple[LearnsFrom, ...] = ("teachers",)
_ALL = (*_IMITATING, *_COMPARING, *_RATING, *_SAMPLING, *_TAUGHT)


@dataclass(frozen=True, slots=True)
class Rule:
    """One row, for the kinds of stages that learn from one of `learns_from`. `message` is formatted with the evidence (`/` in a name becomes `_`); `advice` says what to change.

    An `early` rule needs only what is known before the update, and is judged before it is made.
    """

    name: str
    learns_from: tuple[LearnsFrom, ...]
    check: Callable[..., Evidence | None]
    thresholds: Mapping[str, float]
    severity: Severity
    action: str
    message: str
    advice: str
    early: bool = False


RULES: tuple[Rule, ...] = (
    Rule("nonfinite", _ALL, checks.nonfinite, {}, Severity.HARD, "rollback",
         "a metric is not a number", "Lower learning_rate, set max_grad_norm, and look at the rows of this step.", early=True),
    Rule("zero_gradient", _ALL, checks.zero_gradient, {"steps": 5, "at_most": 1e-12}, Severity.HARD, "rollback",
         "the gradient was zero for {steps:.0f} steps in a row", "Check the loss mask and that something is trainable (adapter, lora_target)."),
    Rule("policy_not_moving", _ALL, checks.policy_not_moving, {"steps": 5, "at_most": 0.0}, Severity.HARD, "rollback",
         "the weights did not change for {steps:.0f} steps although there was a gradient of norm {grad_norm:.3g}",
         "Check that the optimizer holds the adapter's parameters, and that learning_rate is not lost in bf16 rounding."),
    Rule("gradient_spike", _ALL, checks.gradient_spike, {"times": 5, "after": 16, "at_least": 1.0}, Severity.SOFT, "evaluate",
         "gradient norm {grad_norm:.3g} against at most {largest:.3g} before", "Look at the rows of this step; lower max_grad_norm or learning_rate.", early=True),
    Rule("router_collapse", _ALL, checks.router_collapse, {"steps": 5, "floor": 0.05, "share": 0.5}, Severity.SOFT, "evaluate",
         "in one layer nearly all tokens go to the same experts: the balance of loads is {router_balance:.2f}, from {start:.2f} at the start",
         "Lower learning_rate, or raise router_aux_loss_coef in the model's config.json."),
    Rule("loss_divergence", _IMITATING + _COMPARING + _RATING, checks.loss_divergence, {"steps": 5, "times": 1.5, "nats": 0.5}, Severity.SOFT, "evaluate",
         "the loss is {loss:.3f}, up from {start:.3f} at the start", "Lower learning_rate, or give it a warmup.", early=True),
    Rule("updates_skipped", _ALL, checks.updates_skipped, {"steps": 10}, Severity.HARD, "rollback",
         "the updates of {steps:.0f} steps in a row were thrown away", "See the findings before this one: what skips every step is no single bad batch."),
    Rule("zero_loss", _IMITATING, checks.zero_loss, {"steps": 3, "at_most": 1e-6}, Severity.SOFT, "evaluate",
         "the loss was {loss:.1e} for {steps:.0f} steps", "Nothing is left to learn or nothing is trained: see the masks with `posttrain data`."),
    Rule("masked_out", _IMITATING + _TAUGHT, checks.masked_out, {}, Severity.SOFT, "evaluate",
         "a step had no trained token", "See the masks with `posttrain data`; check train_on and the chat template.", early=True),
    Rule("overfitting", _IMITATING + _RATING + _TAUGHT, checks.overfitting, {"evals": 2, "rise": 0.2}, Severity.SOFT, "evaluate",
         "validation loss {eval_loss:.3f} keeps rising from its best {best:.3f}", "Train fewer epochs, or set load_best_model_at_end."),
    Rule("margins_run_away", _PREFERRING, checks.margins_run_away, {"steps": 10, "share": 0.5, "nats": 20.0}, Severity.SOFT, "evaluate",
         "chosen answers fell to log-prob {logps_chosen:.1f} from {start:.1f} while the margins grow", "Beta is too low: raise beta, lower learning_rate, or add rpo_alpha."),
    Rule("preference_not_learned", _COMPARING, checks.preference_not_learned, {"steps": 30, "after": 60, "accuracy": 0.53, "gain": 0.01}, Severity.SOFT, "evaluate",
         "the loss stays at {loss:.3f} and only {rewards_accuracies:.0%} of the pairs are ordered", "learning_rate is too low, or (dpo) beta too high; or the pairs contradict each other."),
    Rule("entropy_collapse", _SAMPLING, checks.entropy_collapse, {"steps": 10, "floor": 0.01, "share": 0.1, "mastered": 0.5}, Severity.SOFT, "evaluate",
         "entropy fell to {entropy:.4f} nats from {start:.3f}", "Raise epsilon_high, entropy_coef or temperature; lower learning_rate."),
    Rule("entropy_explosion", _SAMPLING + _TAUGHT, checks.entropy_explosion, {"steps": 5, "times": 2.0, "nats": 1.0}, Severity.SOFT, "evaluate",
         "entropy rose to {entropy:.2f} nats from {start:.2f}", "Lower learning_rate; in grpo also lower entropy_coef or raise beta."),
    Rule("kl_drift", _SAMPLING, checks.kl_drift, {"steps": 5, "limit": 0.5}, Severity.SOFT, "evaluate",
         "KL to the reference is {kl:.3f} nats per token", "Raise beta, lower learning_rate, or do fewer num_iterations."),
    Rule("teacher_gap", _SAMPLING + _TAUGHT, checks.teacher_gap, {"steps": 5, "times": 1.5, "nats": 0.5}, Severity.SOFT, "evaluate",
         "the policy is {teacher_gap:.2f} nats per token from its teacher, up from {start:.2f}", "Lower learning_rate or, in grpo, raise teacher_coef; see that the teacher's prompt does not ask for something else."),
    Rule("advantage_collapse", _SAMPLING, checks.advantage_collapse, {"steps": 10, "limit": 0.95, "mastered": 0.5}, Severity.SOFT, "evaluate",
         "{frac_reward_zero_std:.0%} of the groups have equal rewards, which teach nothing", "Choose prompts that are sometimes solved, raise num_generations, or set dynamic_sampling."),
    Rule("critic_explains_nothing", _SAMPLING, checks.critic_explains_nothing, {"batches": 10, "limit": 0.001}, Severity.SOFT, "evaluate",
         "the critic explains {critic_vf_explained_var:.2f} of the variance of the returns, no more than a constant would, for {batches:.0f} batches",
         "Raise critic_learning_rate or critic_warmup_steps, begin with a value_model, or widen cliprange_value: rewards larger than it are learned slowly. With gae_lambda: 1 the advantages do not rest on it."),
    Rule("all_wrong", _SAMPLING, checks.all_wrong, {"steps": 10, "limit": 0.9}, Severity.SOFT, "resample",
         "in {frac_reward_all_wrong:.0%} of the groups every answer is wrong", "Choose easier prompts, raise num_generations, or train SFT longer first."),
    Rule("mastered_prompts", _SAMPLING, checks.mastered_prompts, {"steps": 10, "limit": 0.9}, Severity.INFO, "log",
         "in {frac_reward_all_right:.0%} of the groups every answer is right: these prompts are learned", "Stop here, or add harder prompts."),
    Rule("reward_falls", _SAMPLING, checks.reward_falls, {"steps": 10, "stds": 0.75}, Severity.SOFT, "evaluate",
         "reward fell to {reward:.3f} from {start:.3f}", "Check the reward's sign with `posttrain rewards check`; lower learning_rate."),
    Rule("reward_without_score", _SAMPLING, checks.reward_without_score, {"evals": 4, "reward_gain": 0.15, "score_gain": 0.0}, Severity.SOFT, "evaluate",
         "reward rose by {reward_gain:.3f} while the held-out score changed by {score_gain:+.3f} at best", "The reward is being gamed: read the samples, and run `posttrain rewards check`."),
    Rule("length_spiral", _SAMPLING, checks.length_spiral, {"steps": 10, "times": 3.0, "tokens": 64.0}, Severity.SOFT, "evaluate",
         "answers grew to {completions_mean_length:.0f} tokens from {start:.0f}", "Set soft_overlong_cache, use loss_type dr_grpo, or check that the reward does not pay for length."),
    Rule("truncation_spiral", _SAMPLING, checks.truncation_spiral, {"steps": 5, "limit": 0.3, "rise": 0.2}, Severity.SOFT, "evaluate",
         "{completions_clipped_ratio:.0%} of the answers hit the length limit", "Raise max_completion_length, or set mask_truncated_completions or soft_overlong_cache."),
    Rule("tool_errors", _SAMPLING, checks.tool_errors, {"steps": 10, "limit": 0.5}, Severity.SOFT, "evaluate",
         "{tools_failure_frequency:.0%} of the tool calls fail", "Read the samples: are the tools' docstrings and types what the model needs to call them? Train SFT on calls first."),
    Rule("episodes_lost", _SAMPLING, checks.episodes_lost, {"steps": 5, "limit": 0.1}, Severity.SOFT, "evaluate",
         "{env_failed_ratio:.0%} of the episodes are lost to their environment", "See the reasons in the unscored samples; fix the environment, or raise env_timeout_s."),
    Rule("clip_fraction", _SAMPLING, checks.clip_fraction, {"steps": 5, "limit": 0.3}, Severity.SOFT, "evaluate",
         "{clip_ratio_region_mean:.0%} of the tokens are clipped", "Lower learning_rate, or do fewer num_iterations or steps_per_generation."),
    Rule("ratio_tails", _SAMPLING, checks.ratio_tails, {"steps": 3, "limit": 20.0}, Severity.SOFT, "evaluate",
         "a token's probability changed {importance_ratio_max:.0f}-fold within a step", "Lower learning_rate; set delta (two-sided clipping)."),
    Rule("sampler_mismatch", _SAMPLING, checks.sampler_mismatch, {"steps": 3, "limit": 0.05}, Severity.SOFT, "evaluate",
         "sampler and trainer disagree by {sampling_sampling_logp_difference_mean:.3f} nats per token", "The engine may hold old weights or another precision; set importance_sampling_correction."),
    Rule("router_mismatch", _SAMPLING, checks.router_mismatch, {"steps": 3, "limit": 0.2}, Severity.SOFT, "evaluate",
         "at {router_mismatch:.0%} of the sampled tokens and layers the trainer chooses other experts than the sampler did",
         "The engine may hold old weights or compute in another precision: set rollout.routed_experts: replay, or rollout.dtype as the trainer's; else lower learning_rate or num_iterations."),
    Rule("live_false_passes", _SAMPLING, checks.live_false_passes, {"limit": 0.01}, Severity.SOFT, "evaluate",
         "{reward_check_false_pass_rate:.1%} of the known cheats, in the form of this run's best answers, are paid", "The reward has a hole that the policy can reach: see the reward_check event, and run `posttrain rewards check`."),
    Rule("canary_paid", _SAMPLING, checks.canary_paid, {"limit": 0.1}, Severity.SOFT, "evaluate",
         "{reward_check_canary_paid_rate:.0%} of the answers to prompts without a right answer are paid", "The reward does not pay for being right: read the samples, and run `posttrain rewards check`."),
    Rule("judge_fails", _SAMPLING, checks.judge_fails, {"steps": 3, "limit": 0.02}, Severity.SOFT, "evaluate",
         "{judge_failed:.1%} of the verdicts asked for did not come or could not be read", "Their completions are left out, which biases what is learned: read the errors in `rewards/`; raise the judge's max_tokens, timeout_s or retries, or ask for the verdict more plainly."),
    Rule("judge_drift", _SAMPLING, checks.judge_drift, {"limit": 0.8}, Severity.SOFT, "evaluate",
         "asked again what it was asked first, the judge agrees with itself to {judge_agreement:.0%}",
         "Another model may answer behind the judge's name: see the server; go on from before the change, with another `cache`. If it is one that draws its verdicts, lower its temperature or raise samples."),
    Rule("rollout_starvation", _SAMPLING, checks.rollout_starvation, {"steps": 10, "limit": 0.9, "ahead": 0.5}, Severity.INFO, "log",
         "the trainer waits {trainer_idle:.0%} of the time and the engine {engine_idle:.0%}: to keep step rollouts need {engines_needed:.2g} times the engines they have",
         "Above 1 give rollouts more: rollout.replicas, max_staleness, a larger rollout_batch_size; below 1 give the trainer more; see `posttrain plan`."),
)  # fmt: skip
"""Defaults are conservative: a healthy run should stay silent."""


def rules_for(kind: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Rule, ...]:
    """The rules of a stage, with `changes`: name → {threshold: number, `severity`, `action`, `enabled`}.

    Raises: ConfigError for an unknown rule, threshold, severity or action.
    """
    changes = changes or {}
    for name in changes:
        if name not in {rule.name for rule in RULES}:
            raise ConfigError(
                f"health.{name}: no such rule{did_you_mean_or_one_of(name, [rule.name for rule in RULES])}"
            )
    rows = [(rule, changes.get(rule.name, {})) for rule in RULES if stage_kind(kind).learns_from in rule.learns_from]
    return tuple(_changed(rule, change, kind) for rule, change in rows if change.get("enabled", True))


def _changed(rule: Rule, change: Mapping[str, Any], kind: str) -> Rule:
    thresholds = dict(rule.thresholds)
    for name, value in change.items():
        if name in thresholds:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"health.{rule.name}.{name}: got {value!r}, expected a number")
            thresholds[name] = float(value)
        elif name not in ("enabled", "severity", "action"):
            raise ConfigError(
                f"health.{rule.name}.{name}: no such key{did_you_mean_or_one_of(name, [*thresholds, 'enabled', 'severity', 'action'])}"
            )
    severity = change.get("severity", rule.severity)
    if severity not in set(Severity):
        raise ConfigError(
            f"health.{rule.name}.severity: got {severity!r}, expected one of {', '.join(s.value for s in Severity)}"
        )
    # Another severity without an action means what that severity means.
    usual = rule.action if severity == rule.severity else _DEFAULT_ACTION[Severity(severity)]
    action = change.get("action", usual)
    _check_action(rule, action, kind)
    return replace(rule, thresholds=thresholds, action=action, severity=Severity(severity))


def _check_action(rule: Rule, action: Any, kind: str) -> None:
    """Raises: ConfigError for an action that does not exist, or that this rule or stage cannot carry out."""
    can = {name: stage_kind(kind).samples for name in _SAMPLING_ONLY} | {
        "raise_entropy": stage_kind(kind).has_entropy_bonus
    }
    known = [name for name in ACTIONS if can.get(name, True)]
    if action not in known:
        raise ConfigError(f"health.{rule.name}.action: got {action!r}, expected one of {', '.join(known)}")
    if action == "skip_step" and not rule.early:
        early = ", ".join(row.name for row in RULES if row.early)
        raise ConfigError(
            f"health.{rule.name}.action: skip_step needs a rule that is judged before the update ({early}); "
            "use rollback, which undoes updates"
        )
