"""Energy-based fine-tuning: completions are to be like the rows' answers in the features of the given model. Read `run` from top to bottom.

Every step samples from the weights that it trains, so a step is a function of those and of its number, and nothing of it is kept in
a checkpoint but what `rollout.speculation` drafts from. What a completion earns is `objectives.feature_matching`. Source: arXiv 2603.12248, alg. 1; differs: the frozen model
that gives the features is this stage's start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from posttrain.config.ebft import EBFTKeys
from posttrain.data.anchors import AnswerSpan, answer_spans, strided_spans
from posttrain.data.dataset import Dataset
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import load_sft
from posttrain.errors import DataError
from posttrain.models.load import freeze_reference, load_policy, load_tokenizer
from posttrain.models.text import decoder
from posttrain.objectives.feature_matching import Match, MatchingSpec, match, matching_advantages
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import spec_from
from posttrain.protocols import Engine, Ranks
from posttrain.recipes.batches import in_their_order
from posttrain.recipes.experience.engines import EngineSource, make_engine, sampling_params, speculation_of, sync_engine
from posttrain.recipes.experience.prompts import PromptStream
from posttrain.recipes.measure.validate import SuiteScore, Validation
from posttrain.recipes.metrics import StepMetrics, length_metrics
from posttrain.recipes.optim import accumulating, learning_rate, make_optimizer, update
from posttrain.recipes.policy_step import micro_batches_of, normalizer, num_tokens, sampled_loss
from posttrain.recipes.ptx import learn_from, ptx_loss, ptx_norm
from posttrain.recipes.rl import EMPTY_STEP
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.scorers import FeatureScorer
from posttrain.rollout.experience import Group
from posttrain.rollout.sampling import request_seed
from posttrain.types import Completion, Request, Sample, TokenSeq, in_order

log = logging.getLogger(__name__)


def run(keys: EBFTKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` towards the answers in `keys.datasets`; the result is in `stage.folder`."""
    ranks, spec, objective = stage.ranks, spec_from(MatchingSpec, keys), PolicySpec(keys.loss_type)
    tokenizer = load_tokenizer(keys)
    load: Callable[..., Dataset[Any]] = load_sft
    data, held_out = load_with_held_out(load, keys, tokenizer)
    stage.run.describe_data(decoder(tokenizer, special=True), data, *held_out.values())
    for part in (data, *held_out.values()):
        check_spans(part, keys)
    policy = load_policy(keys, tokenizer=tokenizer, sharding=stage.sharding).without_dropout()
    freeze_reference(policy)
    speculation = speculation_of(keys.rollout)
    engine = stage.until_done(make_engine(
        EngineSource(keys, policy), keys=keys.rollout, rows=keys.rollout_batch_size, folder=stage.folder, ranks=ranks,
        speculation=speculation,
    ))  # fmt: skip
    suite = SuiteScore.of(policy, keys, stage.processes, engine)
    optimizer = make_optimizer(policy, keys)
    features = FeatureScorer(
        policy, keys.feature_layers, keys.embed_method, keys.normalize_layers, keys.per_device_train_batch_size, ranks
    )
    matcher, order = Matcher(engine, features, keys, ranks), PromptStream(data, keys.seed, {})

    per_step = keys.num_prompts_per_step
    total_steps = keys.max_steps if keys.max_steps > 0 else max(1, round(keys.num_train_epochs * len(data) / per_step))
    state = stage.resume(policy, optimizer, total_steps, speculation=speculation)
    validation = Validation(stage, state, held_out, partial(_validate, matcher, stage), suite)

    for step in range(state.step, total_steps):
        stage.begin_step(step)
        started = time.monotonic()
        synced = sync_engine(engine, policy, version=step)
        first = (step + stage.guard.controls.skipped) * per_step
        rows = {number: data.rows[order.row_of(number)] for number in range(first, first + per_step)}
        policy.model.eval()
        controls = stage.guard.controls
        matched = matcher.matched(rows, keys.num_generations * controls.group_scale, controls.seed(keys.seed))
        groups, values = credited(matched, spec)
        rollout_s = time.monotonic() - started

        norm, metrics = normalizer(groups, keys), StepMetrics()
        micros = micro_batches_of(groups, _teaches, keys.per_device_train_batch_size, ranks)
        supervised = list(rows.values()) if keys.ce_coef else []
        policy.model.train()
        for micro in accumulating(policy, micros, more=bool(supervised)):
            micro.learn(
                sampled_loss(policy, micro.rows, objective, norm, keys.temperature, on_policy=True, compared=True),
                metrics,
            )
        if supervised:
            learn_from(policy, supervised, keys.ce_coef, keys.per_device_train_batch_size, ranks, metrics, "ce_loss")
        values |= metrics.reduced(ranks) | synced | state.speculated(ranks)
        if micros or supervised:
            lr = learning_rate(step, total_steps, keys) * stage.guard.controls.lr_scale
            values |= update(policy, optimizer, stage, lr, values, step + 1)
        else:
            # All completions were worth the same: nothing moves, not even by AdamW's momentum.
            values[EMPTY_STEP] = 1.0
            state.empty_steps += 1
        values["epoch"] = (first + per_step) / len(data)

        state.step, state.tokens = step + 1, state.tokens + num_tokens(filter(_teaches, groups))
        values |= stage.times(rollout_s=rollout_s)
        values |= validation.if_due(state.step, total_steps)
        stage.finish_step(state, values, state.step == total_steps, validation.best_score(state.step))

    validation.restore_best()
    return stage.done(state)


