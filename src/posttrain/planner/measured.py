"""What a finished run's own metrics say of the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from posttrain.planner.parts import Cluster
from posttrain.planner.shape import ModelShape
from posttrain.planner.steptime import Traffic, Work, logp_s, rollout_s, train_s
from posttrain.planner.traffic import SEQUENCES, before_anchors, traffic_of
from posttrain.planner.workload import Workload


@dataclass(frozen=True, slots=True)
class Correction:
    """What a finished run took over what was predicted of it."""

    rollout: float = 1.0
    train: float = 1.0


AS_PREDICTED = Correction()


@dataclass(frozen=True, slots=True)
class _StepRows:
    """What an optimizer step trained on: sequences, micro-batches of a device, and tokens with those of the prompts; of a stage that samples what it asked."""

    count: float
    micro: int
    tokens: float
    asked: Traffic | None = None


def correction_from(
    metrics: Sequence[Mapping[str, float]], shape: ModelShape, cluster: Cluster, workload: Workload,
    keys: Mapping[str, Any], mean_tokens: int = 0,
) -> Correction:  # fmt: skip
    """Medians, over the steps, of what was measured over what is predicted of the same tokens; the first step is left out."""
    devices = cluster.num_devices if workload.on_cpu else workload.rollout.num_cards or cluster.num_devices
    train: list[float] = []
    sampled: list[float] = []
    for before, m in pairwise(metrics):
        tokens = m["num_tokens"] - before["num_tokens"]
        if tokens <= 0 or "step_time" not in m:
            continue
        rows = _rows(tokens, m, shape, cluster, workload, keys, mean_tokens)
        train.append(m.get("time/train_s", m["step_time"]) / _predicted_train_s(rows, shape, cluster, workload))
        if m.get("time/rollout_s") and rows.asked is not None:
            limit = workload.rollout_batch_size if workload.rollout.is_ours else SEQUENCES
            sampled.append(m["time/rollout_s"] / rollout_s(shape, cluster.device, rows.asked, devices, limit))
    return Correction(_median(sampled), _median(train))


def _predicted_train_s(rows: _StepRows, shape: ModelShape, cluster: Cluster, workload: Workload) -> float:
    tokens, length = rows.tokens, rows.tokens / rows.count
    how = workload.sharding.on(cluster.per_node)
    work = Work(tokens, length, bool(workload.gradient_checkpointing), workload.adapter != "none", rows.micro, how)
    seconds = train_s(shape, cluster.device, work, cluster.num_devices, cluster.device_link)
    scored = workload.scores_reference
    return seconds + (logp_s(shape, cluster.device, tokens, cluster.num_devices, 1, length) if scored else 0.0)


def _rows(
    tokens: float, m: Mapping[str, float], shape: ModelShape, cluster: Cluster, workload: Workload,
    keys: Mapping[str, Any], mean_tokens: int,
) -> _StepRows:  # fmt: skip
    """`num_tokens` of a stage that samples are those of its completions; how long its prompts were is taken as it is planned."""
    shares = cluster.num_devices // workload.sharding.sharing(cluster.num_devices)
    if not workload.samples:
        micro, pairs = keys["gradient_accumulation_steps"], 2 if workload.pairs else 1
        return _StepRows(workload.per_device_train_batch_size * micro * shares * pairs, micro, tokens)
    prompts, size = keys["num_prompts_per_step"], keys["num_generations"]
    planned = traffic_of(shape, workload, keys, mean_tokens)
    answer = m.get("completions/mean_length") or tokens / (prompts * size)
    count, before = max(1.0, tokens / answer), planned.prompt_tokens
    asked = min(float(prompts), count)
    if keys.get("mode") == "strided":  # each anchor asks for a group
        prompts = asked = max(1, round(count / size))
        before = before_anchors(keys, max(1.0, prompts / keys["num_prompts_per_step"]))
    micro = max(1, int(count // shares // workload.per_device_train_batch_size))
    traffic = Traffic(prompts, size, before, answer, m.get("completions/max_length", answer))
    return _StepRows(count, micro, tokens + asked * before, traffic if "completions/mean_length" in m else None)


def _median(values: list[float]) -> float:
    """1 of nothing."""
    return sorted(values)[len(values) // 2] if values else 1.0
