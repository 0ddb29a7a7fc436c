"""What the loops of RL have in common: everything between a stage's keys and the first step, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from posttrain.config.rl import PolicyGradientKeys, RewardedKeys
from posttrain.data.dataset import Dataset
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import load_prompts, load_sft
from posttrain.models.float32_head import put_head_in_float32
from posttrain.models.load import freeze_reference, load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.protocols import Engine, Ranks, Scorer
from posttrain.recipes.credit import Credit
from posttrain.recipes.experience.collector import Collected, Collector
from posttrain.recipes.experience.engines import (
    EngineSource,
    greedy,
    interrupted,
    make_engine,
    sampling_params,
    speculation_of,
    sync_engine,
)
from posttrain.recipes.experience.episodes import environment_of, sampler
from posttrain.recipes.experience.judge_drift import JudgeDrift
from posttrain.recipes.experience.prompts import PromptStream
from posttrain.recipes.experience.replay import ReplayedRewards
from posttrain.recipes.experience.source import ExperienceSource, make_sampling
from posttrain.recipes.measure.learned import reward_pool
from posttrain.recipes.measure.live_checks import LiveChecks
from posttrain.recipes.measure.validate import SuiteScore, Validation
from posttrain.recipes.optim import make_optimizer
from posttrain.recipes.ptx import PtxRows
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.train_state import TrainState
from posttrain.recipes.scorers import PolicyScorer, ReferenceScorer
from posttrain.rewards.workers import MAX_UNSCORED
from posttrain.rollout.collect import SampleGroups, ScoreRewards, score_groups
from posttrain.types import Decode, PromptRow

EMPTY_STEP = "empty_step"
"""Logged in place of a loss where a step had nothing to learn from."""

CreditT = TypeVar("CreditT", bound=Credit)


@dataclass(frozen=True)
class RLRun(Generic[CreditT]):
    """A stage of RL that is ready to take its steps, or to go on with them."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    credit: CreditT
    ptx: PtxRows | None
    state: TrainState
    source: ExperienceSource
    validation: Validation
    total_steps: int

    def finish_step(self, stage: Stage, step: int, values: dict[str, float], rollout_s: float) -> None:
        """Count optimizer step `step`, validate where it is due, and hand its `values` to the stage. All ranks call it."""
        self.state.step = step + 1
        values |= stage.times(rollout_s=rollout_s)
        values |= self.validation.if_due(self.state.step, self.total_steps)
        best = self.validation.best_score(self.state.step)
        stage.finish_step(self.state, values, self.state.step == self.total_steps, best)


@contextmanager
def begun(
    keys: RewardedKeys, stage: Stage, credit_of: Callable[[Policy, Scorer, Dataset[PromptRow]], CreditT]
) -> Iterator[RLRun[CreditT]]:
    """`credit_of` is given the policy, who scores with it, and the prompts."""
    ranks = stage.ranks
    tokenizer = load_tokenizer(keys)
    environment = stage.until_done(environment_of(keys))
    data, held_out = load_with_held_out(partial(load_prompts, tools=environment.tools), keys, tokenizer)
    ptx = PtxRows(load_sft(keys, tokenizer, sources=keys.ptx_datasets), keys) if keys.ptx_datasets else None
    stage.run.describe_data(decoder(tokenizer, special=True), data, *held_out.values())
    decode = decoder(tokenizer)
    policy = load_policy(
        keys, tokenizer=tokenizer, sharding=stage.sharding, exact=keys.rollout.exact, routed=keys.rollout.routed_experts
    ).without_dropout()
    if keys.cast_lm_head_to_fp32:
        put_head_in_float32(policy.base)
    if keys.holds_reference:
        freeze_reference(policy)
    how = (keys.temperature, keys.per_device_train_batch_size, ranks)
    trainer, reference = PolicyScorer(policy, *how), ReferenceScorer(policy, *how)
    credit = credit_of(policy, trainer, data)
    speculation = speculation_of(keys.rollout)
    engine = stage.until_done(make_engine(
        EngineSource(keys, policy), keys=keys.rollout, rows=keys.rollout_batch_size, folder=stage.folder, ranks=stage.processes,
        speculation=speculation,
    ))  # fmt: skip
    asked = interrupted(engine, keys, tokenizer)
    sample, episodes = sampler(environment, asked, tokenizer, stage.processes, keys)
    suite = SuiteScore.of(policy, keys, stage.processes, engine, episodes)
    optimizer = make_optimizer(policy, keys)
    total_steps = _total_steps(keys, len(data))
    state = stage.resume(policy, optimizer, total_steps, credit.critic, speculation)

    with ExitStack() as open_parts:
        rewards = open_parts.enter_context(reward_pool(keys))
        score = ReplayedRewards(stage, partial(rewards.score, max_unscored=MAX_UNSCORED), state)
        prompts = PromptStream(data, keys.seed, state.solved, keys.no_resampling_pass_rate)
        made = make_sampling(keys, stage, state, asked, decode, rewards, score, prompts, sample)
        sampling = open_parts.enter_context(closing(made))
        collector = Collector(keys, sampling, trainer, reference, credit, ranks, decode)
        checks = LiveChecks(keys, stage, rewards, sample, tokenizer, data), JudgeDrift(keys, stage, rewards)
        watch = partial(_watch, stage, checks)
        source = ExperienceSource(keys, stage, state, engine, collector, watch, total_steps)
        validate = partial(_validate, ranks, engine, sample, decode, score, keys, state)
        validation = Validation(stage, state, held_out, validate, suite)
        yield RLRun(policy, optimizer, credit, ptx, state, source, validation, total_steps)


