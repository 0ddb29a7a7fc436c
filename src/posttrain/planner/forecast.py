"""What a stage will take on a cluster: memory, seconds by phase, the split of its devices, staleness, disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.planner.lengths import Lengths
from posttrain.planner.measured import AS_PREDICTED, Correction
from posttrain.planner.memory import MemoryPlan, estimate_memory
from posttrain.planner.parts import Cluster, Device
from posttrain.planner.shape import ModelShape
from posttrain.planner.simulate import Failures, Setup, Timeline, simulate
from posttrain.planner.steptime import (
    Loop,
    StepTime,
    Traffic,
    Work,
    best_split,
    decode_step_s,
    logp_s,
    max_batch,
    step_time,
    train_s,
)
from posttrain.planner.traffic import loop_of, traffic_of
from posttrain.planner.workload import Workload

_STEPS, _MOST_ANSWERS = 24, 65_536
_HOURS_BETWEEN_FAILURES = 50_000.0
"""Of one GPU. Source: Llama 3, arXiv 2407.21783 §3.3.4: 419 interruptions of 16,384 GPUs in 54 days."""
_ENGINE_BACK_S, _TRAINER_BACK_S = 120.0, 600.0


@dataclass(frozen=True, slots=True)
class Split:
    """Devices for rollout and for training at answers of so many tokens, and what a step of both at once then takes."""

    answer_tokens: float
    rollout: int
    train: int
    times: StepTime


@dataclass(frozen=True, slots=True)
class Forecast:
    """`phases`: seconds of a step of SFT or of preferences, or of a generation batch of RL, which has `updates` steps."""

    kind: str
    memory: MemoryPlan
    phases: Mapping[str, float]
    tokens: float
    steps: int = -1
    updates: float = 1.0
    completions: int = 0
    split: Split | None = None
    growth: tuple[Split, ...] = ()
    staleness: Mapping[int, Timeline] = field(default_factory=dict[int, Timeline])
    disk_bytes: int = 0
    copy_bytes_s: float = 0.0
    """At which offloaded layers come to the device."""
    refused: str = ""
    """Why so many processes are not started with its keys."""
    advice: tuple[Any, ...] = ()
    """What its keys are told (`config/advice.py`)."""

    @property
    def batch_s(self) -> float:
        return sum(self.phases.values())

    @property
    def step_s(self) -> float:
        return self.batch_s / self.updates

    @property
    def total_s(self) -> float | None:
        """None where data decides how many steps there are."""
        return self.step_s * self.steps if self.steps > 0 else None

    @property
    def split_gain(self) -> float:
        """Colocated time over split time."""
        return self.batch_s / self.split.times.overlapped_s if self.split else 0.0


def forecast(
    shape: ModelShape, cluster: Cluster, kind: str, workload: Workload, keys: Mapping[str, Any],
    mean_tokens: int = 0, correction: Correction = AS_PREDICTED, kept: int = 0,
) -> Forecast:  # fmt: skip
    """`kept`: devices that are kept from all stages of a run, for servers that sample in one. `keys`: the stage's, dumped; `mean_tokens`: of a row, or of a prompt and of an answer, 0 for the longest there may be."""
    workload = replace(workload, sharding=workload.sharding.on(cluster.per_node))
    trainers = cluster.without(kept)
    memory = estimate_memory(shape, workload, trainers.num_devices)
    if workload.samples:
        made = _sampling(memory, cluster, trainers, kind, keys, mean_tokens)
    else:
        made = _training(memory, trainers, kind, keys, mean_tokens)
    phases = {n: s * (correction.rollout if n == "rollout" else correction.train) for n, s in made.phases.items()}
    rate = _copy_bytes_s(cluster.device)
    return replace(made, phases=phases, steps=keys["max_steps"], disk_bytes=_disk(memory, keys), copy_bytes_s=rate)


def row_tokens(workload: Workload, shape: ModelShape, mean: int) -> int:
    longest = workload.longest(shape)
    return min(mean or longest, longest)


def _training(memory: MemoryPlan, cluster: Cluster, kind: str, keys: Mapping[str, Any], mean: int) -> Forecast:
    shape, workload = memory.shape, memory.workload
    length = row_tokens(workload, shape, mean)
    rows = workload.per_device_train_batch_size * keys["gradient_accumulation_steps"] * cluster.num_devices
    rows //= workload.sharding.sharing(cluster.num_devices)
    tokens = rows * length * (2 if workload.pairs else 1)
    adapter, micro = workload.adapter != "none", keys["gradient_accumulation_steps"]
    work = Work(tokens, length, bool(workload.gradient_checkpointing), adapter, micro, workload.sharding)
    phases = {"training": train_s(shape, cluster.device, work, cluster.num_devices, cluster.device_link)}
    if workload.scores_reference:
        phases["reference"] = logp_s(shape, cluster.device, tokens, cluster.num_devices, 1, length)
    copied = {"training": micro * memory.copied_to_train_bytes, "reference": micro * memory.copied_bytes}
    return Forecast(kind, memory, _with_copies(phases, copied, cluster.device), float(tokens))


def _with_copies(phases: Mapping[str, float], copied: Mapping[str, float], device: Device) -> dict[str, float]:
    """Layers are copied while others are computed with: a phase takes as long as the slower of the two."""
    rate = _copy_bytes_s(device)
    return {name: max(seconds, copied.get(name, 0.0) / rate) for name, seconds in phases.items()}


def _copy_bytes_s(device: Device) -> float:
    return device.host_link * device.rates.host_copy


