"""Supervised fine-tuning: read `run` from top to bottom and you have read it all.

Full, LoRA and QLoRA differ in what `load_policy` returns; one process and many in `ranks` and in how that policy is sharded.
"""

from __future__ import annotations

import math

import torch

from posttrain.config.stages import SFTKeys
from posttrain.data.dataset import Dataset
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import load_sft
from posttrain.models.batch import loss_counts, pack
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.objectives.distill import token_scores
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.sft import Smoothing, eaft_weight, sft_loss
from posttrain.objectives.terms import LossTerms
from posttrain.recipes.balance import family_cost
from posttrain.recipes.batches import Schedule, flat, for_rank, in_their_order
from posttrain.recipes.measure.validate import SuiteScore, Validation
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import accumulating, learning_rate, make_optimizer, update
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.streamed import StreamedSchedule
from posttrain.types import TokenSeq


def run(keys: SFTKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` on `keys.datasets`; the result is in `stage.folder`."""
    ranks = stage.ranks
    tokenizer = load_tokenizer(keys)
    data, held_out = load_with_held_out(load_sft, keys, tokenizer)
    stage.run.describe_data(decoder(tokenizer, special=True), data, *held_out.values())
    policy = load_policy(keys, tokenizer=tokenizer, sharding=stage.sharding)
    policy.embedding_noise = keys.neftune_noise_alpha
    suite = SuiteScore.of(policy, keys, stage.processes)
    optimizer = make_optimizer(policy, keys)

    streamed = StreamedSchedule(keys, tokenizer, ranks) if keys.streaming else None
    schedule = streamed or Schedule.of(
        data, keys, ranks, size=lambda row: len(row.ids), cost=lambda row: family_cost([len(row.ids)])
    )
    total_steps = schedule.total_steps(keys)
    state = stage.resume(policy, optimizer, total_steps)
    if streamed is not None:
        streamed.go_on(state.stream)
    validation = Validation(stage, state, held_out, lambda rows: validation_loss(policy, rows, keys, stage), suite)

    for step in range(state.step, total_steps):
        if validation.is_over:
            break
        stage.begin_step(step)
        micros = schedule.step(step + stage.guard.controls.skipped)
        # One global count, known before the first backward: the split into micro-batches and ranks cannot matter.
        norm = Normalizer.of(loss_counts(flat(micros)))
        metrics = StepMetrics()
        policy.model.train()
        for micro in accumulating(policy, for_rank(micros, ranks)):
            terms = loss(policy, micro.rows, norm, keys)
            micro.backward(terms.loss)
            metrics.add({} if micro.idle else terms.metrics)
        lr = learning_rate(step, total_steps, keys) * stage.guard.controls.lr_scale
        values = metrics.reduced(ranks) | {"loss_tokens": norm.tokens}
        values |= update(policy, optimizer, stage, lr, values, step + 1)
        values |= schedule.balance(micros, ranks.world_size)
        values["epoch"] = schedule.epoch_after(step + stage.guard.controls.skipped)

        state.stream = None if streamed is None else streamed.cursor
        state.step, state.tokens = step + 1, state.tokens + sum(len(row.ids) for row in flat(micros))
        values |= validation.if_due(state.step, total_steps)
        best = validation.best_score(state.step)
        stage.finish_step(state, values, validation.is_last(state.step, total_steps), best)

    validation.restore_best()
    return stage.done(state)


def loss(policy: Policy, rows: list[TokenSeq], norm: Normalizer, keys: SFTKeys | None = None) -> LossTerms:
    """This micro-batch's share of the step's loss; without keys plain cross-entropy."""
    batch = pack([[row] for row in rows], least_shared=math.inf)
    if keys is not None and (keys.label_smoothing_factor or keys.loss_type == "eaft"):
        head, aux_loss = policy.head(batch)
        with policy.placement.autocast():
            target_M = batch.target_M.to(policy.placement.device)
            logp_M, mean_M, top1_M, entropy_M = token_scores(head, target_M, keys.eaft_k)
        smoothing = Smoothing(keys.label_smoothing_factor, mean_M) if keys.label_smoothing_factor else None
        weight_M = eaft_weight(entropy_M, keys.eaft_alpha) if keys.loss_type == "eaft" else None
        terms = sft_loss(logp_M, norm, keys.loss_type, top1_M=top1_M, smoothing=smoothing, weight_M=weight_M)
    else:
        scores = policy.score(batch, top1=True)
        terms = sft_loss(scores.logp_M, norm, keys.loss_type if keys else "nll", top1_M=scores.top1_M)
        aux_loss = scores.aux_loss
    return policy.with_aux_loss(terms, aux_loss, share=len(rows) / norm.sequences)


@torch.no_grad()
def validation_loss(policy: Policy, rows: Dataset[TokenSeq], keys: SFTKeys, stage: Stage) -> dict[str, float]:
    """Token-mean loss over all held-out rows."""
    policy.model.eval()
    metrics = StepMetrics()
    norm = Normalizer.of(loss_counts(rows))
    for micro in in_their_order(rows.rows, keys.per_device_train_batch_size, stage.ranks):
        terms = loss(policy, micro.rows, norm)
        metrics.add({} if micro.idle else terms.metrics)
    return {f"eval_{name}": value for name, value in metrics.reduced(stage.ranks).items()}
