"""Optimizer, learning-rate schedule and the update itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from posttrain.config.stages import TrainKeys
from posttrain.errors import MissingExtraError
from posttrain.models.policy import Policy
from posttrain.recipes.stage import Stage

BITSANDBYTES: Mapping[str, str] = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
"""`optim` → the optimizer of bitsandbytes."""


def make_optimizer(policy: Policy, keys: TrainKeys) -> torch.optim.Optimizer:
    """AdamW over the trained weights; weight decay on matrices only, and LoRA+'s learning rate for the adapter's B."""
    faster = [p for name, p in policy.trainable() if p.ndim >= 2 and keys.loraplus_lr_ratio != 1 and ".lora_B." in name]
    known = {id(p) for p in faster}
    matrices = [p for _, p in policy.trainable() if p.ndim >= 2 and id(p) not in known]
    others = [p for _, p in policy.trainable() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": keys.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": faster, "weight_decay": keys.weight_decay, "lr_ratio": keys.loraplus_lr_ratio},
    ]
    options = {"lr": keys.learning_rate, "betas": (keys.adam_beta1, keys.adam_beta2), "eps": keys.adam_epsilon}
    groups = [group for group in groups if group["params"]]
    if keys.optim in BITSANDBYTES:
        try:
            optimizers = import_module("bitsandbytes.optim")
        except ImportError as error:
            raise MissingExtraError(
                f"optim: {keys.optim} needs bitsandbytes; pip install 'posttrain[qlora]'"
            ) from error
        return getattr(optimizers, BITSANDBYTES[keys.optim])(groups, **options)
    return torch.optim.AdamW(groups, fused=not policy.sharded, **options)


_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    # Hold, then decay linearly over the last fifth (Hu et al. 2024, MiniCPM, arXiv 2404.06395).
    "wsd": lambda progress: min(1.0, (1.0 - progress) / 0.2),
}
_WARM_UP_FROM_THE_FLOOR = frozenset({"wsd"})
"""As in transformers; the others warm up from 0 whatever `min_lr_ratio` is."""


def learning_rate(step: int, total_steps: int, keys: TrainKeys) -> float:
    """Learning rate of optimizer step `step`, counted from 0; warmup and shapes are those of transformers."""
    warmup = keys.warmup_steps or math.ceil(keys.warmup_ratio * total_steps)
    if step < warmup:
        start = keys.min_lr_ratio if keys.lr_scheduler_type in _WARM_UP_FROM_THE_FLOOR else 0.0
        return keys.learning_rate * (start + (1.0 - start) * step / warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = _SHAPES[keys.lr_scheduler_type](progress)
    return keys.learning_rate * (keys.min_lr_ratio + (1.0 - keys.min_lr_ratio) * shape)


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, stage: Stage, lr: float, values: Mapping[str, float], step: int
) -> dict[str, float]:
    """Clip, ask the health rules, step, clear. Returns the gradient norm before clipping and how far a probe moved.

    `values` are the metrics of the step so far. A step that is not allowed changes neither weights nor optimizer.
    Raises: RolledBack, TrainingError.
    """
    sharding, parameters = policy.sharding, [p for _, p in policy.trainable()]
    report = {"grad_norm": sharding.clip_grad_norm(parameters, stage.keys.max_grad_norm), "learning_rate": lr}
    if not stage.guard.allows(step, {**values, **report}):
        optimizer.zero_grad(set_to_none=True)
        return report | {"skipped_step": 1.0}
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    # The last trained tensor (a norm, the head, an adapter's B) has a gradient whatever the tokens of the step are.
    probe = parameters[-1]
    before = probe.detach().clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    moved = math.sqrt(stage.ranks.sum([float(sharding.local(probe.detach() - before).square().sum())])[0])
    return report | {"update_norm": moved}
