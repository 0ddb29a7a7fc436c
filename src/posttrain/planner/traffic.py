"""What a generation batch of a stage samples and trains on, and how its loop runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.planner.shape import ModelShape
from posttrain.planner.steptime import Loop, Traffic
from posttrain.planner.workload import Workload

SEQUENCES = 256
"""Most that vLLM decodes at once by default, in a replica."""


def loop_of(workload: Workload) -> Loop:
    ours = workload.rollout.is_ours
    return Loop(
        scoring_models=int(workload.scores_reference) + workload.num_iterations * workload.selects_tokens, recompute=bool(workload.gradient_checkpointing),
        adapter=workload.adapter != "none", iterations=workload.num_iterations, micro_rows=workload.per_device_train_batch_size,
        batch_limit=workload.rollout_batch_size if ours else SEQUENCES,
        split=1 if ours else workload.rollout.tensor_parallel_size, shares_weights=ours, sharding=workload.sharding,
    )  # fmt: skip


def traffic_of(shape: ModelShape, workload: Workload, keys: Mapping[str, Any], mean: int) -> Traffic:
    """What a generation batch samples; without a mean, every prompt and answer as long as allowed."""
    whole, longest = workload.longest(shape), workload.completion(shape)
    if keys.get("mode") == "strided":
        return _strided(keys, min(mean or whole, whole), longest)
    prompt = min(mean, whole) if mean else max(1, whole - longest)
    return Traffic(
        keys["num_prompts_per_step"], keys["num_generations"], prompt, min(mean or longest, longest), longest
    )


def before_anchors(keys: Mapping[str, Any], anchors: float) -> float:
    """Tokens before an anchor, on the mean over so many of a row."""
    return keys["context_length"] + (anchors - 1) * keys["stride"] / 2


def _strided(keys: Mapping[str, Any], row: int, answer: int) -> Traffic:
    """Each anchor of a row of so many tokens is a prompt: all that stands before it."""
    first, stride = keys["context_length"], keys["stride"]
    anchors = max(1, (row - answer - first) // stride + 1)
    before = before_anchors(keys, anchors)
    return Traffic(keys["num_prompts_per_step"] * anchors, keys["num_generations"], before, answer, answer)
