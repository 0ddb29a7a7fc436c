"""What each rule checks: a history and thresholds in, the evidence out, None when all is well.

A metric that was not logged never fires a rule. Names are TRL's where TRL has one.
"""

from __future__ import annotations

import math
from itertools import pairwise

from posttrain.health.history import History, eval_losses, get, mean, values

Evidence = dict[str, float]

# Metrics of ours that TRL has no name for.
ALL_RIGHT = "frac_reward_all_right"
ALL_WRONG = "frac_reward_all_wrong"
UPDATE_NORM = "update_norm"
SKIPPED = "skipped_step"
LOSS_TOKENS = "loss_tokens"
DEV_SCORE = "eval_score"
RATIO_MAX = "importance_ratio/max"
ROLLOUT_S = "time/rollout_s"
TRAIN_S = "time/train_s"
TRAINER_IDLE = "time/trainer_idle"
ENGINE_IDLE = "time/engine_idle"
STALENESS = "sampling/staleness/mean"
FALSE_PASSES = "reward_check/false_pass_rate"
JUDGE_FAILED = "judge/failed"
JUDGE_AGREEMENT = "judge/agreement"
CANARY_PAID = "reward_check/canary_paid_rate"
CANARY_REWARD = "reward_check/canary_reward"
TEACHER_GAP = "teacher/gap"
CALL_FAILURES = "tools/failure_frequency"
LOST_EPISODES = "env/failed_ratio"
ROUTER_BALANCE = "router/balance"
ROUTER_MISMATCH = "router/mismatch"
CRITIC_GRAD_NORM = "critic/grad_norm"
CRITIC_EXPLAINS = "critic/vf_explained_var"

_ZERO_STD = "frac_reward_zero_std"
_LENGTH = "completions/mean_length"
_TRUNCATED = "completions/clipped_ratio"
_CLIPPED = "clip_ratio/region_mean"
_MISMATCH = "sampling/sampling_logp_difference/mean"
_WATCHED_FOR_NAN = ("loss", "grad_norm", "reward", "kl", "entropy", CRITIC_GRAD_NORM)


# --- every stage ---------------------------------------------------------------------------------------------------


def nonfinite(history: History) -> Evidence | None:
    metrics = history.newest.metrics
    broken = {
        name: float(metrics[name]) for name in _WATCHED_FOR_NAN if name in metrics and not math.isfinite(metrics[name])
    }
    return broken or None


def zero_gradient(history: History, *, steps: float, at_most: float) -> Evidence | None:
    """Groups that all scored the same have no gradient by right; a run that has just seen such a batch is not judged."""
    without_signal = any(share >= 1.0 for share in values(history.recent[-4 * int(steps) :], _ZERO_STD))
    if without_signal or not history.lasts(int(steps), lambda r: abs(get(r, "grad_norm")) <= at_most):
        return None
    return {"grad_norm": get(history.newest, "grad_norm"), "steps": steps}


def policy_not_moving(history: History, *, steps: float, at_most: float) -> Evidence | None:
    """There is a gradient and a learning rate, and yet the weights stay as they were."""
    stuck = history.lasts(
        int(steps), lambda r: get(r, UPDATE_NORM) <= at_most and get(r, "grad_norm") > 0 and get(r, "learning_rate") > 0
    )
    return (
        {UPDATE_NORM: get(history.newest, UPDATE_NORM), "grad_norm": get(history.newest, "grad_norm"), "steps": steps}
        if stuck
        else None
    )


def gradient_spike(history: History, *, times: float, after: float, at_least: float) -> Evidence | None:
    """Far above the largest of the window: gradient norms are heavy-tailed, so the usual one is no measure."""
    before = values(history.recent[:-1], "grad_norm")
    newest, largest = get(history.newest, "grad_norm"), max(before, default=math.nan)
    fired = len(before) >= after and newest > times * largest and newest > at_least
    return {"grad_norm": newest, "largest": largest} if fired else None


def updates_skipped(history: History, *, steps: float) -> Evidence | None:
    """One bad batch is passed over; when no step gets through, the weights themselves are at fault."""
    return {"steps": steps} if history.lasts(int(steps), lambda r: get(r, SKIPPED) > 0) else None


def router_collapse(history: History, *, steps: float, floor: float, share: float) -> Evidence | None:
    """Of the layer whose experts are loaded least evenly. A given model may have uneven layers; it is its start that counts."""
    start, now = history.start(ROUTER_BALANCE), history.now(ROUTER_BALANCE, int(steps))
    fired = not history.is_young and (now < floor or now < share * start)
    return {ROUTER_BALANCE: now, "start": start} if fired else None


def loss_divergence(history: History, *, steps: float, times: float, nats: float) -> Evidence | None:
    """Against the first step alone: where the learning rate is far too high, the steps after it have diverged already."""
    start, now = get(history.first[0], "loss"), history.now("loss", int(steps))
    diverged = not history.is_young and now > times * start and now > start + nats
    return {"loss": now, "start": start} if diverged else None


# --- SFT -----------------------------------------------------------------------------------------------------------


