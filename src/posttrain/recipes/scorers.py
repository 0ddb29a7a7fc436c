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
        return _scored_tokens(self, groups, lambda batch: self.policy.score(batch, temperature=self.temperature).logp_M)

    def entropy(self, groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        """In nats, of what the policy says at each trained token."""
        return _scored_tokens(self, groups, self._entropy_M)

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
        return _scored_tokens(self, groups, lambda batch: self.policy.reference_logp(batch, self.temperature))


@dataclass(frozen=True)
class ValueScorer:
    """What a critic expects before each trained token, under its present weights."""

    policy: Policy
    at_once: int
    ranks: Ranks

    def values(self, groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        return _scored_tokens(self, groups, self.policy.rewards)


@dataclass(frozen=True)
class FeatureScorer:
    """What the given starting model makes of whole sequences: its states at `depths`, after the last token, or the mean over what is masked.

    A token's features are the states of its layers behind each other, of length 1; with `normalize_layers` each is of one length before.
    """

    policy: Policy
    depths: Sequence[float]
    embed_method: str
    normalize_layers: bool
    at_once: int
    ranks: Ranks

    def features(self, groups: Sequence[Sequence[TokenSeq]]) -> list[np.ndarray]:
        """A float32 vector of each sequence, the same of equal ones; its loss mask says what is behind the prompt. All ranks ask."""
        # To the bit: what only differs by rounding would be a direction of its own to whitening.
        unique = [list(dict.fromkeys(group)) for group in groups]
        found = iter(_scored(self, [[self._asked(seq) for seq in group] for group in unique], self._embedded))
        of_group = [{seq: next(found) for seq in group} for group in unique]
        return [known[seq] for known, group in zip(of_group, groups, strict=True) for seq in group]

    def _asked(self, seq: TokenSeq) -> TokenSeq:
        """A score is asked for where the token behind it is trained, so one is put behind the last."""
        last = (False,) * (len(seq.ids) - 1) + (True,)
        return TokenSeq((*seq.ids, 0), (False, *(last if self.embed_method == "last_token" else seq.loss_mask)))

    def _embedded(self, batch: Batch) -> Sequence[torch.Tensor]:
        with self.policy.reference() as given:
            states_MKD = given.hidden_states(batch, self.depths)
        if self.normalize_layers:
            states_MKD = torch.nn.functional.normalize(states_MKD, dim=-1)
        token_MF = torch.nn.functional.normalize(states_MKD.flatten(1), dim=-1)
        return [tokens.mean(0) for tokens in token_MF.split(batch.lengths_S().tolist())]


def _scored_tokens(
    by: PolicyScorer | ReferenceScorer | ValueScorer,
    groups: Sequence[Sequence[Sample]],
    score: Callable[[Batch], torch.Tensor],
) -> list[np.ndarray]:
    return _scored(by, groups, lambda batch: score(batch).split(batch.lengths_S().tolist()))


@torch.no_grad()
def _scored(
    by: PolicyScorer | ReferenceScorer | ValueScorer | FeatureScorer,
    groups: Sequence[Sequence[Sample | TokenSeq]],
    score: Callable[[Batch], Sequence[torch.Tensor]],
) -> list[np.ndarray]:
    """What `score` says of each sequence of a batch, of all of them."""
    found: list[np.ndarray] = []
    batches = [pack(micro) for micro in fill_with_groups(split_groups(groups, by.at_once), by.at_once)]
    # Ranks of a sharded model run it equally often; asked before the first run, which is a collective itself.
    idle = max(by.ranks.gather(len(batches))) - len(batches)
    for batch in batches:
        found += [values.float().cpu().numpy() for values in score(batch)]
    for _ in range(idle):
        score(pack([[NOTHING]]))
    return found
