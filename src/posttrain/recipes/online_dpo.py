"""Online DPO: preferences among the policy's own completions. Read `run` from top to bottom.

A generation batch of P prompts × G completions is sampled and scored as in `grpo.py`. The best and the worst of each prompt are a pair,
and from there on it is a step of `dpo.py`: the same losses, against the same reference. Source: arXiv 2402.04792, alg. 1.
"""

from __future__ import annotations

from functools import partial

from posttrain.config.online_dpo import OnlineDPOKeys
from posttrain.data.dataset import Dataset
from posttrain.models.policy import Policy
from posttrain.protocols import Scorer
from posttrain.recipes.batches import for_rank
from posttrain.recipes.dpo import step_loss
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import accumulating, learning_rate, update
from posttrain.recipes.policy_step import num_tokens
from posttrain.recipes.ptx import learn_from
from posttrain.recipes.reference import Reference
from posttrain.recipes.rl import EMPTY_STEP, begun
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.steering import steered
from posttrain.recipes.sampled_pairs import PairCredit, pair_micros, pair_objective, pair_rows
from posttrain.types import PromptRow


def run(keys: OnlineDPOKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` on the prompts in `keys.datasets`; the result is in `stage.folder`."""
    objective = pair_objective(keys)

    def credit_of(policy: Policy, trainer: Scorer, data: Dataset[PromptRow]) -> PairCredit:
        return PairCredit(keys)

    with begun(keys, stage, credit_of) as rl:
        policy, state, ptx, ranks = rl.policy, rl.state, rl.ptx, stage.ranks
        reference = Reference(policy, keys.ld_alpha) if objective.needs_reference else None
        for step, experience, position, rollout_s in rl.source:
            groups = experience.part(position % keys.steps_per_generation, keys.steps_per_generation)
            paired = list(filter(partial(rl.credit.teaches, controls=stage.guard.controls), groups))
            micros = pair_micros(pair_rows(paired), keys.per_device_train_batch_size, ranks.world_size)
            spec, metrics = steered(objective, stage.guard.controls), StepMetrics()
            loss = step_loss(policy, reference, micros, spec, stage, measures_kl=True) if micros else None
            supervised = ptx.of_step(step) if ptx else []
            policy.model.train()
            for micro in accumulating(policy, for_rank(micros, ranks), more=bool(supervised)):
                assert loss is not None
                micro.learn(loss(micro.rows), metrics)
            learn_from(policy, supervised, keys.ptx_coef, keys.per_device_train_batch_size, ranks, metrics)
            values = metrics.reduced(ranks) | (experience.metrics if position == 0 else {})
            if micros or supervised:
                lr = learning_rate(step, rl.total_steps, keys) * stage.guard.controls.lr_scale
                values |= update(policy, rl.optimizer, stage, lr, values, step + 1)
                state.tokens += num_tokens(paired)
            else:
                # Every group was tied: nothing moves, not even by AdamW's momentum.
                values[EMPTY_STEP] = 1.0
                state.empty_steps += 1
            rl.finish_step(stage, step, values, rollout_s)

        rl.validation.restore_best()
    return stage.done(state)
