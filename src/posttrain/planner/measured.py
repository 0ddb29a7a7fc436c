"""What a finished run's own metrics say of the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from posttrain.planner.parts import Cluster
from posttrain.planner.shape import ModelShape
from posttrain.planner.steptime import Traffic, Work, logp_s, rollout_s, train_s
from posttrain.planner.workload import Workload


@dataclass(frozen=True, slots=True)
class Correction:
    """What a finished run took over what was predicted of it."""

    rollout: float = 1.0
    train: float = 1.0


AS_PREDICTED = Correction()


@dataclass(frozen=True, slots=True)
class _StepRows:
    """Sequences of an optimizer step, and micro-batches of a device."""

    count: int
    micro: int


def correction_from(
    metrics: Sequence[Mapping[str, float]],
    shape: ModelShape,
    cluster: Cluster,
    workload: Workload,
    keys: Mapping[str, Any],
) -> Correction:
    """Medians, over the steps, of what was measured over what is predicted of the same tokens; the first step is left out."""
    rows = _rows(workload, keys, cluster)
    devices = cluster.num_devices if workload.on_cpu else workload.rollout.num_cards or cluster.num_devices
    train: list[float] = []
    sampled: list[float] = []
    for before, m in pairwise(metrics):
        tokens = m["num_tokens"] - before["num_tokens"]
        if tokens <= 0 or "step_time" not in m:
            continue
        train.append(m.get("time/train_s", m["step_time"]) / _predicted_train_s(tokens, rows, shape, cluster, workload))
        if m.get("time/rollout_s") and "completions/mean_length" in m:
            answer = m["completions/mean_length"]
            prompt = max(1.0, (tokens - rows.count * answer) / keys["num_prompts_per_step"])
            traffic = Traffic(
                keys["num_prompts_per_step"], keys["num_generations"], prompt, answer, m["completions/max_length"]
            )
            limit = workload.rollout_batch_size if workload.rollout.is_ours else 256
            sampled.append(m["time/rollout_s"] / rollout_s(shape, cluster.device, traffic, devices, limit))
    return Correction(_median(sampled), _median(train))


def _predicted_train_s(
    tokens: float, rows: _StepRows, shape: ModelShape, cluster: Cluster, workload: Workload
) -> float:
    length = tokens / rows.count
    how = workload.sharding.on(cluster.per_node)
    work = Work(tokens, length, bool(workload.gradient_checkpointing), workload.adapter != "none", rows.micro, how)
    seconds = train_s(shape, cluster.device, work, cluster.num_devices, cluster.device_link)
    scored = workload.scores_reference
    return seconds + (logp_s(shape, cluster.device, tokens, cluster.num_devices, 1, length) if scored else 0.0)


def _rows(workload: Workload, keys: Mapping[str, Any], cluster: Cluster) -> _StepRows:
    shares = cluster.num_devices // workload.sharding.sharing(cluster.num_devices)
    if workload.samples:
        count = keys["num_prompts_per_step"] * keys["num_generations"]
        return _StepRows(count, max(1, count // shares // workload.per_device_train_batch_size))
    micro = keys["gradient_accumulation_steps"]
    pairs = 2 if workload.pairs else 1
    return _StepRows(workload.per_device_train_batch_size * micro * shares * pairs, micro)


def _median(values: list[float]) -> float:
    """1 of nothing."""
    return sorted(values)[len(values) // 2] if values else 1.0