# --- rows ------------------------------------------------------------------------------------------------------------


def spans_of(row: TokenSeq, keys: EBFTKeys) -> list[AnswerSpan]:
    """The answers that completions of a row are compared with; what stands before each is its prompt."""
    if keys.mode == "structured":
        return answer_spans(row)
    return strided_spans(row, keys.max_completion_length, keys.stride, keys.context_length, keys.min_completion_prefix)


def check_spans(rows: Dataset[TokenSeq], keys: EBFTKeys) -> None:
    """Raises: DataError where no row asks for anything; some that do not are told of."""
    counts = [len(spans_of(row, keys)) for row in rows]
    without = [number for number, count in enumerate(counts) if not count]
    if not without:
        return
    origin = rows.rows[without[0]].origin
    why = (
        "no answer that something stands before"
        if keys.mode == "structured"
        else f"less than max_completion_length = {keys.max_completion_length} trained tokens behind its first anchor"
    )
    if len(without) == len(counts):
        raise DataError(
            f"{origin}: the row has {why}, and so has every row, so nothing can be sampled; expected rows with a prompt and its answer, or "
            "with mode: strided running text that is long enough; change the rows, or mode and its keys"
        )
    learned = "only ce_coef learns from them" if keys.ce_coef else "nothing is learned from them"
    log.warning("%d of %d rows have %s (%s is the first): %s", len(without), len(counts), why, origin, learned)


# --- what completions earn -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _AnswerPlace:
    """A place in row `number` of the run: what is gone on from, and what the row has there."""

    number: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Matched:
    """The completions of one prompt, how many were cut, and how they match its answer."""

    samples: Group
    num_cut: int
    match: Match


