"""Who says how likely a sample is: the trainer, the reference; and what may be expected of it: a critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.models.batch import Batch, pack
from posttrain.models.policy import Policy
from posttrain.protocols import Ranks
from posttrain.recipes.batches import fill_with_groups, split_groups
from posttrain.types import Sample, TokenSeq

NOTHING = TokenSeq((0, 0), (False, True))


@dataclass(frozen=True)
class PolicyScorer:
    """A `Scorer`: the policy's present weights, at the temperature that training uses, `at_once` samples at a time."""

    policy: Policy
    temperature: float
    at_once: int
    ranks: Ranks

    def logp(self, groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        return _scored(self, groups, lambda batch: self.policy.score(batch, temperature=self.temperature).logp_M)

    def entropy(self, groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        """In nats, of what the policy says at each trained token."""
        return _scored(self, groups, self._entropy_M)

    def _entropy_M(self, batch: Batch) -> torch.Tensor:
        entropy_M = self.policy.score(batch, temperature=self.temperature, entropy=True).entropy_M
        assert entropy_M is not None
        return entropy_M


@dataclass(frozen=True)
class ReferenceScorer:
    """A `Scorer`: the given starting model, with the adapter off or from its frozen copy."""

    policy: Policy
    temperature: float
    at_once: int
    ranks: Ranks

    def logp(self, groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        return _scored(self, groups, lambda batch: self.policy.reference_logp(batch, self.temperature))


@dataclass(frozen=True)
class ValueScorer:
    """What a critic expects before each trained token, under its present weights."""

    policy: Policy
    at_once: int
    ranks: Ranks

    def values(self, groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        return _scored(self, groups, self.policy.rewards)


@torch.no_grad()
def _scored(
    by: PolicyScorer | ReferenceScorer | ValueScorer,
    groups: Sequence[Sequence[Sample]],
    score: Callable[[Batch], torch.Tensor],
) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    batches = [pack(micro) for micro in fill_with_groups(split_groups(groups, by.at_once), by.at_once)]
    # Ranks of a sharded model run it equally often; asked before the first run, which is a collective itself.
    idle = max(by.ranks.gather(len(batches))) - len(batches)
    for batch in batches:
        found += [logp.float().cpu().numpy() for logp in score(batch).split(batch.lengths_S().tolist())]
    for _ in range(idle):
        score(pack([[NOTHING]]))
    return found
