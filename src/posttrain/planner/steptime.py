"""How long an RL step takes: rollout, scoring, training and weight sync, from sizes and device limits.

Decode is bound by memory traffic until the batch is large; training by matrix products, attention, and what is moved beside
them; the longest answers set a floor that no number of devices lowers. `docs/planning.md` compares it with published runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from posttrain.planner.lengths import Lengths
from posttrain.planner.parts import Cluster, Device
from posttrain.planner.shape import ModelShape
from posttrain.planner.sharding import FULLY, ShardingPlan

_PLACES = 64
_NEAR = 8
"""Devices that all-reduce inside one machine."""


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

    @property
    def sequence(self) -> float:
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of each phase of a step. `shares_weights`: one engine decodes with the weights in training, so nothing is sent."""

    rollout_s: float
    logp_s: float
    train_s: float
    sync_s: float
    shares_weights: bool = True

    @property
    def colocated_s(self) -> float:
        """One set of devices: the phases follow each other."""
        return self.rollout_s + self.logp_s + self.train_s + (0.0 if self.shares_weights else self.sync_s)

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


def max_batch(shape: ModelShape, device: Device, mean_context: float, split: int = 1) -> float:
    """Sequences whose keys and values fit beside the weights of a replica over `split` devices."""
    free = split * device.memory_use * device.memory_bytes - weight_bytes(shape, device)
    return max(0.0, free / shape.cache_bytes(mean_context, device.bytes_per_value))


def weight_bound_tokens(shape: ModelShape, device: Device) -> float:
    """Context tokens in flight below which decode reads weights more than keys and values."""
    return weight_bytes(shape, device) / shape.kv_bytes_per_token(device.bytes_per_value)


def decode_step_s(shape: ModelShape, device: Device, batch: float, mean_context: float, split: int = 1) -> float:
    """Time of one token for each of `batch` sequences of a replica: memory traffic or arithmetic, whichever is slower."""
    rates, size = device.rates, device.bytes_per_value
    weights = _weights_read(shape, batch) * size / split
    heads = 1 if shape.latent is not None or shape.mixer is not None else min(split, shape.num_kv_heads)
    traffic = weights + batch * shape.cache_bytes(mean_context, size) / heads
    arithmetic = 2 * shape.active_params * batch / split / (device.flops * rates.decode_flops)
    calls = rates.decode_step_s + shape.num_layers * rates.layer_call_s
    return (
        max(traffic / (device.bandwidth * rates.decode_bandwidth), arithmetic) / device.reached
        + calls
        + _agree_s(shape, device, split)
    )


def _weights_read(shape: ModelShape, batch: float) -> float:
    """Weights that a step reads: a row of the embedding, the head, and of the experts those that any sequence is routed to."""
    read = shape.num_params if shape.tied else shape.num_params - shape.vocab * shape.hidden
    if not shape.num_experts:
        return read
    missed = (1 - shape.experts_per_token / shape.num_experts) ** max(1.0, batch)
    return read - missed * shape.expert_params


def _agree_s(shape: ModelShape, device: Device, split: int) -> float:
    """Two all-reduces a layer, where a replica is split."""
    if split == 1:
        return 0.0
    return 2 * shape.num_layers * (device.rates.allreduce_s if split <= _NEAR else device.rates.far_allreduce_s)


def rollout_s(
    shape: ModelShape, device: Device, traffic: Traffic, num_devices: int = 1, batch_limit: float = 1e9, split: int = 1
) -> float:
    """A full batch while answers wait, then what is left of it until the longest is done."""
    replicas = num_devices / split
    share = traffic.num_completions / replicas
    batch = min(share, max_batch(shape, device, traffic.mean_context, split), batch_limit)
    if batch < min(1.0, share):
        return float("inf")
    full = decode_step_s(shape, device, batch, traffic.mean_context, split)
    waiting = (share - batch) * traffic.answer_tokens / batch * full
    lengths = Lengths(traffic.answer_tokens, traffic.longest_answer, device.rates.spread)
    stretch = (traffic.answer_tokens if lengths.is_even else traffic.longest_answer) / _PLACES
    left = sum(
        stretch * decode_step_s(shape, device, max(1.0, batch * alive), traffic.prompt_tokens + token, split)
        for token, alive in lengths.surviving(_PLACES)
    )
    return waiting + left


def steady_rollout_s(
    shape: ModelShape, device: Device, traffic: Traffic, num_devices: int, batch: float, split: int = 1
) -> float:
    """Where answers of later steps fill the places of those that are done: no tail."""
    batch = min(batch, max_batch(shape, device, traffic.mean_context, split))
    if batch < 1:
        return float("inf")
    rate = num_devices / split * batch / decode_step_s(shape, device, batch, traffic.mean_context, split)
    return traffic.sampled_tokens / rate


# --- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of a step in sequences of so many, with full recomputation or not, all weights or an adapter; `micro_batches` a device."""

    tokens: float
    sequence: float
    recompute: bool = False
    adapter: bool = False
    micro_batches: int = 1
    sharding: ShardingPlan = FULLY


def train_flops_per_token(shape: ModelShape, sequence_tokens: float, recompute: bool = False) -> float:
    """As published utilisations count: 6 (8 with full recompute) per active parameter, and attention over the whole sequence."""
    return (8 if recompute else 6) * shape.active_params + 12 * shape.num_layers * shape.hidden * sequence_tokens


