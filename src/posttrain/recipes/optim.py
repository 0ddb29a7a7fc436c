"""Optimizer, learning-rate schedule and the update itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

from posttrain.config.stages import TrainKeys
from posttrain.models.freezing import trained_ends
from posttrain.models.policy import Policy
from posttrain.recipes.batches import MicroBatch
from posttrain.recipes.optimizers import optimizer_of
from posttrain.recipes.run.stage import Stage

T = TypeVar("T")


def make_optimizer(policy: Policy, keys: TrainKeys) -> torch.optim.Optimizer:
    """That of `optim` over the trained weights; weight decay on matrices only, LoRA+'s learning rate for the adapter's B, and that of embedding and head."""
    faster = [p for name, p in policy.trainable() if p.ndim >= 2 and keys.loraplus_lr_ratio != 1 and ".lora_B." in name]
    ends = trained_ends(policy.model) if keys.embedding_lr_scale != 1 else []
    known = {id(p) for p in (*faster, *ends)}
    matrices = [p for _, p in policy.trainable() if p.ndim >= 2 and id(p) not in known]
    others = [p for _, p in policy.trainable() if p.ndim < 2 and id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": keys.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": faster, "weight_decay": keys.weight_decay, "lr_ratio": keys.loraplus_lr_ratio},
        {"params": ends, "weight_decay": 0.0, "lr_ratio": keys.embedding_lr_scale},
    ]
    return optimizer_of(policy, [group for group in groups if group["params"]], keys)


_SHAPES: dict[str, Callable[[float, TrainKeys], float]] = {
    "constant": lambda progress, keys: 1.0,
    "linear": lambda progress, keys: 1.0 - progress,
    "cosine": lambda progress, keys: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "cosine_with_restarts": lambda progress, keys: 0.5 * (1.0 + math.cos(math.pi * (keys.lr_num_cycles * progress % 1.0))) if progress < 1.0 else 0.0,
    "polynomial": lambda progress, keys: (1.0 - progress) ** keys.lr_power,
    # Hold, then decay linearly over the last fifth (Hu et al. 2024, MiniCPM, arXiv 2404.06395).
    "wsd": lambda progress, keys: min(1.0, (1.0 - progress) / 0.2),
}  # fmt: skip
_WARM_UP_FROM_THE_FLOOR = frozenset({"wsd"})
"""As in transformers; the others warm up from 0 whatever `min_lr_ratio` is."""


def learning_rate(step: int, total_steps: int, keys: TrainKeys) -> float:
    """Learning rate of optimizer step `step`, counted from 0; warmup and shapes are those of transformers."""
    warmup = keys.warmup_steps or math.ceil(keys.warmup_ratio * total_steps)
    if step < warmup:
        start = keys.min_lr_ratio if keys.lr_scheduler_type in _WARM_UP_FROM_THE_FLOOR else 0.0
        share = step / warmup if keys.warmup_type == "linear" else (step / warmup) ** 2
        return keys.learning_rate * (start + (1.0 - start) * share)
    end = int(total_steps * keys.lr_decay_ratio)
    progress = (min(step, end) - warmup) / max(1, end - warmup)
    shape = _SHAPES[keys.lr_scheduler_type](max(0.0, progress), keys)
    return keys.learning_rate * (keys.min_lr_ratio + (1.0 - keys.min_lr_ratio) * shape)


def accumulating(policy: Policy, micros: Sequence[MicroBatch[T]], *, more: bool = False) -> Iterator[MicroBatch[T]]:
    """The micro-batches of a step in order, each with its backward before the next; `more` of the same step come after them."""
    for number, micro in enumerate(micros, start=1):
        policy.sharding.accumulate(policy.model, is_last=number == len(micros) and not more)
        with policy.routing.counting(on=not micro.idle) if policy.routing else nullcontext():
            yield micro


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, stage: Stage, lr: float, values: Mapping[str, float], step: int
) -> dict[str, float]:
    """Clip, ask the health rules, step, clear. Returns the gradient norm before clipping and how far a probe moved.

    `values` are the metrics of the step so far. A step that is not allowed changes neither weights nor optimizer.
    Raises: RolledBack, TrainingError.
    """
    sharding, parameters = policy.sharding, [p for _, p in policy.trainable()]
    report = {"grad_norm": sharding.clip_grad_norm(parameters, stage.keys.max_grad_norm), "learning_rate": lr}
    report |= policy.routing.metrics(stage.processes) if policy.routing else {}
    if not stage.guard.allows(step, {**values, **report}):
        optimizer.zero_grad(set_to_none=True)
        return report | {"skipped_step": 1.0}
    # The last trained tensor (a norm, the head, an adapter's B) has a gradient whatever the tokens of the step are.
    probe = parameters[-1]
    before = probe.detach().clone()
    take_step(optimizer, lr)
    moved = math.sqrt(stage.processes.sum([sharding.square_sum(probe.detach() - before)])[0])
    return report | {"update_norm": moved}


def take_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Move the weights at this learning rate, and clear their gradient."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
