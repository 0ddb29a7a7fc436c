"""The engine that a stage samples with."""

from __future__ import annotations

from posttrain.config.stages import TrainKeys
from posttrain.models.load import stop_token_ids
from posttrain.models.policy import Policy
from posttrain.protocols import Topology
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.replica import replicate

_ROWS = 64


def make_engine(policy: Policy, keys: TrainKeys, topology: Topology) -> EmbeddedEngine:
    """An engine on the policy's own weights; on a whole copy of them where the policy is to be sharded."""
    stops, rows = stop_token_ids(policy.base, policy.tokenizer), getattr(keys, "rollout_batch_size", _ROWS)
    if topology.world_size == 1:
        return EmbeddedEngine(policy, stop_token_ids=stops, batch_size=rows)
    copy, refresh = replicate(policy, topology)
    return EmbeddedEngine(copy, stop_token_ids=stops, batch_size=rows, refresh=refresh)
