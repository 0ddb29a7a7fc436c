"""PPO: RL with a critic. Read `run` from top to bottom.

A generation batch is sampled and scored as in `grpo.py`, valued by the critic, and then trained on by both, in `steps_per_generation`
optimizer steps, `num_iterations` times over. In the first `critic_warmup_steps` only the critic learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from posttrain.config.ppo import PPOKeys
from posttrain.data.dataset import Dataset
from posttrain.health.checks import SKIPPED
from posttrain.models.policy import Policy
from posttrain.protocols import Scorer
from posttrain.recipes.critic import CriticCredit, critic_loss, load_critic
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import accumulating, learning_rate, take_step, update
from posttrain.recipes.policy_step import loss, micro_batches_of, normalizer, num_tokens, select_tokens
from posttrain.recipes.ptx import learn_from
from posttrain.recipes.rl import EMPTY_STEP, RLRun, begun, is_uncorrected
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.steering import steered
from posttrain.types import PromptRow


def run(keys: PPOKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` and a critic on the prompts in `keys.datasets`; the result is in `stage.folder`."""

    def credit_of(policy: Policy, trainer: Scorer, data: Dataset[PromptRow]) -> CriticCredit:
        return CriticCredit(keys, load_critic(keys, policy), stage.ranks)

    with begun(keys, stage, credit_of) as rl:
        policy, credit, state, ptx, ranks = rl.policy, rl.credit, rl.state, rl.ptx, stage.ranks
        critic = credit.critic
        for step, experience, position, rollout_s in rl.source:
            fresh, warming = position == 0, step < keys.critic_warmup_steps
            groups = experience.part(position % keys.steps_per_generation, keys.steps_per_generation)
            # The first step of a batch is on-policy: the ratio is 1 by definition, not by subtraction.
            on_policy = fresh and not is_uncorrected(keys)
            norm, objective = normalizer(groups, keys), steered(credit.objective, stage.guard.controls)
            selection: dict[str, float] = {}
            if not warming:
                groups, selection = select_tokens(policy, groups, objective, keys, ranks, step, on_policy=on_policy)
            metrics, teaches = StepMetrics(), partial(credit.teaches, controls=stage.guard.controls)
            micros = micro_batches_of(groups, teaches, keys.per_device_train_batch_size, ranks)
            supervised = ptx.of_step(step) if ptx and not warming else []
            critic.policy.model.train()
            for micro in accumulating(critic.policy, micros):
                micro.learn(
                    critic_loss(critic.policy, micro.rows, keys.cliprange_value, norm), metrics, weight=keys.vf_coef
                )
            policy.model.train()
            for micro in accumulating(policy, [] if warming else micros, more=bool(supervised)):
                micro.learn(loss(policy, micro.rows, objective, norm, keys, on_policy=on_policy), metrics)
            learn_from(policy, supervised, keys.ptx_coef, keys.per_device_train_batch_size, ranks, metrics)
            values = metrics.reduced(ranks) | selection | (experience.metrics if fresh else {})
            if micros or supervised:
                values |= _update(rl, stage, keys, values, warming=warming)
                state.tokens += num_tokens(groups)
            else:
                values[EMPTY_STEP] = 1.0
                state.empty_steps += 1
            rl.finish_step(stage, step, values, rollout_s)

        rl.validation.restore_best()
    return stage.done(state)


def _update(
    rl: RLRun[CriticCredit], stage: Stage, keys: PPOKeys, values: Mapping[str, float], *, warming: bool
) -> dict[str, float]:
    """A step of both, or of the critic alone; of neither where a health rule says so."""
    step, critic, scale = rl.state.step, rl.credit.critic, stage.guard.controls.lr_scale
    lr, critic_lr = (scale * learning_rate(step, rl.total_steps, of) for of in (keys, keys.critic))
    parameters = [p for _, p in critic.policy.trainable()]
    report = {"critic/grad_norm": critic.policy.sharding.clip_grad_norm(parameters, keys.max_grad_norm)}
    report["critic/lr"] = critic_lr
    if not warming:
        report |= update(rl.policy, rl.optimizer, stage, lr, {**values, **report}, step + 1)
    elif not stage.guard.allows(step + 1, {**values, **report}):
        report[SKIPPED] = 1.0
    if SKIPPED in report:
        critic.optimizer.zero_grad(set_to_none=True)
    else:
        take_step(critic.optimizer, critic_lr)
    return report