def _sampling(
    memory: MemoryPlan, cluster: Cluster, trainers: Cluster, kind: str, keys: Mapping[str, Any], mean: int
) -> Forecast:
    """Each side on its devices, one after the other; then what other splits of all `cluster` would take."""
    shape, workload = memory.shape, memory.workload
    traffic, loop = traffic_of(shape, workload, keys, mean), loop_of(workload)
    # Layers that are not on the device leave their room to the cache.
    device = replace(cluster.device, memory_bytes=cluster.device.memory_bytes + memory.copied_bytes)
    on = replace(cluster, device=device)
    sampling = min(workload.rollout.num_cards, cluster.num_devices) if not workload.on_cpu else 0
    times = step_time(shape, on, traffic, loop, rollout_devices=sampling, train_devices=trainers.num_devices)
    rollout_s = times.rollout_s
    if workload.rollout.gathers(trainers.num_devices):
        links = (device.link, cluster.device_link or device.link)
        gathered_s = loop.sharding.gather_s(shape.num_params, trainers.num_devices, links)
        rollout_s = max(rollout_s, _forwards_to_sample(traffic, loop) * gathered_s)
    phases = {"rollout": rollout_s, "log-probs": times.logp_s, "training": times.train_s}
    if workload.teachers_held:
        sizes = (cluster.device, traffic.trained_tokens, trainers.num_devices, 1, traffic.sequence)
        phases["teachers"] = sum(logp_s(teacher, *sizes) for teacher in workload.teachers_held)
    for critic in workload.critics_held:
        sizes = (cluster.device, traffic.trained_tokens, trainers.num_devices, 1, traffic.sequence)
        whole = replace(loop, adapter=False, scoring_models=0)
        trained = step_time(critic, replace(trainers, device=device), traffic, whole).train_s
        phases["critic"] = logp_s(critic, *sizes) + trained
    if not times.shares_weights:
        phases["sync"] = times.sync_s
    phases = _with_copies(phases, _copied_to_sample(memory, traffic, loop), cluster.device)
    made = Forecast(
        kind, memory, {name: seconds for name, seconds in phases.items() if seconds}, traffic.trained_tokens,
        updates=float(workload.steps_per_generation * workload.num_iterations), completions=traffic.num_completions,
    )  # fmt: skip
    if cluster.num_devices < 2 * loop.split:
        return made
    split = _split(shape, cluster, traffic, loop)
    growing = [replace(traffic, answer_tokens=traffic.longest_answer * share) for share in (1 / 8, 1 / 4, 1 / 2, 1)]
    growth = tuple(_split(shape, cluster, longer, loop) for longer in growing)
    return replace(made, split=split, growth=growth, staleness=_staleness(shape, cluster, traffic, loop, split))


def _forwards_to_sample(traffic: Traffic, loop: Loop) -> float:
    """Tokens that one process decodes one after the other, for so many completions at once."""
    waves = max(0.0, traffic.num_completions / loop.batch_limit - 1)
    return waves * traffic.answer_tokens + traffic.longest_answer


def _copied_to_sample(memory: MemoryPlan, traffic: Traffic, loop: Loop) -> dict[str, float]:
    """Bytes of a generation batch, which one process makes; decoding copies every layer a token."""
    micros = math.ceil(traffic.num_completions / loop.micro_rows)
    decoded = _forwards_to_sample(traffic, loop) if loop.shares_weights else 0
    return {
        "rollout": decoded * memory.copied_bytes,
        "log-probs": loop.scoring_models * micros * memory.copied_bytes,
        "training": loop.iterations * micros * memory.copied_to_train_bytes,
    }


def _split(shape: ModelShape, cluster: Cluster, traffic: Traffic, loop: Loop) -> Split:
    return Split(traffic.answer_tokens, *best_split(shape, cluster, traffic, loop))


def _staleness(shape: ModelShape, cluster: Cluster, traffic: Traffic, loop: Loop, split: Split) -> dict[int, Timeline]:
    """The best split, simulated with answers of different lengths and with failures."""
    device, engines = cluster.device, max(1, split.rollout // loop.split)
    wanted = math.ceil(traffic.num_completions / engines)
    batch = int(min(wanted, max_batch(shape, device, traffic.mean_context, loop.split), loop.batch_limit))
    learning = split.times.logp_s + split.times.train_s
    if batch < 1 or not learning:
        return {}
    lengths = Lengths(traffic.answer_tokens, traffic.longest_answer, device.rates.spread).draw(traffic.num_completions)
    every = _HOURS_BETWEEN_FAILURES * 3600
    setup = Setup(
        num_slots=engines * batch, num_engines=engines, completions_per_step=traffic.num_completions,
        tokens_per_slot_s=1 / decode_step_s(shape, device, batch, traffic.mean_context, loop.split),
        train_tokens_s=sum(lengths) / learning, sync_s=split.times.sync_s,
        failures=Failures(every / loop.split, _ENGINE_BACK_S, every / split.train, _TRAINER_BACK_S),
    )  # fmt: skip
    steps = max(4, min(_STEPS, _MOST_ANSWERS // traffic.num_completions))
    return {n: simulate(replace(setup, max_staleness=n), lengths, steps) for n in (0, 1, 2, 4)}


def _disk(memory: MemoryPlan, keys: Mapping[str, Any]) -> int:
    """Checkpoints that are kept at once and one being written, and the exports; a critic has its part in each."""
    critics = memory.workload.critics_held
    state = 3 * 4 * (memory.trained_params + sum(critic.num_params for critic in critics))
    kept = keys["save_total_limit"] + 2 if keys["save_steps"] else 2
    return kept * state + sum(shape.num_params * shape.stored_bytes for shape in (memory.shape, *critics))
