"""A model's layers compiled, each by itself: norms, rotation, SwiGLU and casts become few kernels; attention between them stays as it is.

What is compiled trains and scores. Decoding goes through the layers as they are (`as_written`): its steps are recorded as graphs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.models import attention
from posttrain.models.device import Placement
from posttrain.models.policy import Policy

log = logging.getLogger(__name__)

COMPILES: Mapping[tuple[int, int], tuple[torch.dtype, ...]] = {
    (8, 0): (torch.bfloat16,),
    (8, 9): (torch.bfloat16,),
    (9, 0): (torch.bfloat16,),
    (10, 0): (torch.bfloat16,),
}
"""Compute capability → autocast dtypes with which `torch_compile: auto` compiles: A100, L4 and L40S, H100 and H200, B200."""


def wants_compiling(keys: ModelKeys, placement: Placement) -> bool:
    if keys.torch_compile != "auto":
        return keys.torch_compile
    device = placement.device
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return placement.autocast_dtype in COMPILES.get(torch.cuda.get_device_capability(device), ())


def compile_layers(policy: Policy, backend: str = "inductor") -> None:
    """In place, under their names; weights are read where they are. Raises: ModelError for a model that this does not fit."""
    if why := _misfit(policy):
        raise ModelError(f"torch_compile: true: {policy.source} {why}; set it to false")
    attention.register_uncompiled()
    for layer in _layers(policy):
        layer.compile(backend=backend, dynamic=True)


def compile_where_it_fits(policy: Policy) -> None:
    """As `compile_layers`; a model that it does not fit is named and left."""
    if why := _misfit(policy):
        log.warning("torch_compile: auto: %s %s; its layers run as they are", policy.source, why)
    else:
        compile_layers(policy)


def is_compiled(policy: Policy) -> bool:
    return any(layer._compiled_call_impl is not None for layer in _layers(policy))


@contextmanager
def as_written(policy: Policy) -> Iterator[None]:
    """Inside, no layer is compiled."""
    compiled = {layer: call for layer in _layers(policy) if (call := layer._compiled_call_impl) is not None}
    for layer in compiled:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, call in compiled.items():
            layer._compiled_call_impl = call


def why_not_compiled(error: BaseException) -> str:
    """One line where a compiler failed, in a forward or in the backward; nothing for any other error."""
    module = sys.modules.get("torch._dynamo.exc")  # importing it costs seconds, and an error of its own brings it
    if module is None or not isinstance(error, module.TorchDynamoException):
        return ""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"its layers could not be compiled ({type(error).__name__}: {' '.join(lines[:2])}); set torch_compile: false"


def _layers(policy: Policy) -> list[Any]:
    decoder: Any = policy.base.get_decoder()
    return list(getattr(decoder, "layers", ()))


def _misfit(policy: Policy) -> str:
    """Why its layers cannot be compiled each by itself, or nothing."""
    if policy.exact:
        return "computes exactly (rollout.exact), in tiles of its own"
    if policy.choices is not None:
        return "has routers whose choices are looked at (rollout.routed_experts)"
    if policy.sharded:
        return f"is sharded over {policy.sharding.num_shards} processes, whose hooks lie in the layers"
    if policy.offloaded is not None:
        return "has its layers in the machine's memory (layer_offloading), and hooks fetch them"
    if policy.under.base_bits:
        return f"lies in {policy.under.base_bits} bits, whose products are kernels of bitsandbytes"
    if not policy.ragged:
        return "has attention that does not fit the ragged layout"
    return "" if _layers(policy) else "has no list of layers"
