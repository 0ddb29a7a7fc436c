"""What each sampled token was worth: a completion's reward against its group's, shared out by teachers where there are any.

A critic says it otherwise (`critic.py`); the collector asks either in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from posttrain.config.rl import GRPOKeys, PolicyGradientKeys, RewardedKeys
from posttrain.health.controls import Controls
from posttrain.objectives.advantages import AdvantageSpec, as_rewards, compute_advantages, turn_advantages
from posttrain.objectives.distill import TEACHER_ADVANTAGES, coefficient_at
from posttrain.objectives.policy import advantage_estimator_of
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import spec_from
from posttrain.protocols import Scorer
from posttrain.recipes.experience.sampled import Numbered, group_indices
from posttrain.recipes.run.steering import steered
from posttrain.recipes.run.train_state import Learner
from posttrain.recipes.teachers import Teachers
from posttrain.rollout.experience import Group
from posttrain.types import Episode


@dataclass(frozen=True, slots=True)
class Steps:
    """What a completion is credited by, turns or steps: how many tokens each has, and what was paid for it; None is nothing.

    Example: a prompt answered in two steps of three and four tokens, rated 0.9 and 0.2: tokens 3 4, paid 0.9 0.2.
    """

    tokens: tuple[int, ...]
    paid: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """One prompt's group on its way to all ranks: samples without advantage, a row of rewards for each, how each ended."""

    number: int
    samples: Group
    rewards: list[list[float | None]]
    lengths: list[int]
    truncated: list[bool]
    kl: list[float]
    """To the reference, of each completion; empty where it is no part of the reward."""
    counts: list[Mapping[str, float]]
    """Of each completion: what asking models for its rewards came to."""
    said: list[np.ndarray] | None
    """Of each sample, what teachers or a critic say of its trained tokens; None where nobody was asked."""
    episodes: list[Episode]
    """What they were like, without what was said."""
    steps: list[Steps] = field(default_factory=list["Steps"])
    """Of each completion, where a process reward model pays by step."""
    interrupted: list[bool] = field(default_factory=list[bool])
    """Of each completion whether its thought was cut short; empty where none may be."""


@dataclass(frozen=True, slots=True)
class Credited:
    """The groups with their advantages, and the rewards behind them: NaN is unscored. `zero_std_P`: which groups teach
    nothing because their rewards are equal; None where such groups teach."""

    groups: tuple[Group, ...]
    rewards_BK: torch.Tensor
    reward_B: torch.Tensor
    zero_std_P: torch.Tensor | None
    metrics: dict[str, float]


class Credit(Protocol):
    """Gives the samples of a generation batch their advantages."""

    @property
    def critic(self) -> Learner | None:
        """What it has of its own to train."""
        ...

    def opinions(
        self, numbered: Sequence[Numbered], groups: Sequence[Group], olds: Sequence[np.ndarray | None]
    ) -> Iterator[np.ndarray] | None:
        """`Made.said` of this rank's samples; `olds` are the trainer's log-probs where they are known."""
        ...

    def credited(self, made: Sequence[Made], generation: int, beta: float) -> Credited:
        """Of all ranks' groups, in order; `beta` weighs a KL in the reward."""
        ...

    def teaches(self, group: Group, controls: Controls) -> bool:
        """Whether a group moves weights, as the run's controls have the loss now."""
        ...


