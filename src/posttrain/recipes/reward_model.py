"""A reward model: preferences with margins, both answers attending to one copy of their prompt. Read `run` from top to bottom.

The model is a transformers sequence-classification model with one label: `AutoModelForSequenceClassification` loads it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from posttrain.config.stages import RewardModelKeys
from posttrain.data.dataset import Dataset
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import ComparedRow, load_comparisons
from posttrain.data.rows import MappedRows
from posttrain.models.batch import common_prefix, pack
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.reward_head import up_to_reward
from posttrain.models.text import decoder
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.reward_model import reward_model_loss
from posttrain.objectives.terms import LossTerms
from posttrain.recipes.balance import family_cost
from posttrain.recipes.batches import Schedule, flat, for_rank
from posttrain.recipes.example_run import ExampleRun, held_out_metrics
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import accumulating
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage


def run(keys: RewardModelKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` under a new head on the preferences in `keys.datasets`; the result is in `stage.folder`."""
    tokenizer = load_tokenizer(keys)
    data, held_out = load_with_held_out(load_comparisons, keys, tokenizer)
    stage.run.describe_data(decoder(tokenizer, special=True), data, *held_out.values())
    pad: Any = tokenizer.pad_token_id
    data, held_out = _cut(data, pad), {name: _cut(rows, pad) for name, rows in held_out.items()}
    schedule = Schedule.of(data, keys, stage.ranks, size=_num_tokens, cost=_pair_cost)
    policy = load_policy(keys, tokenizer=tokenizer, sharding=stage.sharding).without_dropout()
    measure = partial(validation_loss, policy, keys=keys, stage=stage)
    examples = ExampleRun.begun(policy, schedule, held_out, measure, keys, stage)

    for step, micros in examples.steps():
        norm = Normalizer(tokens=0, sequences=len(flat(micros)))
        metrics = StepMetrics()
        policy.model.train()
        for micro in accumulating(policy, for_rank(micros, stage.ranks)):
            micro.learn(loss(policy, micro.rows, keys.center_rewards_coefficient, norm), metrics)
        examples.finish_step(step, micros, metrics.reduced(stage.ranks))
    return examples.done()


def loss(policy: Policy, rows: list[ComparedRow], center_rewards_coefficient: float, norm: Normalizer) -> LossTerms:
    """This micro-batch's share of the step's loss."""
    reward_S = policy.rewards(pack([(chosen, rejected) for chosen, rejected, _ in rows]))
    margin_P = torch.tensor([margin for *_, margin in rows], device=reward_S.device)
    return reward_model_loss(reward_S[0::2], reward_S[1::2], margin_P, center_rewards_coefficient, norm)


def validation_loss(
    policy: Policy, rows: Dataset[ComparedRow], keys: RewardModelKeys, stage: Stage
) -> dict[str, float]:
    """The objective and its metrics over all held-out pairs."""
    norm = Normalizer(tokens=0, sequences=len(rows))
    each = partial(loss, policy, center_rewards_coefficient=keys.center_rewards_coefficient, norm=norm)
    return held_out_metrics(policy, rows, each, keys, stage)


def _cut(data: Dataset[ComparedRow], pad_token_id: int) -> Dataset[ComparedRow]:
    def cut(row: ComparedRow) -> ComparedRow:
        chosen, rejected, margin = row
        return up_to_reward(chosen, pad_token_id), up_to_reward(rejected, pad_token_id), margin

    return replace(data, rows=MappedRows(data.rows, cut))


def _pair_cost(row: ComparedRow) -> float:
    chosen, rejected, _ = row
    return family_cost([len(chosen.ids), len(rejected.ids)], shared=common_prefix([chosen.ids, rejected.ids]))


def _num_tokens(row: ComparedRow) -> int:
    return len(row[0].ids) + len(row[1].ids)
