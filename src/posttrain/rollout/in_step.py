"""The embedded engine on a policy whose parameters lie in shares on several ranks: they go through it together.

A layer is gathered once a forward for the rows of all ranks, and none is held whole for longer. A rank whose rows have ended makes
forwards of a single token until those of the last one have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.errors import ConfigError
from posttrain.models.lengths import length_rule
from posttrain.models.policy import Policy
from posttrain.protocols import Ranks, Weights
from posttrain.rollout.alone import AloneRows
from posttrain.rollout.cached import CachedRows
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Completion, EngineInfo, Moved, Request, SamplingParams, in_order


class InStepEngine:
    """`engine`, which decodes with the shares of `policy`. All ranks call `generate` and `score` together, each with what it wants to know.

    Raises: ConfigError for a model whose rows are encoded anew once they are long.
    """

    def __init__(self, engine: EmbeddedEngine, policy: Policy, ranks: Ranks) -> None:
        if length_rule(policy.base.config) is not None:
            raise ConfigError(
                f"rollout.transfer: shared with several processes, and {policy.source} encodes long sequences in another way than short "
                "ones; set rollout.transfer: copy"
            )
        self._engine, self._policy, self._ranks = engine, policy, ranks

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    def describe(self) -> EngineInfo:
        return self._engine.describe()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """All at once, when the last one of any rank has ended."""
        with in_step(self._policy, self._ranks):
            found = in_order(self._engine.generate(requests, params))
        return iter(found)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        mine = [(tuple(ids), start) for ids, start in sequences]
        asked = list(dict.fromkeys(one for rank in self._ranks.gather(mine) for one in rank))
        found = dict(zip(asked, self._engine.score(asked, temperature), strict=True))
        return [found[one] for one in mine]

    def update(self, weights: Weights, version: int) -> Moved:
        return self._engine.update(weights, version)

    def rest(self) -> None:
        self._engine.rest()

    def close(self) -> None:
        self._engine.close()


@contextmanager
def in_step(policy: Policy, ranks: Ranks) -> Iterator[None]:
    """Inside, every forward of the policy is one of all ranks; at the end this rank makes those that others still need."""

    def begin(*_: Any) -> None:
        _is_any(ranks, busy=True)

    hook = policy.model.register_forward_pre_hook(begin, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    while _is_any(ranks, busy=False):
        _idle(policy)
    policy.sharding.release(policy.model)


def _is_any(ranks: Ranks, *, busy: bool) -> bool:
    """Whether any rank makes a forward now. Each says once before it makes one, or that it has none."""
    return ranks.sum([float(busy)])[0] > 0


@torch.no_grad()
def _idle(policy: Policy) -> None:
    """This rank's part in the gathers of a forward."""
    was_training = policy.model.training
    policy.model.eval()
    with policy.placement.autocast():
        (CachedRows(policy) if policy.ragged else AloneRows(policy)).prefill([(0,)])
    policy.model.train(was_training)