def is_uncorrected(keys: PolicyGradientKeys) -> bool:
    """Of samples of older weights that nobody scored again only the sampler's log-probs are known."""
    return keys.rollout.max_staleness > 0 and keys.importance_sampling_correction == "off"


def _total_steps(keys: RewardedKeys, num_prompts: int) -> int:
    if keys.max_steps > 0:
        return keys.max_steps
    batches = max(1, round(keys.num_train_epochs * num_prompts / keys.num_prompts_per_step))
    return batches * keys.steps_per_batch


@torch.no_grad()
def _validate(
    ranks: Ranks,
    engine: Engine,
    sample: SampleGroups,
    decode: Decode,
    score: ScoreRewards,
    keys: RewardedKeys,
    state: TrainState,
    rows: Dataset[PromptRow],
) -> dict[str, float]:
    """Mean reward of greedy answers to the held-out prompts, which are dealt over the ranks. All ranks call it."""
    # Under ranks the engine samples from a copy, which is as old as the last generation batch.
    sync_engine(engine, state.policy, version=state.step)

    def rewards(places: Sequence[int]) -> list[float | None]:
        """A rank without a row asks too: there may be one engine for all of them."""
        mine = [rows.rows[place] for place in places]
        completions = sample(mine, 1, greedy(sampling_params(keys)), (keys.seed,), places)
        groups = score_groups(mine, completions, decode, score) if mine else []
        return [rollout.reward.total for group in groups for rollout in group.rollouts]

    mine = ranks.share(range(len(rows)))
    each = ranks.gather(list(zip(mine, ranks.among(mine, rewards), strict=True)))
    engine.rest()
    # Added up in the order of one process.
    found = dict(pair for rank in each for pair in rank)
    totals = [found[place] for place in range(len(rows))]
    scored = [total for total in totals if total is not None]
    return {"eval_reward": sum(scored) / len(scored)}


def _watch(stage: Stage, checks: tuple[LiveChecks, JudgeDrift], step: int, collected: Collected) -> dict[str, float]:
    """Show a sample of a batch; what checks of its rewards say."""
    values = {name: value for check in checks for name, value in check.if_due(step, collected.groups).items()}
    if collected.groups:
        group = collected.groups[0]
        rollout = group.rollouts[0]
        prompt = (
            group.prompt.prompt if isinstance(group.prompt.prompt, str) else str(group.prompt.prompt[-1]["content"])
        )
        details: dict[str, object] = {"prompt": prompt, "completion": rollout.text, "reward": rollout.reward.total}
        if rollout.completion.episode is not None:
            details["messages"] = list(rollout.completion.episode.messages)
        stage.run.event("sample", step + 1, details)
    return values
