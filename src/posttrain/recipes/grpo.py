"""RL with verifiable rewards: GRPO and its family. Read `run` from top to bottom.

A generation batch of P prompts × G completions is sampled and scored, then trained on in `steps_per_generation`
optimizer steps, `num_iterations` times over. Which member of the family it is, is a row of `POLICY_LOSSES`.
"""

from __future__ import annotations

from functools import partial

from posttrain.config.rl import GRPOKeys
from posttrain.data.dataset import Dataset
from posttrain.models.policy import Policy
from posttrain.protocols import Scorer
from posttrain.recipes.credit import GroupCredit
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import accumulating, learning_rate, update
from posttrain.recipes.policy_step import loss, micro_batches_of, normalizer, num_tokens, select_tokens
from posttrain.recipes.ptx import learn_from
from posttrain.recipes.rl import EMPTY_STEP, begun, is_uncorrected
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.steering import steered
from posttrain.recipes.teachers import Teachers
from posttrain.types import PromptRow


def run(keys: GRPOKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` on the prompts in `keys.datasets`; the result is in `stage.folder`."""

    def credit_of(policy: Policy, trainer: Scorer, data: Dataset[PromptRow]) -> GroupCredit:
        teachers = Teachers.of(keys.teachers, keys, policy, stage.ranks)
        if keys.teachers:
            teachers.check(data, keys.sequence_len - keys.max_completion_length)
        return GroupCredit(keys, teachers, trainer)

    with begun(keys, stage, credit_of) as rl:
        policy, credit, state, ptx, ranks = rl.policy, rl.credit, rl.state, rl.ptx, stage.ranks
        for step, experience, position, rollout_s in rl.source:
            fresh = position == 0
            groups = experience.part(position % keys.steps_per_generation, keys.steps_per_generation)
            # The first step of a batch is on-policy: the ratio is 1 by definition, not by subtraction.
            on_policy = fresh and not is_uncorrected(keys)
            counted = [group for group in groups if num_tokens([group])] if keys.zero_variance_filtering else groups
            norm, objective = normalizer(counted, keys), steered(credit.objective, stage.guard.controls)
            groups, selection = select_tokens(policy, groups, objective, keys, ranks, step, on_policy=on_policy)
            metrics, teaches = StepMetrics(), partial(credit.teaches, controls=stage.guard.controls)
            micros = micro_batches_of(groups, teaches, keys.per_device_train_batch_size, ranks)
            supervised = ptx.of_step(step) if ptx else []
            policy.model.train()
            for micro in accumulating(policy, micros, more=bool(supervised)):
                micro.learn(loss(policy, micro.rows, objective, norm, keys, on_policy=on_policy), metrics)
            learn_from(policy, supervised, keys.ptx_coef, keys.per_device_train_batch_size, ranks, metrics)
            values = metrics.reduced(ranks) | selection | (experience.metrics if fresh else {})
            if micros or supervised:
                lr = learning_rate(step, rl.total_steps, keys) * stage.guard.controls.lr_scale
                values |= update(policy, rl.optimizer, stage, lr, values, step + 1)
                state.tokens += num_tokens(filter(teaches, groups))
            else:
                # Nothing had a difference in reward: nothing moves, not even by AdamW's momentum.
                values[EMPTY_STEP] = 1.0
                state.empty_steps += 1
            rl.finish_step(stage, step, values, rollout_s)

        rl.validation.restore_best()
    return stage.done(state)