def _pass_s(
    shape: ModelShape,
    device: Device,
    tokens: float,
    sequence: float,
    *,
    linear: float,
    attention: float,
    head: float,
    moved: float,
) -> float:
    """One device's seconds for so many forward passes' worth of linear modules, attention and head, and `moved` of a step's traffic."""
    rates = device.rates
    weights = linear * shape.active_linear_params + head * shape.vocab * shape.hidden
    # Two products for each pair and channel.
    pairs = attention * 2 * shape.num_heads * shape.head_dim * shape.attended(sequence)
    copies = (shape.num_layers - shape.dense_layers) * shape.experts_per_token * shape.hidden
    width = shape.num_layers * (shape.hidden + shape.widest_mlp) + copies
    size = device.bytes_per_value / 2
    flops = 2 * weights / rates.matmul + 2 * pairs / rates.attention
    traffic = size * moved * (rates.pointwise * width + rates.vocabulary * shape.vocab)
    return tokens * (flops / device.flops + traffic / device.bandwidth) / device.reached


def train_s(shape: ModelShape, device: Device, work: Work, num_devices: int = 1, link: float | None = None) -> float:
    """Forward, backward, and what is sent between devices where that takes longer."""
    again = 1 if work.recompute else 0
    linear = (2 if work.adapter else 3) + again
    # An attention's backward pass is five products to its forward's two.
    seconds = _pass_s(
        shape, device, work.tokens, work.sequence,
        linear=linear, attention=3.5 + again, head=2 if work.adapter else 3, moved=(3 + again) / 4,
    ) / num_devices  # fmt: skip
    calls = work.micro_batches * linear * shape.num_layers * device.rates.layer_call_s
    return max(seconds + calls, _sent_s(shape, device, work, num_devices, link))


def _sent_s(shape: ModelShape, device: Device, work: Work, num_devices: int, link: float | None) -> float:
    """Sharded: micro-batches gather the weights, and reduce their gradients if they are trained."""
    if num_devices == 1:
        return 0.0
    links = (device.link, link or device.link)
    sp, tp = work.sharding.token_parts(num_devices), work.sharding.layer_parts(num_devices)
    # Queries, keys, values and outputs change hands in each layer, and so do their gradients.
    exchanged = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * shape.num_layers * device.bytes_per_value
    exchanges_s = (3 if work.recompute else 2) * work.tokens / num_devices * exchanged * (sp - 1) / sp / device.link
    # What a layer's two halves give is added up over those that hold it, each way, and sent twice for that.
    summed = 2 * (3 if work.recompute else 2) * shape.num_layers * shape.hidden * device.bytes_per_value
    sums_s = work.tokens * tp / num_devices * summed * 2 * (tp - 1) / tp / device.link
    return (
        exchanges_s
        + sums_s
        + work.sharding.sent_s(shape.num_params, work.micro_batches, num_devices, links, trained=not work.adapter)
    )


def logp_s(
    shape: ModelShape, device: Device, tokens: float, num_devices: int = 1, num_models: int = 1, sequence: float = 0.0
) -> float:
    """One forward pass for each of `num_models` that score the tokens (old policy, reference)."""
    return (
        num_models * _pass_s(shape, device, tokens, sequence, linear=1, attention=1, head=1, moved=1 / 4) / num_devices
    )


def sync_s(shape: ModelShape, device: Device, split: int = 1) -> float:
    """A replica takes in its weights; its devices receive at once, and share what sends."""
    return weight_bytes(shape, device) / (device.rates.sync_bytes_s * split**0.5)


# --- steps ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loop:
    """How a stage of RL runs: models that score beside the policy, passes over a batch, devices of an engine's replica."""

    scoring_models: int = 0
    recompute: bool = False
    adapter: bool = False
    iterations: int = 1
    micro_rows: int = 8
    batch_limit: float = 1e9
    split: int = 1
    shares_weights: bool = True
    sharding: ShardingPlan = FULLY


def step_time(
    shape: ModelShape, cluster: Cluster, traffic: Traffic, loop: Loop = Loop(), *, rollout_devices: int = 0, train_devices: int = 0
) -> StepTime:  # fmt: skip
    """Colocated on all devices, or, where a number is given, each side on its own."""
    device = cluster.device
    sampling, training = rollout_devices or cluster.num_devices, train_devices or cluster.num_devices
    shares = training // loop.sharding.sharing(training)
    micro = max(1, round(traffic.num_completions / shares / loop.micro_rows))
    work = Work(traffic.trained_tokens, traffic.sequence, loop.recompute, loop.adapter, micro, loop.sharding)
    return StepTime(
        rollout_s=rollout_s(shape, device, traffic, sampling, loop.batch_limit, loop.split),
        logp_s=logp_s(shape, device, traffic.trained_tokens, training, loop.scoring_models, traffic.sequence),
        train_s=loop.iterations * train_s(shape, device, work, training, cluster.device_link),
        sync_s=sync_s(shape, device, loop.split),
        shares_weights=loop.shares_weights,
    )


def best_split(shape: ModelShape, cluster: Cluster, traffic: Traffic, loop: Loop = Loop()) -> tuple[int, int, StepTime]:
    """(rollout devices, training devices, times) of the fastest overlapped split of two devices or more."""
    assert cluster.num_devices >= 2
    splits = [
        (
            n,
            cluster.num_devices - n,
            step_time(shape, cluster, traffic, loop, rollout_devices=n, train_devices=cluster.num_devices - n),
        )
        for n in _shares(cluster, loop.split)
    ]
    return min(splits, key=lambda split: split[2].overlapped_s)


def _shares(cluster: Cluster, split: int) -> Iterable[int]:
    """Whole replicas; of many devices every so many."""
    most = cluster.num_devices - 1
    step = split * max(1, most // split // 64)
    return range(step, most + 1, step) if step <= most else (most,)
