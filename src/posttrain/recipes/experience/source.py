"""The steps of an RL run, each with the generation batch that it trains on: the one place where engine and trainer meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from posttrain.config.rl import RewardedKeys
from posttrain.protocols import Engine
from posttrain.recipes.experience.ahead import Ahead
from posttrain.recipes.experience.alternating import Alternating
from posttrain.recipes.experience.collector import Collected, Collector, Sampling
from posttrain.recipes.experience.engines import sync_engine
from posttrain.recipes.experience.ledger import FOLDER
from posttrain.recipes.experience.prompts import PromptStream
from posttrain.recipes.experience.replay import KeptRollouts, ReplayedRewards
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.train_state import TrainState
from posttrain.rewards.workers import RewardPool
from posttrain.rollout.collect import SampleGroups
from posttrain.rollout.experience import Experience
from posttrain.types import Decode


class TrainStep(NamedTuple):
    """Step `number` trains on `experience`, for the `position`-th time; `rollout_s` seconds were waited for it."""

    number: int
    experience: Experience
    position: int
    rollout_s: float


class ExperienceSource:
    """From where `state` stands to `total_steps`. Weights go to the engine before each generation batch.

    `watch` is told of a batch that was made, before step `number`, and says metrics of it.
    """

    def __init__(
        self, keys: RewardedKeys, stage: Stage, state: TrainState, engine: Engine, collector: Collector,
        watch: Callable[[int, Collected], dict[str, float]], total_steps: int,
    ) -> None:  # fmt: skip
        self._stage, self._state, self._engine, self._collector = stage, state, engine, collector
        self._watch, self._total_steps = watch, total_steps
        self._steps_per_batch = keys.steps_per_batch

    def __iter__(self) -> Iterator[TrainStep]:
        for step in range(self._state.step, self._total_steps):
            self._stage.begin_step(step)
            generation, position = divmod(step, self._steps_per_batch)
            experience, rollout_s = self._state.experience, 0.0
            if experience is None or experience.generation != generation:
                experience, rollout_s = self._next(step, generation, experience)
            yield TrainStep(step, experience, position, rollout_s)

    def _next(self, step: int, generation: int, previous: Experience | None) -> tuple[Experience, float]:
        synced = sync_engine(self._engine, self._state.policy, version=step)
        collected = self._collector.collect(generation, previous, self._stage.guard.controls)
        self._state.experience = experience = collected.experience
        prompts = dict(collected.ledger)
        self._stage.run.event("rollouts", step + 1, {"generation": generation, "prompts": prompts})
        experience.metrics.update(synced | self._state.speculated(self._stage.ranks) | self._watch(step, collected))
        self._engine.rest()
        return experience, collected.wall_s


def make_sampling(
    keys: RewardedKeys, stage: Stage, state: TrainState, engine: Engine, decode: Decode, rewards: RewardPool,
    score: ReplayedRewards, prompts: PromptStream, sample: SampleGroups,
) -> Sampling:  # fmt: skip
    """Taking turns with `rollout.max_staleness: 0`, else ahead of the trainer."""
    keep = keys.keep_rollouts
    if not keys.rollout.max_staleness:
        kept = KeptRollouts(stage, score, state) if keep else score
        return Alternating(keys, sample, decode, kept, prompts, stage.ranks)
    folder, resumable_from = stage.folder / FOLDER, stage.checkpoints.store.resumable_from
    asked = KeptRollouts(stage, rewards.score, state) if keep else rewards.score
    return Ahead(keys, engine, decode, asked, prompts, stage.ranks, folder, resumable_from)
