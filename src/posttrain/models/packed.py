"""Weights laid out once for oneDNN's products in float32 on a CPU: other kernels than `linear`'s, and other last bits.

A weight that changes must be laid out again, which pays for what multiplies with it many times: decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from posttrain.models.policy import Policy

_LEAST_WORK = 1 << 19
"""Multiplications of a product below which it costs less by `linear`, whose calls do less beside it: a count, with no clock."""
_ops: Any = torch.ops.mkldnn

WeightAndBias = tuple[torch.Tensor, torch.Tensor | None]
Projections = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""[R, inputs] → [R, outputs] of each of some matrices that have their input in common."""


def why_not_packed(policy: Policy) -> str:
    """Why its weights cannot be laid out; empty where they can."""
    if not (torch.backends.mkldnn.is_available() and hasattr(_ops, "_reorder_linear_weight")):
        return f"torch {torch.__version__} is built without oneDNN"
    if policy.offloaded is not None:
        return "with layer_offloading a layer's weights are not there until it is its turn"
    return ""


def can_be_packed(weights: Sequence[WeightAndBias | None]) -> bool:
    """Whether they are matrices of float32, all with a bias or all without."""
    known = [one for one in weights if one is not None]
    alike = len({bias is None for _, bias in known}) == 1
    return len(known) == len(weights) and alike and all(weight.dtype == torch.float32 for weight, _ in known)


def packed(weights: Sequence[WeightAndBias], plain: Projections) -> Projections:
    """The matrices side by side in one product; `plain` where that is the less. Which is a matter of shapes alone."""
    sizes = [len(weight) for weight, _ in weights]
    side_by_side = torch.cat([weight for weight, _ in weights])
    biases = [bias for _, bias in weights if bias is not None]
    bias = torch.cat(biases) if biases else None
    per_row = side_by_side.numel()
    weight = _ops._reorder_linear_weight(side_by_side.detach(), None)
    del side_by_side

    def project(x: torch.Tensor) -> Sequence[torch.Tensor]:
        if len(x) * per_row < _LEAST_WORK:
            return plain(x)
        return _ops._linear_pointwise(x, weight, bias, "none", [], "").split(sizes, -1)

    return project
