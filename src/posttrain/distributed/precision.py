"""The dtypes that a sharded model gathers, computes and adds up its gradients in; what is trained is held in float32 whatever they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def precision(param_dtype: str, reduce_dtype: str) -> Any:
    """FSDP's policy for these; with float32 for both each dtype stays as it is held."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    param, reduce = (None if dtype == "float32" else getattr(torch, dtype) for dtype in (param_dtype, reduce_dtype))
    return MixedPrecisionPolicy(param, torch.float32 if param is not None and reduce is None else reduce)


@contextmanager
def without_mixed_precision(model: Any) -> Iterator[None]:
    """Inside, a sharded model gathers and computes its weights as they are held."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    policies = [state._mp_policy for state in states]
    if all(policy.param_dtype is None for policy in policies):
        yield
        return
    _set_policies(model, states, [MixedPrecisionPolicy() for _ in states])
    try:
        yield
    finally:
        _set_policies(model, states, policies)


def _set_policies(model: Any, states: Sequence[Any], policies: Sequence[Any]) -> None:
    """FSDP reads its policy once, when it first gathers: what it made then is forgotten."""
    is_begun = states[0]._is_root is not None
    if is_begun:
        model.reset_iter_state()
    for state, policy in zip(states, policies, strict=True):
        state._mp_policy = policy
        for group in state._fsdp_param_groups:
            group.mp_policy = policy
            for parameter in group.fsdp_params:
                parameter.all_gather_outputs = []
                parameter.__dict__.pop("_unsharded_param", None)
            if is_begun:
                group._init_mp_dtypes()
