"""The engine that a stage samples with, and how it samples."""

from __future__ import annotations

from posttrain.config.stages import GRPOKeys, TrainKeys
from posttrain.models.generation import stop_token_ids
from posttrain.models.policy import Policy
from posttrain.protocols import Topology
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.replica import replicate
from posttrain.types import SamplingParams

_ROWS = 64


def make_engine(policy: Policy, keys: TrainKeys, topology: Topology) -> EmbeddedEngine:
    """An engine on the policy's own weights; on a whole copy of them where the policy is to be sharded."""
    stops, rows = stop_token_ids(policy.base, policy.tokenizer), getattr(keys, "rollout_batch_size", _ROWS)
    if topology.world_size == 1:
        return EmbeddedEngine(policy, stop_token_ids=stops, batch_size=rows)
    copy, refresh = replicate(policy, topology)
    return EmbeddedEngine(copy, stop_token_ids=stops, batch_size=rows, refresh=refresh)


def sampling_params(keys: GRPOKeys) -> SamplingParams:
    """How an RL stage samples: for training, for its certificate, and for its checks while it runs."""
    return SamplingParams(
        max_tokens=keys.max_completion_length, temperature=keys.temperature, top_p=keys.top_p, top_k=keys.top_k,
        min_p=keys.min_p, stop=tuple(keys.stop),
    )  # fmt: skip


def greedy(params: SamplingParams) -> SamplingParams:
    """The same with the most likely token every time: how a stage is validated."""
    return SamplingParams(params.max_tokens, 0.0, stop_token_ids=params.stop_token_ids, stop=params.stop)
