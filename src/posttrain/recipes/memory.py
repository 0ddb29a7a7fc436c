"""What a stage says when it runs out of memory: which term of its plan was wrong, and what would fit."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from posttrain.config.kinds import stage_kind
from posttrain.config.stages import TrainKeys
from posttrain.models.device import peak_memory_bytes
from posttrain.models.load import model_shape
from posttrain.models.policy import Policy
from posttrain.planner.fit import overrun
from posttrain.planner.machine import available_bytes
from posttrain.planner.memory import Workload, estimate_memory
from posttrain.planner.shape import ModelShape
from posttrain.recipes.teachers import teacher_shapes

_CPU_REFUSAL = "DefaultCPUAllocator: can't allocate memory"
_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)?")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a type of its own for a GPU alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_REFUSAL in str(error)


def why_out_of_memory(
    error: BaseException, kind: str, keys: TrainKeys, policy: Policy, optimizer: torch.optim.Optimizer
) -> str:
    on_cpu = policy.placement.device.type == "cpu"
    shape = ModelShape.from_config(model_shape(policy.base.config))
    workload = Workload.from_keys(
        keys.model_dump(), **stage_kind(kind).demands(keys), teachers=teacher_shapes(keys), on_cpu=on_cpu,
        device_has_bf16=policy.placement.autocast_dtype is not None,
    )  # fmt: skip
    needed = int(peak_memory_bytes()) + _asked_for(str(error))
    where = "this machine" if on_cpu else torch.cuda.get_device_name(policy.placement.device)
    why = overrun(estimate_memory(shape, workload), _held(policy, optimizer), needed, _there_is(policy), where)
    return f"{kind}: out of memory: {why}"


def _held(policy: Policy, optimizer: torch.optim.Optimizer) -> Mapping[str, int]:
    """Bytes of what stays from step to step, on this rank."""
    parameters = list(policy.model.parameters())
    weights = [*parameters, *policy.reference_tensors()]
    state = [
        value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)
    ]
    local = policy.sharding.local
    found = {"weights": weights, "gradients": [p.grad for p in parameters if p.grad is not None], "optimizer": state}
    return {n: sum(local(t).numel() * t.element_size() for t in tensors) for n, tensors in found.items()}


def _there_is(policy: Policy) -> int:
    device = policy.placement.device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return (available_bytes() or 0) + int(peak_memory_bytes())


def _asked_for(message: str) -> int:
    """The allocation that was refused, where the message says."""
    found = _TRIED.search(message)
    return int(float(found[1]) * _UNITS[found[2] or "bytes"]) if found else 0
