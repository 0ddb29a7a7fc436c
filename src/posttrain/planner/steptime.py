"""How long an RL step takes: rollout, scoring, training and weight sync, from sizes and device limits.

Decode is bound by memory traffic until the batch is large, training by arithmetic, and the longest answer sets a floor that no
number of devices lowers. Constants are rates of the device; `probe_cpu` and the rows of `DEVICES` supply them.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.planner.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Device:
    """One device. Units: bytes, bytes/s, FLOP/s (dense, in the training type); the MFUs are the shares that are reached."""

    name: str
    memory_bytes: float
    bandwidth: float
    flops: float
    link: float
    train_mfu: float = 0.25
    decode_mfu: float = 0.5
    overhead_s: float = 2e-3
    memory_use: float = 0.9
    bytes_per_value: int = 2


# MFU 0.25: dense models reached 0.11-0.27 at 16k tokens and 0.25-0.37 at 64k in prime-rl's published trainer baselines.
DEVICES: dict[str, Device] = {
    "a100": Device("a100", 80e9, 2.0e12, 312e12, 8e9),
    "h100": Device("h100", 80e9, 3.35e12, 989e12, 8e9),
    "h200": Device("h200", 141e9, 4.8e12, 989e12, 8e9),
    "l4": Device("l4", 24e9, 0.3e12, 121e12, 4e9),
    "rtx4090": Device("rtx4090", 24e9, 1.0e12, 165e12, 4e9),
}  # fmt: skip
"""Data-sheet limits; the link is what weight sync was seen to reach, not the port's rate."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one RL step samples: prompts × group completions, their prompt length, mean and longest answer, in tokens."""

    num_prompts: int
    num_generations: int
    prompt_tokens: float
    answer_tokens: float
    longest_answer: float

    @property
    def num_completions(self) -> int:
        return self.num_prompts * self.num_generations

    @property
    def sampled_tokens(self) -> float:
        return self.num_completions * self.answer_tokens

    @property
    def trained_tokens(self) -> float:
        """The prompt of a group is computed once."""
        return self.sampled_tokens + self.num_prompts * self.prompt_tokens

    @property
    def mean_context(self) -> float:
        return self.prompt_tokens + self.answer_tokens / 2


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of each phase of a step."""

    rollout_s: float
    logp_s: float
    train_s: float
    sync_s: float

    @property
    def colocated_s(self) -> float:
        """One set of devices that share the weights: the phases follow each other."""
        return self.rollout_s + self.logp_s + self.train_s

    @property
    def overlapped_s(self) -> float:
        """Two sets of devices at once; a step takes as long as the slower side."""
        return max(self.rollout_s, self.logp_s + self.train_s) + self.sync_s

    @property
    def trainer_idle(self) -> float:
        """Share of an overlapped step in which the training side waits."""
        return 1 - (self.logp_s + self.train_s) / self.overlapped_s

    @property
    def rollout_share(self) -> float:
        """Share of a colocated step that is spent sampling."""
        return self.rollout_s / self.colocated_s


# --- decode --------------------------------------------------------------------------------------------------------


def weight_bytes(shape: ModelShape, device: Device) -> float:
    return float(shape.num_params * device.bytes_per_value)


def max_batch(shape: ModelShape, device: Device, mean_context: float) -> float:
    """Sequences whose keys and values fit beside the weights."""
    free = device.memory_use * device.memory_bytes - weight_bytes(shape, device)
    return max(0.0, free / (shape.kv_bytes_per_token(device.bytes_per_value) * mean_context))


def weight_bound_tokens(shape: ModelShape, device: Device) -> float:
    """Context tokens in flight below which decode reads weights more than keys and values."""
    return weight_bytes(shape, device) / shape.kv_bytes_per_token(device.bytes_per_value)


def decode_step_s(shape: ModelShape, device: Device, batch: float, mean_context: float) -> float:
    """Time of one token for each of `batch` sequences: memory traffic or arithmetic, whichever is slower."""
    traffic = weight_bytes(shape, device) + batch * mean_context * shape.kv_bytes_per_token(device.bytes_per_value)
    arithmetic = 2 * shape.active_params * batch / (device.flops * device.decode_mfu)
    return max(traffic / device.bandwidth, arithmetic) + device.overhead_s


def rollout_s(
    shape: ModelShape, device: Device, traffic: Traffic, num_devices: int = 1, batch_limit: float = 1e9
) -> float:
    """All tokens at the full batch's rate, but never less than the longest answer takes alone."""
    batch = min(traffic.num_completions / num_devices, max_batch(shape, device, traffic.mean_context), batch_limit)
    if batch < 1:
        return float("inf")
    rate = num_devices * batch / decode_step_s(shape, device, batch, traffic.mean_context)
    tail = traffic.longest_answer * decode_step_s(shape, device, 1, traffic.prompt_tokens + traffic.longest_answer / 2)
    return max(traffic.sampled_tokens / rate, tail)


# --- training ------------------------------------------------------------------------------------------------------


def train_flops_per_token(shape: ModelShape, sequence_tokens: float, recompute: bool = False) -> float:
    """6 (8 with full recompute) per active parameter, and attention over the sequence."""
    return (8 if recompute else 6) * shape.active_params + 12 * shape.num_layers * shape.hidden * sequence_tokens


def train_s(
    shape: ModelShape,
    device: Device,
    tokens: float,
    sequence_tokens: float,
    num_devices: int = 1,
    recompute: bool = False,
) -> float:
    return (
        tokens
        * train_flops_per_token(shape, sequence_tokens, recompute)
        / (num_devices * device.flops * device.train_mfu)
    )


def logp_s(shape: ModelShape, device: Device, tokens: float, num_devices: int = 1, num_models: int = 1) -> float:
    """One forward pass for each of `num_models` that score the tokens (old policy, reference)."""
    return num_models * 2 * shape.active_params * tokens / (num_devices * device.flops * device.train_mfu)


def step_time(
    shape: ModelShape, device: Device, traffic: Traffic, *,
    rollout_devices: int = 1, train_devices: int = 1, scoring_models: int = 0, recompute: bool = False, batch_limit: float = 1e9,
) -> StepTime:  # fmt: skip
    """Colocated on n devices: give both sides n. Split: give each its share."""
    sequence = traffic.prompt_tokens + traffic.answer_tokens
    return StepTime(
        rollout_s=rollout_s(shape, device, traffic, rollout_devices, batch_limit),
        logp_s=logp_s(shape, device, traffic.trained_tokens, train_devices, scoring_models),
        train_s=train_s(shape, device, traffic.trained_tokens, sequence, train_devices, recompute),
        sync_s=weight_bytes(shape, device) / device.link,
    )


def best_split(
    shape: ModelShape, device: Device, traffic: Traffic, num_devices: int, scoring_models: int = 0
) -> tuple[int, int, StepTime]:
    """(rollout devices, training devices, times) of the fastest overlapped split of `num_devices` ≥ 2."""
    assert num_devices >= 2
    splits = [
        (
            n,
            num_devices - n,
            step_time(
                shape, device, traffic, rollout_devices=n, train_devices=num_devices - n, scoring_models=scoring_models
            ),
        )
        for n in range(1, num_devices)
    ]
    return min(splits, key=lambda split: split[2].overlapped_s)
