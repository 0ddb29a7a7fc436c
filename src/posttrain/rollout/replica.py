"""A whole copy of a sharded policy, for sampling; an update fills it tensor by tensor."""

from __future__ import annotations

import torch

from posttrain.errors import EngineError
from posttrain.models.policy import Policy
from posttrain.models.weights import trained_name
from posttrain.protocols import Weights


@torch.no_grad()
def receive(policy: Policy, weights: Weights) -> int:
    """Copy what is trained into `policy`. Returns the bytes. Raises: EngineError if the names are not its own."""
    waiting = {trained_name(name): parameter for name, parameter in policy.trainable()}
    moved = 0
    for name, tensor in weights.weights("trained"):
        if name not in waiting:
            raise EngineError(f"the weights hold {name}, which the engine's copy does not")
        waiting.pop(name).copy_(tensor)
        moved += tensor.numel() * tensor.element_size()
    if waiting:
        raise EngineError(f"the weights lack {', '.join(sorted(waiting)[:3])} ({len(waiting)} in all)")
    return moved