def zero_loss(history: History, *, steps: float, at_most: float) -> Evidence | None:
    fired = history.lasts(int(steps), lambda r: abs(get(r, "loss")) <= at_most)
    return {"loss": get(history.newest, "loss"), "steps": steps} if fired else None


def masked_out(history: History) -> Evidence | None:
    return {LOSS_TOKENS: 0.0} if get(history.newest, LOSS_TOKENS) == 0 else None


def overfitting(history: History, *, evals: float, rise: float) -> Evidence | None:
    """The loss on a validation set rose `evals` times in a row and stands a share `rise` above its best."""
    for name in eval_losses(history.evaluated[-1]) if history.evaluated else ():
        losses = values(history.evaluated, name)
        last = losses[-int(evals) - 1 :]
        rising = len(last) == int(evals) + 1 and all(a < b for a, b in pairwise(last))
        if rising and last[-1] > (1 + rise) * min(losses):
            return {"eval_loss": last[-1], "best": min(losses)}
    return None


# --- DPO -----------------------------------------------------------------------------------------------------------


def margins_run_away(history: History, *, steps: float, share: float, nats: float) -> Evidence | None:
    """Margins grow while the chosen answers themselves become far less likely."""
    start, now = history.start("logps/chosen"), history.now("logps/chosen", int(steps))
    fall = start - now
    margin, first_margin = history.now("rewards/margins", int(steps)), history.start("rewards/margins")
    fired = not history.is_young and fall > share * abs(start) and fall > nats and margin > first_margin
    return {"logps/chosen": now, "start": start, "rewards/margins": margin} if fired else None


def preference_not_learned(
    history: History, *, steps: float, after: float, accuracy: float, gain: float
) -> Evidence | None:
    loss, start, right = (
        history.now("loss", int(steps)),
        history.start("loss"),
        history.now("rewards/accuracies", int(steps)),
    )
    flat = loss > (1 - gain) * start and right < accuracy
    return (
        {"loss": loss, "start": start, "rewards/accuracies": right} if history.newest.step >= after and flat else None
    )


# --- RL ------------------------------------------------------------------------------------------------------------


def entropy_collapse(history: History, *, steps: float, floor: float, share: float, mastered: float) -> Evidence | None:
    """A policy that solves nearly everything may be sure of itself: that is no collapse."""
    start, now = history.start("entropy"), history.now("entropy", int(steps))
    solved = history.now(ALL_RIGHT, int(steps)) >= mastered
    fired = not history.is_young and now < floor and now < share * start and not solved
    return {"entropy": now, "start": start, "target": max(floor, share * start)} if fired else None


def entropy_explosion(history: History, *, steps: float, times: float, nats: float) -> Evidence | None:
    start, now = history.start("entropy"), history.now("entropy", int(steps))
    return (
        {"entropy": now, "start": start}
        if not history.is_young and now > times * start and now > start + nats
        else None
    )


def above(history: History, name: str, steps: float, limit: float) -> Evidence | None:
    """The mean of `name` over the last steps is above `limit`."""
    now = history.now(name, int(steps))
    return {name: now, "limit": limit} if now > limit else None


def kl_drift(history: History, *, steps: float, limit: float) -> Evidence | None:
    return above(history, "kl", steps, limit)


def teacher_gap(history: History, *, steps: float, times: float, nats: float) -> Evidence | None:
    """The policy moves away from who teaches it."""
    start, now = history.start(TEACHER_GAP), history.now(TEACHER_GAP, int(steps))
    away = now > start + max((times - 1) * abs(start), nats)
    return {TEACHER_GAP: now, "start": start} if not history.is_young and away else None


def clip_fraction(history: History, *, steps: float, limit: float) -> Evidence | None:
    return above(history, _CLIPPED, steps, limit)


def sampler_mismatch(history: History, *, steps: float, limit: float) -> Evidence | None:
    """Of samples of older weights the difference is the policy's own way since; the canary looks at the transfer then."""
    if any(staleness > 0 for staleness in values(history.recent[-int(steps) :], STALENESS)):
        return None
    return above(history, _MISMATCH, steps, limit)


def router_mismatch(history: History, *, steps: float, limit: float) -> Evidence | None:
    """As `sampler_mismatch`, of the experts that are chosen."""
    if any(staleness > 0 for staleness in values(history.recent[-int(steps) :], STALENESS)):
        return None
    return above(history, ROUTER_MISMATCH, steps, limit)


def ratio_tails(history: History, *, steps: float, limit: float) -> Evidence | None:
    """The first update of a generation batch has ratio 1 by definition and logs none: it is left out."""
    known = values(history.recent, RATIO_MAX)[-int(steps) :]
    fired = len(known) == int(steps) and min(known) > limit
    return {RATIO_MAX: known[-1], "limit": limit} if fired else None


def advantage_collapse(history: History, *, steps: float, limit: float, mastered: float) -> Evidence | None:
    """Almost no group has a spread of rewards, and not because most of them are solved."""
    equal, right = history.now(_ZERO_STD, int(steps)), history.now(ALL_RIGHT, int(steps))
    return {_ZERO_STD: equal, ALL_RIGHT: right} if equal > limit and not right >= mastered else None


