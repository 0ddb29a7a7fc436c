"""One process, or many under torchrun. The only importer of torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from posttrain.errors import ModelError
from posttrain.protocols import Topology

T = TypeVar("T")


class SingleProcess:
    """The topology of one process: every collective is the identity."""

    rank = 0
    world_size = 1
    is_main = True

    def shard(self, items: Sequence[T]) -> list[T]:
        return list(items)

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        pass

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
        return float(norm)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def full_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}

    def load_state(self, model: nn.Module, state: dict[str, torch.Tensor], optional: Collection[str] = ()) -> None:
        _check_names(model, state, optional)
        model.load_state_dict(state, strict=False)

    def full_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        names = _parameter_names(model, optimizer)
        state = optimizer.state_dict()
        return {names[index]: values for index, values in state["state"].items()}

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        names = _parameter_names(model, optimizer)
        present = optimizer.state_dict()
        present["state"] = {index: state[name] for index, name in enumerate(names) if name in state}
        optimizer.load_state_dict(present)


class ProcessGroup:
    """Ranks under torchrun: data is split over them, parameters are sharded by FSDP2."""

    def __init__(self) -> None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.is_main = self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        return list(items[self.rank :: self.world_size])

    def sum(self, values: Sequence[float]) -> list[float]:
        # Through Python objects: exact float64 on every backend, and the lists are short.
        return [sum(column) for column in zip(*self.gather([float(value) for value in values]), strict=True)]

    def gather(self, value: T) -> list[T]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        for layer in _decoder_layers(model):
            fully_shard(layer)
        fully_shard(model)
        return model

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
        full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore[reportAttributeAccessIssue]
        return float(full)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]

    def full_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: _whole(tensor.detach()) for name, tensor in model.state_dict().items()}

    def load_state(self, model: nn.Module, state: dict[str, torch.Tensor], optional: Collection[str] = ()) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        _check_names(model, state, optional)
        if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            model.load_state_dict(state, strict=False)
            return
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, dict[str, Any](state), options=options)

    def full_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        names = _parameter_names(model, optimizer)
        return {
            name: {key: _whole(value) for key, value in values.items()}
            for name, values in self._named_state(names, optimizer)
        }

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        for name, parameter in zip(_parameter_names(model, optimizer), _parameters(optimizer), strict=True):
            if name not in state:
                continue
            optimizer.state[parameter] = {
                key: distribute_tensor(value, parameter.device_mesh, parameter.placements)
                if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape
                else value
                for key, value in state[name].items()
            }

    def _named_state(self, names: list[str], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, parameter in zip(names, _parameters(optimizer), strict=True):
            if parameter in optimizer.state:
                yield name, optimizer.state[parameter]


def _check_names(model: nn.Module, state: Mapping[str, Any], optional: Collection[str]) -> None:
    """Raises: ModelError unless `state` has every name of the model but `optional` and tied ones, and no other."""
    own = model.state_dict(keep_vars=True)
    # A tied weight has several names, and one of them fills it.
    filled = {id(tensor) for name, tensor in own.items() if name in state}
    missing = sorted(
        n for n, tensor in own.items() if n not in state and n not in optional and id(tensor) not in filled
    )
    unexpected = sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ModelError(
            f"weights and model do not fit: {len(missing)} of the model's {len(own)} are missing ({_some(missing)}), "
            f"{len(unexpected)} are not the model's ({_some(unexpected)}); they were written by another model, adapter or version"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"


def _whole(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()  # pyright: ignore[reportAttributeAccessIssue]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order of its state."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for parameter in _parameters(optimizer)]


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, which FSDP gathers one at a time."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and hasattr(module[0], "self_attn"):
            return list(module)
    return []


@contextmanager
def topology() -> Iterator[Topology]:
    """The topology this process was started in."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SingleProcess()
        return
    group = ProcessGroup()
    try:
        yield group
    finally:
        dist.destroy_process_group()
