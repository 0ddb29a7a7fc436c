"""Distillation: what teachers make of the policy's own completions, or of given answers. Read `run` from top to bottom.

Every step samples from the weights that it trains, so a step is a function of those and of its number, and nothing of it is
kept in a checkpoint. The losses are rows of `objectives.distill`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from posttrain.config.distill import DistillKeys
from posttrain.data.dataset import Dataset
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import load_prompts, load_sft
from posttrain.data.rows import MappedRows
from posttrain.errors import DataError
from posttrain.models.batch import pack
from posttrain.models.load import freeze_reference, load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.objectives.distill import DistillSpec, sampled_reverse_kl
from posttrain.objectives.reduce import Normalizer, token_mean
from posttrain.objectives.terms import LossTerms, as_ratios, spec_from
from posttrain.protocols import Engine, Ranks
from posttrain.recipes.batches import fill_with_groups, flat, for_rank
from posttrain.recipes.experience.engines import EngineSource, make_engine, sampling_params, speculation_of, sync_engine
from posttrain.recipes.experience.prompts import PromptStream
from posttrain.recipes.measure.validate import SuiteScore, Validation
from posttrain.recipes.metrics import StepMetrics, length_metrics
from posttrain.recipes.optim import accumulating, learning_rate, make_optimizer, update
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.teachers import Lesson, Teachers
from posttrain.rollout.collect import sample_groups
from posttrain.rollout.sampling import request_seed, uniforms
from posttrain.types import Completion, Prompt, PromptRow, Sample, TokenSeq


def run(keys: DistillKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` on what `keys.teachers` say of its answers to `keys.datasets`; the result is in `stage.folder`."""
    ranks, spec = stage.ranks, spec_from(DistillSpec, keys)
    tokenizer = load_tokenizer(keys)
    load: Callable[..., Dataset[Any]] = load_prompts if keys.row_kind == "prompts" else load_sft
    data, held_out = load_with_held_out(load, keys, tokenizer)
    stage.run.describe_data(decoder(tokenizer, special=True), data, *held_out.values())
    policy = load_policy(keys, tokenizer=tokenizer, sharding=stage.sharding).without_dropout()
    if keys.holds_reference:
        freeze_reference(policy)
    teachers = Teachers.of(keys.teachers, keys, policy, ranks)
    samples_for = EngineSource(keys, policy)
    speculation = speculation_of(keys.rollout)
    engine = stage.until_done(
        make_engine(samples_for, keys=keys.rollout, rows=keys.rollout_batch_size, folder=stage.folder, ranks=ranks, speculation=speculation)
    )  # fmt: skip
    rows = MappedRows(data.rows, _lesson_row)
    dev_sets = {name: MappedRows(part.rows, _lesson_row) for name, part in held_out.items()}
    for part in (rows, *dev_sets.values()):
        _check(part, keys, teachers)
    suite = SuiteScore.of(policy, keys, stage.processes, engine)
    optimizer = make_optimizer(policy, keys)
    sampler, order = _Sampler(engine, keys, ranks), PromptStream(data, keys.seed, {})

    per_step = keys.num_prompts_per_step
    total_steps = keys.max_steps if keys.max_steps > 0 else max(1, round(keys.num_train_epochs * len(data) / per_step))
    state = stage.resume(policy, optimizer, total_steps, speculation=speculation)
    measure = partial(_validate, policy, teachers, sampler=sampler, spec=spec, stage=stage)
    validation = Validation(stage, state, dev_sets, measure, suite)

    for step in range(state.step, total_steps):
        stage.begin_step(step)
        started = time.monotonic()
        synced = sync_engine(engine, policy, version=step) if keys.on_policy_share else {}
        first = (step + stage.guard.controls.skipped) * per_step
        taken = {number: rows[order.row_of(number)] for number in range(first, first + per_step)}
        lessons, lengths = sampler.lessons(taken, stage.guard.controls.seed(keys.seed))
        rollout_s = time.monotonic() - started

        micros = micro_batches(lessons, keys.per_device_train_batch_size)
        norm = _normalizer(lessons)
        metrics = StepMetrics()
        policy.model.train()
        for micro in accumulating(policy, for_rank(micros, ranks)):
            terms = loss(policy, teachers, micro.rows, spec, norm)
            micro.backward(terms.loss)
            metrics.add({} if micro.idle else terms.metrics)
        lr = learning_rate(step, total_steps, keys) * stage.guard.controls.lr_scale
        values = metrics.reduced(ranks) | synced | state.speculated(ranks) | lengths | {"loss_tokens": norm.tokens}
        values |= update(policy, optimizer, stage, lr, values, step + 1)
        values["epoch"] = (first + per_step) / len(data)

        state.step, state.tokens = step + 1, state.tokens + int(norm.tokens)
        values |= stage.times(rollout_s=rollout_s)
        values |= validation.if_due(state.step, total_steps)
        best = validation.best_score(state.step)
        stage.finish_step(state, values, state.step == total_steps, best)

    validation.restore_best()
    return stage.done(state)


def loss(
    policy: Policy, teachers: Teachers, lessons: Sequence[Lesson], spec: DistillSpec, norm: Normalizer
) -> LossTerms:
    """This micro-batch's share of the step's loss: a token mean over the step."""
    batch = pack([group for _, group in lessons])
    if spec.needs_tokens_alone:
        scores = policy.score(batch, temperature=spec.temperature, entropy=True)
        logp_M, aux_loss = scores.logp_M, scores.aux_loss
        teacher_M = torch.from_numpy(np.concatenate(teachers.logp(lessons))).to(logp_M.device)
        term_M = sampled_reverse_kl(logp_M, teacher_M)
        assert scores.entropy_M is not None, "asked for"
        said = {"teacher/gap": logp_M - teacher_M, "entropy": scores.entropy_M}
    else:
        head, aux_loss = policy.head(batch)
        term_M, said = teachers.compared(lessons, head, batch.target_M.to(head.hidden_MD.device), spec)
    count = float(term_M.numel())
    sums = {"loss": (term_M.sum(), count)} | {name: (value_M.sum(), count) for name, value_M in said.items()}
    terms = LossTerms(token_mean(term_M, norm), as_ratios(sums))
    return policy.with_aux_loss(terms, aux_loss, share=batch.num_sequences / norm.sequences)