@dataclass(frozen=True)
class Matcher:
    """Samples in place of the answers of rows, and compares with them. The same on every rank."""

    engine: Engine
    scorer: FeatureScorer
    keys: EBFTKeys
    ranks: Ranks

    def matched(self, rows: dict[int, TokenSeq], size: int, seed: int) -> list[Matched]:
        """Of `rows` by their number in the run, `size` completions in place of each of their answers, in order."""
        asked = [
            _AnswerPlace(number, row.ids[:begin], row.ids[begin:end])
            for number, row in rows.items()
            for begin, end in spans_of(row, self.keys)
        ]
        mine = self.ranks.share(asked)
        requests = [
            Request(one.prompt, request_seed(seed, one.number, len(one.prompt), sample), self._room(one))
            for one in mine
            for sample in range(size)
        ]
        # A rank without a prompt asks too: there may be one engine for all of them.
        completions = iter(in_order(self.engine.generate(requests, sampling_params(self.keys))) if asked else ())
        self.engine.rest()
        groups = [(one, tuple(islice(completions, size))) for one in mine]
        found = self.ranks.gather(self._compared(groups))
        return [found[place % len(found)][place // len(found)] for place in range(len(asked))]

    def _room(self, asked: _AnswerPlace) -> int:
        return max(1, min(self.keys.max_completion_length, self.keys.sequence_len - len(asked.prompt)))

    def _compared(self, groups: Sequence[tuple[_AnswerPlace, tuple[Completion, ...]]]) -> list[Matched]:
        families = [
            [_behind(asked.prompt, ids) for ids in (*(one.ids for one in group), asked.answer)] for asked, group in groups
        ]  # fmt: skip
        vectors = iter(self.scorer.features(families))
        found: list[Matched] = []
        for asked, group in groups:
            *sampled, answer = (torch.from_numpy(next(vectors)) for _ in range(len(group) + 1))
            how = match(torch.stack(sampled), answer, use_whitening=self.keys.use_whitening)
            cut = sum(one.finish == "length" for one in group)
            found.append(Matched(tuple(_sample(asked.prompt, one) for one in group), cut, how))
        return found


def credited(matched: Sequence[Matched], spec: MatchingSpec) -> tuple[list[Group], dict[str, float]]:
    """The groups with their advantages, and what is logged of them."""
    if not matched:
        return [], {}
    found = matching_advantages([one.match for one in matched], spec)
    advantages = iter(found.advantage_B.tolist())
    groups = [
        tuple(replace(sample, advantage=sample.constant(next(advantages))) for sample in one.samples)
        for one in matched
    ]  # fmt: skip
    lengths = [sample.num_loss_tokens for group in groups for sample in group]
    num_cut = sum(one.num_cut for one in matched)
    return groups, matching_metrics(matched) | length_metrics(lengths, num_cut) | {
        "reward": float(found.reward_B.mean()),
        "reward_std": float(found.reward_B.std()),
        "frac_reward_zero_std": float(found.zero_std_P.double().mean()),
    }


def matching_metrics(matched: Sequence[Matched]) -> dict[str, float]:
    """Means over prompts."""
    return {
        "features/alignment": float(torch.stack([one.match.alignment_G.mean() for one in matched]).mean()),
        "features/diversity": float(torch.stack([one.match.diversity_G.mean() for one in matched]).mean()),
        "features/distance": sum(one.match.distance for one in matched) / len(matched),
    }


def _behind(prompt: Sequence[int], ids: Sequence[int]) -> TokenSeq:
    return TokenSeq((*prompt, *ids), (False,) * len(prompt) + (True,) * len(ids))


def _sample(prompt: Sequence[int], completion: Completion) -> Sample:
    ids = np.array((*prompt, *completion.ids), np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt), np.array(completion.logp, np.float32))


def _teaches(group: Group) -> bool:
    return any(sample.advantage is not None and bool(sample.advantage.any()) for sample in group)


@torch.no_grad()
def _validate(matcher: Matcher, stage: Stage, rows: Dataset[TokenSeq]) -> dict[str, float]:
    """How completions match the held-out answers, with the same random numbers every time; and the cross-entropy of these."""
    assert stage.state is not None, "a stage that trains has begun"
    policy, keys, ranks = matcher.scorer.policy, matcher.keys, stage.ranks
    sync_engine(matcher.engine, policy, version=stage.state.step)
    policy.model.eval()
    matched = matcher.matched(dict(enumerate(rows)), keys.num_generations, keys.seed)
    norm, metrics = ptx_norm(rows.rows), StepMetrics()
    for micro in in_their_order(rows.rows, keys.per_device_train_batch_size, ranks):
        terms = ptx_loss(policy, micro.rows, norm, 1.0)
        metrics.add({} if micro.idle else {"loss": terms.metrics["ptx_loss"]})
    return {f"eval_{name}": value for name, value in (metrics.reduced(ranks) | matching_metrics(matched)).items()}
