"""A model in shares over the ranks (FSDP2), and how ranks hold one between them. Knows no loop."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from posttrain.distributed.precision import precision
from posttrain.distributed.sequence import SequenceGroup
from posttrain.distributed.tensor_parallel import TensorGroup
from posttrain.distributed.whole import Whole, check_names, parameter_names, trained_parameters
from posttrain.errors import ConfigError
from posttrain.protocols import Ranks, Sharding, Share

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardingSpec:
    """How FSDP2 is to do it, under its own words; see the keys of `sharding`."""

    dp_shard_size: int | Literal["node"] | None = None
    sp_size: int = 1
    tensor_parallel_size: int = 1
    reshard_after_forward: bool = True
    sync_each_batch: bool = True
    param_dtype: str = "float32"
    reduce_dtype: str = "float32"


class FullyShard:
    """Every parameter is cut along its first dimension, one share a rank; a layer is gathered while it runs.

    Over `num_shards` neighbours at a time; where there are more ranks, each further group of so many holds a copy (HSDP). Where
    neighbours hold a layer between them, the part that each computes with is cut over the ranks at its place in the other groups.
    """

    is_sharded = True

    def __init__(self, spec: ShardingSpec, num_shards: int) -> None:
        self.num_shards, self._spec = num_shards, spec
        copies = dist.get_world_size() // num_shards
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if copies == 1:
            self._mesh = init_device_mesh(device, (num_shards,))
        else:
            self._mesh = init_device_mesh(device, (copies, num_shards), mesh_dim_names=("dp_replicate", "dp_shard"))
        self.tensor, self._layer_mesh = None, self._mesh
        if (size := spec.tensor_parallel_size) > 1:
            grid = init_device_mesh(device, (num_shards // size, size), mesh_dim_names=("dp_shard", "tp"))
            self.tensor = TensorGroup(grid["tp"], grid.get_group("tp"), size, grid.get_local_rank("tp"))
            self._layer_mesh = grid["dp_shard"]
        self.sequence = _sequence_group(device, spec.sp_size) if spec.sp_size > 1 else None

    @property
    def has_first_copy(self) -> bool:
        return dist.get_rank() < self.num_shards

    def cut(self, model: Any) -> Any:
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

        if _is_cut(model):
            return model
        places = [Shard(0)] if self._mesh.ndim == 1 else [Replicate(), Shard(0)]
        if self.tensor is not None:
            self.tensor.cut(model, decoder_layers(model))
        inside = self._in_layers(model)

        def share(parameter: nn.Parameter) -> nn.Parameter:
            mesh = self._layer_mesh if id(parameter) in inside else self._mesh
            if isinstance(parameter, DTensor):
                return nn.Parameter(_cut_again(parameter.detach(), mesh), parameter.requires_grad)
            local = distribute_tensor(parameter.detach(), mesh, places, src_data_rank=None)
            return nn.Parameter(local, parameter.requires_grad)

        def rows(parameter: nn.Parameter) -> int:
            return self.local(parameter).shape[0]

        def shards(parameter: nn.Parameter) -> int:
            return self._layer_mesh.size() if id(parameter) in inside else self.num_shards

        # Who reads experts one by one wants some for every rank.
        whole = [p for p in model.parameters() if -(-rows(p) // shards(p)) * (shards(p) - 1) < rows(p)]
        replace_parameters(model, {id(parameter): share(parameter) for parameter in whole})
        return model

    def _in_layers(self, model: Any) -> set[int]:
        """The parameters that are cut over `_layer_mesh`: none where that is the whole one."""
        if self.tensor is None:
            return set()
        return {id(parameter) for layer in decoder_layers(model) for parameter in layer.parameters()}

    def largest(self, number: int) -> int:
        found = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def shard(self, model: Any) -> Any:
        from torch.distributed.fsdp import FSDPModule, fully_shard
        from torch.distributed.tensor import DTensor

        # Packed 4-bit weights are no tensors that can be cut: with their scales beside them, each rank holds all of them.
        packed = {p for p in model.parameters() if not p.is_floating_point()}
        if self.tensor is not None and not _is_cut(model):
            self.tensor.cut(model, decoder_layers(model))
        if self.tensor is not None and hasattr(model, "get_base_model"):
            self.tensor.cut_adapter(model)
        # FSDP shards whole parameters. In the place of those that were read as shares it gets empty ones.
        shares = {id(p): p for p in model.parameters() if isinstance(p, DTensor) and not self._is_part(p)}
        places = replace_parameters(model, {key: self._empty(parameter) for key, parameter in shares.items()})
        how: dict[str, Any] = {
            "mp_policy": precision(self._spec.param_dtype, self._spec.reduce_dtype),
            "ignored_params": packed,
        }
        inner = {"mesh": self._layer_mesh, "reshard_after_forward": self._spec.reshard_after_forward, **how}
        for layer in decoder_layers(model):
            for experts in stacked_experts(layer):
                fully_shard(experts, **inner)
            fully_shard(layer, **inner)
        # What the root has is wanted again as soon as the backward begins.
        fully_shard(model, mesh=self._mesh, reshard_after_forward=False, **how)
        for module, name, key in places:
            setattr(module, name, shares[key])
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Ranks hold shares of one loss, so their gradients add up.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def _is_part(self, parameter: torch.Tensor) -> bool:
        """Whether it is what a rank computes with, not yet cut over the ranks at its place."""
        return self.tensor is not None and parameter.device_mesh == self.tensor.mesh  # pyright: ignore[reportAttributeAccessIssue]

    def _empty(self, share: Any) -> nn.Parameter:
        from torch.distributed.tensor import distribute_tensor

        empty = torch.empty(share.shape, dtype=share.dtype, device="meta")
        if self.tensor is not None and share.device_mesh.ndim == 2:
            empty = distribute_tensor(empty, self.tensor.mesh, [share.placements[-1]], src_data_rank=None)
        return nn.Parameter(empty, share.requires_grad)

    def accumulate(self, model: Any, *, is_last: bool) -> None:
        if not self._spec.sync_each_batch:
            model.set_requires_gradient_sync(is_last)

    def release(self, model: Any) -> None:
        if model._get_fsdp_state()._is_root:  # as soon as it was run once
            model.reset_iter_state()

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        limit = max_norm if max_norm > 0 else float("inf")
        if self.tensor is None:
            return float(_full(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        # torch has no norm over several meshes.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        device = self.local(gradients[0]).device
        total = torch.tensor(sum(map(self.square_sum, gradients)), dtype=torch.float32, device=device)
        dist.all_reduce(total)
        norm = float(total.sqrt())
        if (scale := limit / (norm + 1e-6)) < 1.0:
            for gradient in gradients:
                self.local(gradient).mul_(scale)
        return norm

    def square_sum(self, tensor: torch.Tensor) -> float:
        from torch.distributed.tensor import DTensor

        tensor_ranks, counted = self.tensor, self.has_first_copy
        if counted and tensor_ranks is not None and tensor_ranks.place and isinstance(tensor, DTensor):
            is_part, is_of_layer = tensor.device_mesh.ndim == 2, tensor.device_mesh == self._layer_mesh
            counted = not (tensor.placements[-1].is_replicate() if is_part else is_of_layer)
        return float(self.local(tensor).square().sum()) if counted else 0.0

    def together(self, parameters: Sequence[Any]) -> list[list[Any]]:
        if self.tensor is None:
            return [list(parameters)]
        by_mesh: dict[Any, list[Any]] = {}
        for parameter in parameters:
            by_mesh.setdefault(parameter.device_mesh, []).append(parameter)
        return list(by_mesh.values())

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return _whole(tensor.detach())

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        from torch.distributed.tensor import DTensor

        shares = {id(p): p for p in module.parameters() if isinstance(p, DTensor)}
        wholes = {key: nn.Parameter(_full(p.detach()), p.requires_grad) for key, p in shares.items()}
        places = replace_parameters(module, wholes)
        try:
            yield
        finally:
            for place, name, key in places:
                self.fill(shares[key], place._parameters[name].detach())  # pyright: ignore[reportOptionalMemberAccess]
                place._parameters[name] = shares[key]

    def fill(self, parameter: torch.Tensor, whole: torch.Tensor) -> None:
        rows, start, shape, column = self.share_of(parameter)
        own = whole[start : start + len(rows)] if shape else whole
        rows.copy_(own if len(shape) < 2 else own[:, column : column + rows.shape[1]])

    def share_of(self, tensor: torch.Tensor) -> Share:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if not isinstance(tensor, DTensor):
            return Share(tensor.detach(), 0, tuple(tensor.shape))
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return Share(self.local(tensor.detach()), offset[0], tuple(tensor.shape), offset[1] if tensor.ndim > 1 else 0)

    @torch.no_grad()
    def load_state(self, model: nn.Module, state: dict[str, torch.Tensor], optional: Collection[str] = ()) -> None:
        check_names(model, state, optional)
        own = model.state_dict()
        for name, rows in state.items():
            self.local(own[name]).copy_(rows)

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        named = zip(parameter_names(model, optimizer), trained_parameters(optimizer), strict=True)
        return {name: optimizer.state[parameter] for name, parameter in named if parameter in optimizer.state}

    def load_optimizer_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]
    ) -> None:
        for name, parameter in zip(parameter_names(model, optimizer), trained_parameters(optimizer), strict=True):
            if name in state:
                optimizer.state[parameter] = {key: _like(parameter, value) for key, value in state[name].items()}


def sharding_over(ranks: Ranks, spec: ShardingSpec = ShardingSpec()) -> Sharding:
    """How these ranks hold a model between them. Raises: ConfigError where they cannot be divided so."""
    if ranks.world_size == 1:
        if spec != ShardingSpec():
            log.warning("sharding: no effect, because there is one process, which holds all of the model")
        return Whole()
    for name, size in (("sp_size", spec.sp_size), ("tensor_parallel_size", spec.tensor_parallel_size)):
        if ranks.world_size % size:
            raise ConfigError(
                f"sharding.{name}: {size} with {ranks.world_size} processes; expected a number that divides them"
            )
    return FullyShard(spec, _num_shards(spec.dp_shard_size, ranks))


def _sequence_group(device: str, size: int) -> SequenceGroup:
    """Neighbours: what they send each other in every layer should not cross machines."""
    mesh = init_device_mesh(device, (dist.get_world_size() // size, size), mesh_dim_names=("dp", "sp"))
    return SequenceGroup(mesh.get_group("sp"), size, mesh.get_local_rank("sp"))


def _num_shards(size: int | str | None, ranks: Ranks) -> int:
    if size is None:
        return ranks.world_size
    if size == "node":
        nodes = [len(list(same)) for _, same in groupby(ranks.gather(socket.gethostname()))]
        if len(set(nodes)) > 1:
            raise ConfigError(
                f"sharding.dp_shard_size: node, and the machines have {', '.join(map(str, nodes))} processes; expected as many on "
                "each: start so many, or set a number"
            )
        return nodes[0]
    assert isinstance(size, int)
    if ranks.world_size % size:
        raise ConfigError(
            f"sharding.dp_shard_size: {size} with {ranks.world_size} processes; expected a number that divides them"
        )
    return size


def _is_cut(model: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _like(parameter: torch.Tensor, value: Any) -> Any:
    """A share of the optimizer's as a tensor that is sharded like its parameter."""
    from torch.distributed.tensor import DTensor

    if not (isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.ndim):
        return value
    return DTensor.from_local(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def _cut_again(part: Any, mesh: Any) -> Any:
    """A rank's part of a matrix, cut over the ranks at its place as FSDP2 does it."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    number = part._spec.num_shards_map[0]
    place = _StridedShard(0, split_factor=number) if number > 1 else Shard(0)
    rows = part.to_local().chunk(mesh.size(), 0)[mesh.get_local_rank()]
    return DTensor.from_local(
        rows, DeviceMesh._concatenate([mesh, part.device_mesh]), (place, *part.placements), run_check=False,
        shape=part.shape, stride=part.stride(),
    )  # fmt: skip


def replace_parameters(model: nn.Module, by_id: Mapping[int, nn.Parameter]) -> list[tuple[nn.Module, str, int]]:
    """Put other parameters in the place of those with these ids, tied ones everywhere. Returns the places."""
    places = [
        (module, name, id(parameter))
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in by_id
    ]
    for module, name, key in places:
        module._parameters[name] = by_id[key]
    return places


def _whole(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return _full(value).cpu()


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, which FSDP gathers one at a time."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # Experts may be such a list too, inside of a layer.
    largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=nn.ModuleList())
    return list(largest)


def stacked_experts(layer: nn.Module) -> list[nn.Module]:
    """What holds all experts of a layer, one tensor for each of their matrices; with the adapters around it, which read those."""
    # Convolutions are read from outside of their own forward, and have three dimensions too.
    names = [
        name
        for name, module in layer.named_modules()
        if type(module).__name__.endswith("Experts") and any(p.ndim == 3 for p in module.parameters(recurse=False))
    ]
    while wrapped := [name for name in names if name.endswith(".base_layer")]:
        names = [name.removesuffix(".base_layer") if name in wrapped else name for name in names]
    return [layer.get_submodule(name) for name in dict.fromkeys(names) if name]