def micro_batches(lessons: Sequence[Lesson], at_once: int) -> list[list[Lesson]]:
    """At most `at_once` completions together; a larger group is split, and each part has its prompt with it."""
    parts = [(prompt, group[i : i + at_once]) for prompt, group in lessons for i in range(0, len(group), at_once)]
    together = fill_with_groups([tuple((prompt, s) for s in group) for prompt, group in parts], at_once)
    return [[(part[0][0], tuple(sample for _, sample in part)) for part in micro] for micro in together]


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """What is asked, and the answer that the data have for it."""

    prompt: Prompt
    ids: tuple[int, ...]
    answer: Sample | None


def _lesson_row(row: PromptRow | TokenSeq) -> _Row:
    """Of a conversation what comes before the first trained turn is what is asked."""
    if not isinstance(row, TokenSeq):
        return _Row(row[0], row[1], None)
    mask = np.array((False, *row.loss_mask[1:]))
    assert row.origin is not None, "rows of a file have an origin"
    ids = row.ids[: int(mask.argmax())] if not row.loss_mask[0] else ()
    return _Row(Prompt(row.origin, ""), ids, Sample(np.array(row.ids, np.int32), mask))


def _check(rows: Sequence[_Row], keys: DistillKeys, teachers: Teachers) -> None:
    """Raises: DataError for a row that cannot be sampled from, or that no teacher can teach."""
    longest = keys.sequence_len - keys.max_completion_length
    for row in rows if keys.on_policy_share else ():
        if not row.ids or len(row.ids) > longest:
            why = (
                "no prompt before its answer"
                if not row.ids
                else f"a prompt of {len(row.ids)} tokens > sequence_len - max_completion_length = {longest}"
            )
            raise DataError(
                f"{row.prompt.origin}: the row has {why}, so nothing can be sampled for it (on_policy_share: {keys.on_policy_share:g}); "
                "expected a prompt that leaves room; change the row or sequence_len, or set on_policy_share: 0"
            )
    teachers.check(((row.prompt, row.ids) for row in rows), longest)


@dataclass(frozen=True)
class _Sampler:
    """Makes lessons of rows: completions of the present weights, or the answers of the data. The same on every rank."""

    engine: Engine
    keys: DistillKeys
    ranks: Ranks

    def lessons(self, rows: Mapping[int, _Row], seed: int) -> tuple[list[Lesson], dict[str, float]]:
        """Of `rows` by their number in the run; and how long the sampled ones are."""
        own = [number for number in rows if self._is_on_policy(number, rows[number])]
        mine = self.ranks.share(own)
        asked = [(rows[number].prompt, rows[number].ids) for number in mine]
        how = (self.keys.num_generations, sampling_params(self.keys), (seed,), mine)
        # A rank without a row asks too: there may be one engine for all of them.
        found = sample_groups(self.engine, asked, *how) if own else []
        gathered = self.ranks.gather(dict(zip(mine, found, strict=True)))
        sampled = {number: group for rank in gathered for number, group in rank.items()}
        lessons = [
            (row.prompt, tuple(_sample(row.ids, one) for one in sampled[number]) if number in sampled else _given(row))
            for number, row in rows.items()
        ]
        return lessons, _lengths(flat(list(sampled.values())))

    def _is_on_policy(self, number: int, row: _Row) -> bool:
        if row.answer is None:
            return True
        return float(uniforms(request_seed("on policy", self.keys.seed, number), 1)[0]) < self.keys.on_policy_share


def _given(row: _Row) -> tuple[Sample, ...]:
    assert row.answer is not None
    return (row.answer,)


def _sample(prompt_ids: Sequence[int], completion: Completion) -> Sample:
    ids = np.array((*prompt_ids, *completion.ids), np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt_ids))


def _normalizer(lessons: Sequence[Lesson]) -> Normalizer:
    samples = flat([group for _, group in lessons])
    return Normalizer(float(sum(sample.num_loss_tokens for sample in samples)), float(len(samples)))


def _lengths(completions: Sequence[Completion]) -> dict[str, float]:
    return length_metrics([len(one.ids) for one in completions], sum(one.finish == "length" for one in completions))


@torch.no_grad()
def _validate(
    policy: Policy, teachers: Teachers, rows: Sequence[_Row], sampler: _Sampler, spec: DistillSpec, stage: Stage
) -> dict[str, float]:
    """The objective on held-out rows, with the same random numbers every time."""
    if sampler.keys.on_policy_share:
        assert stage.state is not None, "a stage that trains has begun"
        sync_engine(sampler.engine, policy, version=stage.state.step)
    policy.model.eval()
    lessons, _ = sampler.lessons(dict(enumerate(rows)), sampler.keys.seed)
    norm, metrics = _normalizer(lessons), StepMetrics()
    for micro in for_rank(micro_batches(lessons, sampler.keys.per_device_train_batch_size), stage.ranks):
        terms = loss(policy, teachers, micro.rows, spec, norm)
        metrics.add({} if micro.idle else terms.metrics)
    return {f"eval_{name}": value for name, value in metrics.reduced(stage.ranks).items()}
