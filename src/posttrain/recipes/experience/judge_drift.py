"""While RL runs: does a judge at a server still judge as it did when the run began?

Another model may come to answer behind the same name, and kept verdicts would hide it. So what was asked first is asked again now and
then, past what is kept. Touches nothing that training uses, and knows nothing of what is done about it: the number is a metric, and a rule judges it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from posttrain.checkpoint.store import disk_errors
from posttrain.config.rl import RewardedKeys
from posttrain.files import read_record, write_json
from posttrain.health.checks import JUDGE_AGREEMENT
from posttrain.recipes.measure.judges import AskedJudge, JudgeReward
from posttrain.recipes.run.stage import Stage
from posttrain.rewards.workers import RewardPool
from posttrain.rollout.collect import as_reward_input
from posttrain.types import Rollout, RolloutGroup

FILE = "first-verdicts.json"
_NUM_QUESTIONS = 16
"""Of each judge, each time."""


class JudgeDrift:
    """`if_due` after every generation batch; all ranks call it and the main one asks."""

    def __init__(self, keys: RewardedKeys, stage: Stage, rewards: RewardPool) -> None:
        self._every, self._steps_per_batch = keys.reward_check_steps, keys.steps_per_batch
        self._stage, self._path = stage, stage.folder / FILE
        found = rewards.opinions.items()
        self._judges = {name: one for name, one in found if isinstance(one, JudgeReward) and one.is_served}

    def if_due(self, step: int, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """`judge/agreement` if the step that begins with `groups` is one of every `reward_check_steps`; the first of a run writes down what later ones ask."""
        if not self._judges or not self._every:
            return {}
        return self._stage.ranks.main_only(lambda: self._compared(step, groups))

    def _compared(self, step: int, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        if not self._path.exists():
            first = {name: _first(judge, groups) for name, judge in self._judges.items()}
            if any(one["asked"] for one in first.values()):
                with disk_errors(self._path.parent):
                    write_json(self._path, first)
            return {}
        if not step or step % self._every >= self._steps_per_batch:
            return {}
        go_on = f"delete {self._path} and go on: the verdicts of the next batch are then the first"
        kept = read_record(self._path, lambda record: {name: _read(record[name]) for name in self._judges}, go_on)
        moved = {name: _moved(judge, *kept[name]) for name, judge in self._judges.items()}
        known = list(chain.from_iterable(moved.values()))
        agreement = {JUDGE_AGREEMENT: 1.0 - sum(known) / len(known)} if known else {}
        self._stage.run.event("judge_drift", step + 1, {**agreement, "moved": moved})
        return agreement


def _moved(judge: JudgeReward, asked: Sequence[AskedJudge], first: Sequence[float | None]) -> list[float]:
    """How far each verdict is from the first one; those that did not come are the business of `judge/failed`."""
    now = judge.verdicts(asked, anew=True)
    return [abs(new - old) for old, new in zip(first, now, strict=True) if old is not None and new is not None]


def _read(record: Mapping[str, Any]) -> tuple[list[AskedJudge], list[float | None]]:
    return [(messages, seed) for messages, seed in record["asked"]], record["verdicts"]


def _first(judge: JudgeReward, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """Of a batch that was scored, so the answers are kept: nothing is paid for them again."""
    rollouts = [(group, rollout) for group in groups for rollout in group.rollouts if rollout.status == "scored"]
    asked: list[AskedJudge] = []
    for group, rollout in rollouts:
        if len(asked) < _NUM_QUESTIONS:
            asked += judge.asked(as_reward_input(group.prompt.prompt), *_said(group, rollout))
    asked = asked[:_NUM_QUESTIONS]
    return {"asked": asked, "verdicts": judge.verdicts(asked)}


def _said(group: RolloutGroup, rollout: Rollout) -> tuple[Any, dict[str, Any]]:
    """What a judge reads of it: its text, and the row's columns."""
    episode = rollout.completion.episode
    paid = {} if episode is None else {"env_reward": episode.env_reward}
    return rollout.text, {**group.prompt.columns, "completion_ids": list(rollout.completion.ids), **paid}
