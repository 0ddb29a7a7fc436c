"""The engine that a stage samples with, how it samples, and the proof that it samples from the weights in training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from posttrain.config.stages import GRPOKeys, ModelKeys
from posttrain.distributed.topology import SingleProcess
from posttrain.models.generation import stop_token_ids
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.protocols import Engine, Topology
from posttrain.rollout.canary import check_arrival
from posttrain.rollout.embedded import EmbeddedEngine, score_sequences
from posttrain.rollout.replica import replica
from posttrain.types import SamplingParams

_ROWS = 64
"""Completions decoded at once where nobody says how many."""


@dataclass(frozen=True)
class EngineSource:
    """What an engine starts from: the keys of a model, and the policy made from them where it is there already."""

    model: ModelKeys
    policy: Policy | None = None


def _embedded(source: EngineSource, rows: int, topology: Topology) -> Engine:
    """On the policy's own weights; on a whole copy of them where the policy is to be sharded."""
    policy = source.policy or load_policy(source.model, trainable=False)
    stops, shares = stop_token_ids(policy.base, policy.tokenizer), topology.world_size == 1 or source.policy is None
    return EmbeddedEngine(
        policy if shares else replica(policy), stop_token_ids=stops, batch_size=rows, shares_weights=shares
    )


ENGINES: Mapping[str, Callable[[EngineSource, int, Topology], Engine]] = {"embedded": _embedded}
"""Name → an engine on a source."""


def make_engine(
    source: EngineSource, topology: Topology | None = None, *, name: str = "embedded", rows: int = _ROWS
) -> Engine:
    """The engine that a stage, an eval, a certificate or a chat samples with. Where the policy is sharded, before that is done."""
    return ENGINES[name](source, rows, topology or SingleProcess())


def sampling_params(keys: GRPOKeys) -> SamplingParams:
    """How an RL stage samples: for training, for its certificate, and for its checks while it runs."""
    return SamplingParams(
        max_tokens=keys.max_completion_length, temperature=keys.temperature, top_p=keys.top_p, top_k=keys.top_k,
        min_p=keys.min_p, stop=tuple(keys.stop),
    )  # fmt: skip


def greedy(params: SamplingParams) -> SamplingParams:
    """The same with the most likely token every time: how a stage is validated."""
    return SamplingParams(params.max_tokens, 0.0, stop_token_ids=params.stop_token_ids, stop=params.stop)


def sync_engine(engine: Engine, policy: Policy, version: int) -> dict[str, float]:
    """Bring the engine to the weights of the trained policy, as `version`; what that took, as metrics. All ranks call it.

    Raises: EngineError if a canary shows that they did not arrive.
    """
    started = time.monotonic()
    moved = engine.update(policy, version)
    gap = check_arrival(engine, partial(score_sequences, policy))
    return {"sync/moved_bytes": float(moved), "sync/wall_s": time.monotonic() - started, "sync/canary_gap": gap}