def critic_explains_nothing(history: History, *, batches: float, limit: float) -> Evidence | None:
    """The values say no more of the returns than a constant would; batches in which only the critic learned do not count."""
    known = [get(report, CRITIC_EXPLAINS) for report in history.recent if not math.isnan(get(report, "grad_norm"))]
    known = [value for value in known if math.isfinite(value)][-int(batches) :]
    fired = len(known) == int(batches) and max(known) <= limit
    return {CRITIC_EXPLAINS: known[-1], "batches": batches} if fired else None


def all_wrong(history: History, *, steps: float, limit: float) -> Evidence | None:
    return above(history, ALL_WRONG, steps, limit)


def mastered_prompts(history: History, *, steps: float, limit: float) -> Evidence | None:
    return above(history, ALL_RIGHT, steps, limit)


def reward_falls(history: History, *, steps: float, stds: float) -> Evidence | None:
    start, now, std = history.start("reward"), history.now("reward", int(steps)), history.start("reward_std")
    fired = not history.is_young and std > 0 and now < start - stds * std
    return {"reward": now, "start": start, "reward_std": std} if fired else None


def reward_without_score(history: History, *, evals: float, reward_gain: float, score_gain: float) -> Evidence | None:
    """Reward rose since the first evaluation while no later one of the last `evals` had a better held-out score."""
    scored = [r for r in history.evaluated if math.isfinite(get(r, DEV_SCORE)) and math.isfinite(get(r, "reward"))]
    if len(scored) < evals:
        return None
    # The best of the later ones: scores of a hundred items go up and down, and a run that once got better is learning.
    reward = mean([get(r, "reward") for r in scored[-2:]]) - get(scored[0], "reward")
    score = max(get(r, DEV_SCORE) for r in scored[1 - int(evals) :]) - get(scored[0], DEV_SCORE)
    return {"reward_gain": reward, "score_gain": score} if reward > reward_gain and score < score_gain else None


def length_spiral(history: History, *, steps: float, times: float, tokens: float) -> Evidence | None:
    start, now = history.start(_LENGTH), history.now(_LENGTH, int(steps))
    return (
        {_LENGTH: now, "start": start}
        if not history.is_young and now > times * start and now > start + tokens
        else None
    )


def truncation_spiral(history: History, *, steps: float, limit: float, rise: float) -> Evidence | None:
    start, now = history.start(_TRUNCATED), history.now(_TRUNCATED, int(steps))
    return {_TRUNCATED: now, "start": start} if not history.is_young and now > limit and now > start + rise else None


def judge_fails(history: History, *, steps: float, limit: float) -> Evidence | None:
    """Verdicts do not come or cannot be read; the completions are left out."""
    return above(history, JUDGE_FAILED, steps, limit)


def judge_drift(history: History, *, limit: float) -> Evidence | None:
    """A judge no longer says what it said of the same answers when the run began."""
    agreement = get(history.newest, JUDGE_AGREEMENT)
    return {JUDGE_AGREEMENT: agreement, "limit": limit} if agreement < limit else None


def tool_errors(history: History, *, steps: float, limit: float) -> Evidence | None:
    """Young runs are still learning how a call is written."""
    return None if history.is_young else above(history, CALL_FAILURES, steps, limit)


def episodes_lost(history: History, *, steps: float, limit: float) -> Evidence | None:
    return above(history, LOST_EPISODES, steps, limit)


def rollout_starvation(history: History, *, steps: float, limit: float, ahead: float) -> Evidence | None:
    """One side waits for the other. Taking turns the trainer waits for all that is sampled; ahead either may wait, beyond `ahead`."""
    trainer, engine = history.now(TRAINER_IDLE, int(steps)), history.now(ENGINE_IDLE, int(steps))
    if math.isnan(trainer) or math.isnan(engine):
        rollout, train = history.now(ROLLOUT_S, int(steps)), history.now(TRAIN_S, int(steps))
        trainer = rollout / (rollout + train) if rollout + train > 0 else math.nan
        engine, starves = 1.0 - trainer, trainer > limit
    else:
        starves = max(trainer, engine) > ahead
    needed = (1.0 - engine) / max(1.0 - trainer, 1e-6)
    return {"trainer_idle": trainer, "engine_idle": engine, "engines_needed": needed} if starves else None


def live_false_passes(history: History, *, limit: float) -> Evidence | None:
    """Known cheats, replayed on live samples, earn more than a wrong answer."""
    rate = get(history.newest, FALSE_PASSES)
    return {FALSE_PASSES: rate} if rate > limit else None


def canary_paid(history: History, *, limit: float) -> Evidence | None:
    """Prompts whose reference nobody can hit are paid all the same."""
    rate = get(history.newest, CANARY_PAID)
    return {CANARY_PAID: rate, CANARY_REWARD: get(history.newest, CANARY_REWARD)} if rate > limit else None