class GroupCredit:
    """A `Credit`: rewards against those of their group, their batch or nothing, and what teachers make of it."""

    critic = None

    def __init__(self, keys: GRPOKeys, teachers: Teachers, trainer: Scorer) -> None:
        self._keys, self._teachers, self._trainer = keys, teachers, trainer
        self.objective = spec_from(PolicySpec, keys)

    def opinions(
        self, numbered: Sequence[Numbered], groups: Sequence[Group], olds: Sequence[np.ndarray | None]
    ) -> Iterator[np.ndarray] | None:
        """log teacher − log policy, both from the same forward: a sampler's rounding is no lesson."""
        if not self._keys.teachers:
            return None
        own = [known(old) for old in olds] if self._keys.asks_trainer else self._trainer.logp(groups)
        lessons = [(group.prompt, samples) for (_, group), samples in zip(numbered, groups, strict=True)]
        return iter([teacher - policy for teacher, policy in zip(self._teachers.logp(lessons), own, strict=True)])

    def credited(self, made: Sequence[Made], generation: int, beta: float) -> Credited:
        rewards = [row for one in made for row in one.rewards]
        append(rewards, [-beta * kl for one in made for kl in one.kl])
        rewards_BK = as_rewards(rewards)
        group_B, spec = group_indices([len(one.rewards) for one in made]), self._spec(rewards_BK.shape[1])
        found = compute_advantages(rewards_BK, group_B, spec)
        if self._keys.credit != "episode":
            paid = step_rewards(made, found.reward_B, self._keys)
            each = iter(turn_advantages(paid, group_B, spec, self._keys.gamma))
            tokens = iter([steps.tokens for steps in credited_steps(made, self._keys)])
            groups = tuple(self._by_step(one, each, tokens) for one in made)
            return Credited(groups, rewards_BK, found.reward_B, found.zero_std_P, paid_share(paid))
        coef = self._teacher_coef(generation)
        groups = tuple(self._advised(one, each, coef) for one, each in _by_group(made, found.advantage_B))
        if self._keys.zero_variance_filtering:
            groups = tuple(
                _filtered(group, equal) for group, equal in zip(groups, found.zero_std_P.tolist(), strict=True)
            )
        metrics = _gap(made) | {"teacher/coef": coef} if self._keys.teachers else {}
        return Credited(groups, rewards_BK, found.reward_B, found.zero_std_P, metrics)

    def teaches(self, group: Group, controls: Controls) -> bool:
        """By an advantage, or by a term that needs none."""
        objective = steered(self.objective, controls)
        pulled = objective.entropy_coef > 0 or (objective.beta > 0 and not self._keys.kl_in_reward)
        return any(s.num_loss_tokens and (pulled or _moves(s.advantage) or _moves(s.penalty)) for s in group)

    def _spec(self, num_columns: int) -> AdvantageSpec:
        """Some losses are defined with their own baseline."""
        spec = spec_from(AdvantageSpec, self._keys)
        estimator = advantage_estimator_of(self._keys.loss_type, spec.advantage_estimator)
        return replace(spec, reward_weights=column_weights(self._keys, num_columns), advantage_estimator=estimator)

    def _teacher_coef(self, generation: int) -> float:
        """At the first step that a generation batch is trained in."""
        keys = self._keys
        step = generation * keys.steps_per_batch
        return coefficient_at(keys.teacher_coef, step, keys.teacher_warmup_steps, keys.teacher_decay_steps)

    def _advised(self, one: Made, advantages: Sequence[float], coef: float) -> Group:
        """The samples with their advantages: one value each, or what teachers make of it token by token."""
        if one.said is None:
            each = [sample.constant(value) for sample, value in zip(one.samples, advantages, strict=True)]
        else:
            of_tokens = TEACHER_ADVANTAGES[self._keys.teacher_advantage]
            pairs = zip(advantages, one.said, strict=True)
            each = [_of_tokens(of_tokens, value, ratio, coef, self._keys.teacher_clip) for value, ratio in pairs]
        return self._with(one.samples, each)

    def _by_step(self, one: Made, advantages: Iterator[list[float]], tokens: Iterator[tuple[int, ...]]) -> Group:
        """A sample that is left out of the loss has no tokens, whatever its turns or steps had."""
        each = [
            np.repeat(np.array(next(advantages), np.float32), np.array(next(tokens), np.int64))[
                : sample.num_loss_tokens
            ]
            for sample in one.samples
        ]
        return self._with(one.samples, each)

    def _with(self, samples: Group, advantages: Sequence[np.ndarray]) -> Group:
        return tuple(
            replace(s, advantage=values, ref_logp=None if self._keys.kl_in_reward else s.ref_logp)
            for s, values in zip(samples, advantages, strict=True)
        )


