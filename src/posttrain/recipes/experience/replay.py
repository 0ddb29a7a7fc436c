"""Rewards on record before they are used, and taken from there when a step is made again.

A reward's deadline is the clock's: scored twice, the same completions may come out differently. A run that is killed
between the scoring and the next checkpoint samples those completions again; with the rewards of the first time it goes on as if
it had not been killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from posttrain.checkpoint.store import disk_errors, sweep
from posttrain.files import digest_json, read_json, write_json
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.train_state import TrainState
from posttrain.rewards.rescore import SCORED, ScoredCall
from posttrain.rollout.collect import ScoreRewards
from posttrain.types import RewardBreakdown

FOLDER = "rewards"


class ReplayedRewards:
    """A `ScoreRewards`. A record per call, named by the step and by what was scored; those before the checkpoints go."""

    def __init__(self, stage: Stage, score: ScoreRewards, state: TrainState) -> None:
        self._stage, self._score, self._state = stage, score, state
        self._folder = stage.folder / FOLDER
        self._forgotten = -1
        if stage.ranks.is_main:
            sweep(self._folder)
        stage.ranks.barrier()

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[RewardBreakdown]:
        digest = digest_json([list(prompts), list(completions), columns.get("completion_ids")])
        path = self._folder / f"{self._state.step:08d}-{digest.removeprefix('sha256:')[:16]}.json"
        if path.exists():
            return [RewardBreakdown(**record) for record in read_json(path)]
        breakdowns = self._score(prompts, completions, columns)
        with disk_errors(self._stage.folder):
            write_json(path, [asdict(breakdown) for breakdown in breakdowns])
            self._forget(self._stage.checkpoints.store.resumable_from())
        return breakdowns

    def _forget(self, step: int) -> None:
        """No start goes on from before `step`. The folder is listed once for each checkpoint, not for each call."""
        if step == self._forgotten:
            return
        self._forgotten = step
        for path in self._folder.glob("*.json"):
            if int(path.name[:8]) < step:
                path.unlink(missing_ok=True)


class KeptRollouts:
    """A `ScoreRewards` that keeps what another one scored, for `posttrain rewards rescore`."""

    def __init__(self, stage: Stage, score: ScoreRewards, state: TrainState) -> None:
        self._folder, self._score, self._state = stage.folder, score, state

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[RewardBreakdown]:
        breakdowns = self._score(prompts, completions, columns)
        totals = [breakdown.total for breakdown in breakdowns]
        with disk_errors(self._folder):
            ScoredCall(self._state.step, prompts, completions, columns, totals).save(self._folder / SCORED)
        return breakdowns
