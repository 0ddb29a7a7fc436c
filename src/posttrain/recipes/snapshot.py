"""An optimizer's state as named tensors and plain values, as a checkpoint holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer state as named tensors, and what is not a tensor."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            # 8-bit optimizers keep a second level.
            inner_tensors, inner_scalars = flatten(value)
            tensors |= {f"{name}|{key}": tensor for key, tensor in inner_tensors.items()}
            scalars |= {f"{name}|{key}": scalar for key, scalar in inner_scalars.items()}
        elif isinstance(value, torch.Tensor):
            # A copy: the optimizer goes on while the checkpoint is written.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            scalars[name] = json.loads(json.dumps(value))
    return tensors, scalars


def unflatten(tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for flat, value in {**tensors, **scalars}.items():
        *path, key = flat.split("|")
        place: dict[str, Any] = state
        for name in path:
            place = place.setdefault(name, {})
        place[key] = value
    return state
