"""The engine that a stage samples with, how it samples, and the proof that it samples from the weights in training."""

from __future__ import annotations

from functools import partial

from posttrain.config.stages import GRPOKeys, TrainKeys
from posttrain.models.generation import stop_token_ids
from posttrain.models.policy import Policy
from posttrain.protocols import Engine, Topology
from posttrain.rollout.canary import TOLERANCE, check_arrival
from posttrain.rollout.embedded import EmbeddedEngine, score_sequences
from posttrain.rollout.replica import replicate
from posttrain.types import SamplingParams

_ROWS = 64


def make_engine(policy: Policy, keys: TrainKeys, topology: Topology) -> EmbeddedEngine:
    """An engine on the policy's own weights; on a whole copy of them where the policy is to be sharded."""
    stops = stop_token_ids(policy.base, policy.tokenizer)
    rows = keys.rollout_batch_size if isinstance(keys, GRPOKeys) else _ROWS
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


def sync_engine(engine: Engine, policy: Policy, version: int) -> None:
    """Bring the engine to the weights of the trained policy, as `version`. All ranks call it.

    Raises: EngineError if a canary shows that they did not arrive.
    """
    engine.sync(version)
    check_arrival(engine, partial(score_sequences, policy), TOLERANCE[engine.dtype])
