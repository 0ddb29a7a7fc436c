"""A process reward model: of each step of an answer, whether it is right. Read `run` from top to bottom.

The model is a transformers token-classification model with two labels: `AutoModelForTokenClassification` loads it, as it does
those of TRL's PRMTrainer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from posttrain.config.process_reward import ProcessRewardModelKeys
from posttrain.data.dataset import Dataset
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import StepRow, load_steps
from posttrain.data.rows import MappedRows
from posttrain.models.batch import pack
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.reward_head import at_steps
from posttrain.models.text import decoder
from posttrain.objectives.process_reward_model import process_reward_model_loss
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.terms import LossTerms
from posttrain.recipes.balance import family_cost
from posttrain.recipes.batches import Schedule, flat, for_rank
from posttrain.recipes.example_run import ExampleRun, held_out_metrics
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import accumulating
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage


def run(keys: ProcessRewardModelKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` under a new head on the rated steps in `keys.datasets`; the result is in `stage.folder`."""
    tokenizer = load_tokenizer(keys)
    data, held_out = load_with_held_out(load_steps, keys, tokenizer)
    stage.run.describe_data(decoder(tokenizer, special=True), data, *held_out.values())
    pad: Any = tokenizer.pad_token_id
    data = _placed(data, pad, last_only=keys.train_on_last_step_only)
    held_out = {name: _placed(rows, pad) for name, rows in held_out.items()}
    schedule = Schedule.of(data, keys, stage.ranks, size=_num_tokens, cost=lambda row: family_cost([_num_tokens(row)]))
    policy = load_policy(keys, tokenizer=tokenizer, sharding=stage.sharding).without_dropout()
    measure = partial(validation_loss, policy, keys=keys, stage=stage)
    examples = ExampleRun.begun(policy, schedule, held_out, measure, keys, stage)

    for step, micros in examples.steps():
        norm = Normalizer(tokens=_num_steps(flat(micros)), sequences=len(flat(micros)))
        metrics = StepMetrics()
        policy.model.train()
        for micro in accumulating(policy, for_rank(micros, stage.ranks)):
            micro.learn(loss(policy, micro.rows, norm), metrics)
        examples.finish_step(step, micros, metrics.reduced(stage.ranks))
    return examples.done()


def loss(policy: Policy, rows: list[StepRow], norm: Normalizer) -> LossTerms:
    """This micro-batch's share of the step's loss."""
    logits_M2 = policy.label_logits(pack([[row.seq] for row in rows]))
    label_M = torch.tensor([label for row in rows for label in row.labels], device=logits_M2.device)
    return process_reward_model_loss(logits_M2, label_M, norm)


def validation_loss(
    policy: Policy, rows: Dataset[StepRow], keys: ProcessRewardModelKeys, stage: Stage
) -> dict[str, float]:
    """The objective and its metrics over all steps that are held out."""
    norm = Normalizer(tokens=_num_steps(list(rows.rows)), sequences=len(rows))
    return held_out_metrics(policy, rows, partial(loss, policy, norm=norm), keys, stage)


def _placed(data: Dataset[StepRow], pad_token_id: int, last_only: bool = False) -> Dataset[StepRow]:
    def placed(row: StepRow) -> StepRow:
        seq = at_steps(row.seq, pad_token_id)
        if not last_only:
            return StepRow(seq, row.labels)
        mask = (*(False for _ in seq.ids[1:]), True)
        return StepRow(replace(seq, loss_mask=mask), row.labels[-1:])

    return replace(data, rows=MappedRows(data.rows, placed))


def _num_steps(rows: list[StepRow]) -> int:
    return sum(len(row.labels) for row in rows)


def _num_tokens(row: StepRow) -> int:
    return len(row.seq.ids)