def credited_steps(made: Sequence[Made], keys: PolicyGradientKeys) -> list[Steps]:
    """Of each completion its turns, or the steps of its answer."""
    if keys.credit == "step":
        return [steps for one in made for steps in one.steps]
    return [Steps(episode.turn_tokens, episode.turn_rewards) for one in made for episode in one.episodes]


def step_rewards(made: Sequence[Made], reward_B: torch.Tensor, keys: PolicyGradientKeys) -> list[list[float | None]]:
    """Per completion, what each turn or step earned: its weighted pay when it was paid, and all other rewards at the last one.

    Nothing at all where the completion could not be scored. A last turn has nothing where no other reward says anything and the environment
    paid for earlier turns alone: a step that nobody rates is no 0 among the step rewards (arXiv 2402.03300 sec. 4.1.3). Where no turn
    was paid, the last one has the episode's reward. Turns add up to the episode's reward; for steps, which are paid each, the aggregate of
    their scores plays no part.
    """
    place = keys.paying_step
    weight = column_weights(keys, len(keys.reward_funcs))[place]
    rows = [row for one in made for row in one.rewards]
    found: list[list[float | None]] = []
    for steps, row, reward in zip(credited_steps(made, keys), rows, reward_B.tolist(), strict=True):
        lost = math.isnan(reward)
        paid = [None if each is None or lost else weight * each for each in steps.paid]
        others = any(value is not None for column, value in enumerate(row) if column != place)
        if paid and not lost and (others or all(each is None for each in paid)):
            whole = reward
            if keys.credit == "step":
                whole += sum(each or 0.0 for each in paid) - weight * (row[place] or 0.0)
            paid[-1] = whole - sum(each for each in paid[:-1] if each is not None)
        found.append(paid)
    return found


def paid_share(paid: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """Of all turns or steps, how many earned something of their own."""
    turns = [reward is not None for episode in paid for reward in episode]
    return {"env/paid_turns": sum(turns) / len(turns)} if turns else {}


def column_weights(keys: RewardedKeys, num_columns: int) -> list[float]:
    """Shaping columns come after the reward functions and weigh 1."""
    weights = list(keys.reward_weights or [1.0] * len(keys.reward_funcs))
    return weights + [1.0] * (num_columns - len(weights))


def append(rows: list[list[float | None]], values: Sequence[float]) -> None:
    """A column of shaping, where there are values. A completion that could not be scored has none: shaping alone would make it count as scored."""
    for row, value in zip(rows, values, strict=bool(values)):
        row.append(None if all(part is None for part in row) else value)


def _filtered(group: Group, equal: bool) -> Group:
    """Nothing of it is trained where its rewards are equal."""
    return tuple(sample.untrained() for sample in group) if equal else group


def _moves(stream: np.ndarray | None) -> bool:
    return stream is not None and bool(stream.any())


def known(logp: np.ndarray | None) -> np.ndarray:
    assert logp is not None
    return logp


def _by_group(made: Sequence[Made], advantage_B: torch.Tensor) -> Iterator[tuple[Made, list[float]]]:
    parts = advantage_B.split([len(one.samples) for one in made])
    return ((one, part.tolist()) for one, part in zip(made, parts, strict=True))


def _of_tokens(
    of_tokens: Callable[..., torch.Tensor], advantage: float, log_ratio: np.ndarray, coef: float, clip: float
) -> np.ndarray:
    values_M = of_tokens(torch.tensor(advantage, dtype=torch.float64), torch.from_numpy(log_ratio).double(), coef, clip)
    return values_M.float().numpy()


def _gap(made: Sequence[Made]) -> dict[str, float]:
    """log policy − log teacher, a mean over tokens: what is left of KL(policy‖teacher), as far as the samples tell it."""
    ratio_M = np.concatenate([ratio for one in made for ratio in one.said or ()])
    return {"teacher/gap": -float(ratio_M.mean(dtype=np.float64))} if ratio_M.size else {}
