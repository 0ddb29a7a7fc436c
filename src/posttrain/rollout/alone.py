"""Sampling one request at a time through transformers' own cache, for models the ragged layout is not exact for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from posttrain.models.lengths import forget_lengths
from posttrain.models.policy import Policy
from posttrain.rollout.sampling import StopTest, sample
from posttrain.types import Finish, Request, SamplingParams


@dataclass
class DecodingRow:
    """A completion under way: the place of its request, its random numbers, what was sampled so far, and how it ended."""

    place: int
    request: Request
    uniform: np.ndarray
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def sequence(self) -> tuple[int, ...]:
        return (*self.request.prompt_ids, *self.ids)

    def take(self, token: int, logp: float, ends: Ends) -> None:
        """The next token; afterwards `finish` says whether it was the last."""
        self.ids.append(token)
        self.logp.append(logp)
        if token in ends.stop_ids or (ends.should_stop is not None and ends.should_stop(self.ids)):
            self.finish = "stop"
        elif len(self.ids) >= ends.max_tokens:
            self.finish = "length"


@dataclass(frozen=True)
class Ends:
    """What ends a completion."""

    max_tokens: int
    stop_ids: frozenset[int]
    should_stop: StopTest | None


def finish_alone(policy: Policy, row: DecodingRow, params: SamplingParams, ends: Ends) -> None:
    """Slow and plain: the whole sequence is run again for each token, which is right for every architecture."""
    while row.finish is None:
        sequence = torch.tensor([row.sequence], device=policy.placement.device)
        forget_lengths(policy.base)
        logits_1V = policy.model(input_ids=sequence, use_cache=False, logits_to_keep=1).logits[0]
        uniform_1 = torch.from_numpy(row.uniform[len(row.ids) : len(row.ids) + 1]).to(logits_1V.device)
        token_1, logp_1 = sample(logits_1V, uniform_1, params)
        row.take(int(token_1), float(logp_1), ends)
