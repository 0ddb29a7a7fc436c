"""Pairs of the policy's own completions: which two of a prompt's, and how a step takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch

from posttrain.config.online_dpo import OnlineDPOKeys
from posttrain.data.load import PairRow
from posttrain.health.controls import Controls
from posttrain.objectives.advantages import as_rewards, best_and_worst, combine
from posttrain.objectives.preference import PreferenceSpec
from posttrain.recipes.batches import dealt_micros
from posttrain.recipes.credit import Credited, Made, column_weights, known
from posttrain.recipes.dpo import pair_cost
from posttrain.recipes.experience.sampled import Numbered
from posttrain.rollout.experience import Group
from posttrain.types import Sample, TokenSeq


def pair_objective(keys: OnlineDPOKeys) -> PreferenceSpec:
    """The row of the table of preference losses that is asked for. Raises: ConfigError for what it is not defined for."""
    taken = {field.name for field in fields(PreferenceSpec)} & type(keys).model_fields.keys()
    return PreferenceSpec(**{name: getattr(keys, name) for name in taken})


class PairCredit:
    """A `Credit` without advantages: of a group the best completion and the worst, in that order, are what is trained on.

    One that could not be scored, or is masked, is in no pair; a group whose rewards are equal gives none, and stays as one
    untrained sample.
    """

    critic = None

    def __init__(self, keys: OnlineDPOKeys) -> None:
        self._keys = keys

    def opinions(
        self, numbered: Sequence[Numbered], groups: Sequence[Group], olds: Sequence[np.ndarray | None]
    ) -> Iterator[np.ndarray] | None:
        return None

    def credited(self, made: Sequence[Made], generation: int, beta: float) -> Credited:
        rewards_BK = as_rewards([row for one in made for row in one.rewards])
        weights_K = torch.tensor(column_weights(self._keys, rewards_BK.shape[1]), dtype=torch.float64)
        reward_B = combine(rewards_BK, weights_K)
        parts = [part.tolist() for part in reward_B.split([len(one.samples) for one in made])]
        places = [_places(one, rewards) for one, rewards in zip(made, parts, strict=True)]
        groups = tuple(
            (one.samples[0].untrained(),) if found is None else (one.samples[found[0]], one.samples[found[1]])
            for one, found in zip(made, places, strict=True)
        )
        margins = [rewards[found[0]] - rewards[found[1]] for rewards, found in zip(parts, places, strict=True) if found]
        metrics = {"pairs/count": float(len(margins)), **_entropy(made)}
        if margins:
            metrics["pairs/reward_margin"] = sum(margins) / len(margins)
        return Credited(groups, rewards_BK, reward_B, torch.tensor([found is None for found in places]), metrics)

    def teaches(self, group: Group, controls: Controls) -> bool:
        return len(group) == len(("chosen", "rejected"))


def _places(one: Made, rewards: Sequence[float]) -> tuple[int, int] | None:
    trained = zip(one.samples, rewards, strict=True)
    return best_and_worst([reward if sample.num_loss_tokens else np.nan for sample, reward in trained])


def _entropy(made: Sequence[Made]) -> dict[str, float]:
    """Of what samples, as far as its samples tell it: the mean of −log p, in nats per token."""
    logp_M = np.concatenate([known(sample.behavior_logp) for one in made for sample in one.samples])
    return {"entropy": -float(logp_M.mean(dtype=np.float64))} if logp_M.size else {}


def pair_rows(groups: Sequence[Group]) -> list[PairRow]:
    """The pairs as a stage of `dpo` reads them from its data."""
    return [PairRow(_token_seq(chosen), _token_seq(rejected)) for chosen, rejected in groups]


def _token_seq(sample: Sample) -> TokenSeq:
    return TokenSeq(tuple(sample.ids.tolist()), tuple(sample.loss_mask.tolist()))


def pair_micros(rows: Sequence[PairRow], completions_at_once: int, world_size: int) -> list[list[PairRow]]:
    """The micro-batches of a step over all ranks, at most so many completions in each, but a whole pair."""
    at_once = max(1, completions_at_once // 2)
    return [[rows[place] for place in micro] for micro in dealt_micros([*map(pair_cost, rows)], at_once, world_size)]
