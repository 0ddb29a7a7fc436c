"""A policy's weights on their way to somebody else: named tensors, one at a time, never the whole model at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import torch

from posttrain.models.offload import OffloadedLayers
from posttrain.protocols import Sharding

Only = Literal["adapter", "trained", "all"]
NamedTensors = Iterator[tuple[str, torch.Tensor]]


class Trained(Protocol):
    """A policy, as far as its weights go."""

    @property
    def base(self) -> Any: ...
    @property
    def has_adapter(self) -> bool: ...
    @property
    def model(self) -> Any: ...
    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]: ...
    @property
    def offloaded(self) -> OffloadedLayers | None: ...
    @property
    def sharding(self) -> Sharding: ...


def named_weights(policy: Trained, only: Only) -> NamedTensors:
    """Under the names of the given base's file (`adapter`: under those of an adapter's file, as PEFT writes it).

    `adapter` are the adapter's own tensors, `trained` what has gradients, `all` the whole model, an adapter added to its
    weights module by module. A sharded tensor is gathered when it is its turn: all ranks iterate together, between steps.
    """
    # After a pass without a backward the module holds what was gathered for it: rounded, and freed by the next `state_dict`.
    policy.sharding.release(policy.model)
    yield from _READ[only](policy)


def _adapter(policy: Trained) -> NamedTensors:
    from peft import get_peft_model_state_dict

    assert policy.has_adapter, "only='adapter' needs one"
    for name, tensor in get_peft_model_state_dict(policy.model).items():  # pyright: ignore[reportArgumentType]
        yield name, _full(tensor)


def _trained(policy: Trained) -> NamedTensors:
    for name, parameter in policy.trainable():
        yield trained_name(name), _full(parameter)


def _whole(policy: Trained) -> NamedTensors:
    """Tied tensors come once, under their first name, as in a file."""
    base: Any = policy.base
    adapted = dict(_adapted(base)) if policy.has_adapter else {}
    inside = tuple(f"{name}." for name in adapted)
    seen: set[int] = set()
    for name, tensor in [*base.named_parameters(), *_saved_buffers(base)]:
        if id(tensor) in seen or name.startswith(inside):
            continue
        seen.add(id(tensor))
        yield name, _full(tensor if policy.offloaded is None else policy.offloaded.copy_of(tensor))
    for name, module in adapted.items():
        if policy.offloaded is not None:
            policy.offloaded.fetch_those_of(module.parameters())
        yield from _merged(name, module)


def _adapted(base: Any) -> Iterator[tuple[str, Any]]:
    """The outermost modules that an adapter changed: layers with low-rank parts, and copies that are trained whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    outer = "\0"
    for name, module in base.named_modules():
        if not name.startswith(outer) and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            outer = f"{name}."
            yield name, module


def _merged(name: str, module: Any) -> NamedTensors:
    """The tensors of one adapted module with the adapter added; a copy of it is merged, and the module is as before."""
    from peft.utils import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        trained: Any = module
        inner: Any = trained.modules_to_save[trained.active_adapters[0]]
    else:
        merged: Any = _whole_copy(module)
        merged.merge(safe_merge=True)
        inner = merged.get_base_layer()
    for key, tensor in inner.named_parameters():
        yield f"{name}.{key}", _full(_dequantized(tensor))


def _whole_copy(module: Any) -> Any:
    """Of a module in shares too: those of its matrices may be cut in other ways, and have no product then."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for key, tensor in part._parameters.items():
            if hasattr(tensor, "full_tensor"):
                part._parameters[key] = torch.nn.Parameter(_full(tensor), False)
    return copied


def _dequantized(tensor: torch.Tensor) -> torch.Tensor:
    state: Any = getattr(tensor, "quant_state", None)
    if state is None:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(tensor.data, state)


def _saved_buffers(base: Any) -> list[tuple[str, torch.Tensor]]:
    """Buffers that are part of the model's file."""
    kept = base.state_dict().keys()
    return [(name, buffer) for name, buffer in base.named_buffers() if name in kept]


_READ: Mapping[Only, Callable[[Trained], NamedTensors]] = {"adapter": _adapter, "trained": _trained, "all": _whole}


def trained_name(name: str) -> str:
    """A parameter's name in the base, whatever wraps it."""
    return name.removeprefix("base_model.model.")


def _full(tensor: torch.Tensor) -> torch.Tensor:
    whole: Any = tensor.detach()
    return whole.full_tensor() if hasattr(whole, "full_tensor") else whole
