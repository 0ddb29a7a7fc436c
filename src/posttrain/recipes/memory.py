"""What a stage says when it runs out of memory: which term of its plan was wrong, and what would fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from posttrain.config.kinds import stage_kind
from posttrain.config.stages import TrainKeys
from posttrain.errors import ModelError
from posttrain.files import size_text
from posttrain.models.device import Placement, peak_memory_bytes, place
from posttrain.models.load import load_config, model_shape
from posttrain.models.policy import Policy
from posttrain.models.stored import stored_dtype
from posttrain.planner.fit import fits, overrun, shortfall
from posttrain.planner.machine import available_bytes
from posttrain.planner.memory import MemoryPlan, estimate_memory
from posttrain.planner.shape import ModelShape
from posttrain.planner.workload import Workload
from posttrain.recipes.teachers import shapes_beside

_CPU_REFUSAL = "DefaultCPUAllocator: can't allocate memory"
_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)?")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a type of its own for a GPU alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_REFUSAL in str(error)


def why_out_of_memory(
    error: BaseException, kind: str, keys: TrainKeys, policy: Policy, optimizer: torch.optim.Optimizer, processes: int
) -> str:  # fmt: skip
    """In one of so many processes."""
    try:
        plan = _plan(kind, keys, policy.base.config, policy.placement, processes)
    except ModelError as uncounted:
        return f"{kind}: out of memory: {uncounted}"
    needed = int(peak_memory_bytes()) + _asked_for(str(error))
    device = policy.placement.device
    why = overrun(plan, _held(policy, optimizer), needed, _there_is(device), _named(device))
    return f"{kind}: out of memory: {why}"


def why_not_loaded(kind: str, keys: TrainKeys, processes: int) -> str:
    """Before there was anything to count: what the plan says of the model and of the memory that there is."""
    config = load_config(keys)
    placement = place(keys, stored_dtype(config) if keys.adapter != "none" else None)
    try:
        plan = _plan(kind, keys, config, placement, processes)
    except ModelError as uncounted:
        return f"{kind}: out of memory before the first step: {uncounted}"
    there_is, where = _there_is(placement.device), _named(placement.device)
    if fits(plan, there_is):
        why = f"the plan counts {size_text(plan.total_bytes)} in all, and {where} has {size_text(there_is)}: other programs hold the rest"
    else:
        why = shortfall(plan, there_is, keys.base_model, where)
    return f"{kind}: out of memory before the first step: {why}"


def _plan(kind: str, keys: TrainKeys, config: Any, placement: Placement, processes: int) -> MemoryPlan:
    workload = Workload.from_keys(
        keys.model_dump(), **stage_kind(kind).demands(keys), **shapes_beside(keys), on_cpu=placement.device.type == "cpu",
        device_has_bf16=placement.autocast_dtype is not None,
    )  # fmt: skip
    return estimate_memory(ModelShape.from_config(model_shape(config)), workload, processes)


def _named(device: torch.device) -> str:
    return "this machine" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _held(policy: Policy, optimizer: torch.optim.Optimizer) -> Mapping[str, int]:
    """Bytes of what stays from step to step, on this rank."""
    parameters = list(policy.model.parameters())
    weights = [*parameters, *policy.reference_tensors()]
    state = [
        value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)
    ]
    local = policy.sharding.local
    found = {"weights": weights, "gradients": [p.grad for p in parameters if p.grad is not None], "optimizer": state}
    sizes = {n: sum(local(t).numel() * t.element_size() for t in tensors) for n, tensors in found.items()}
    if (offloaded := policy.offloaded) is not None and policy.placement.device.type != "cpu":
        sizes["weights"] -= offloaded.host_bytes - offloaded.resident_bytes
    return sizes


def _there_is(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return (available_bytes() or 0) + int(peak_memory_bytes())


def _asked_for(message: str) -> int:
    """The allocation that was refused, where the message says."""
    found = _TRIED.search(message)
    return int(float(found[1]) * _UNITS[found[2] or "bytes"]) if found else 0
