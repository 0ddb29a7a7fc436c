"""A model that one process holds all of, and what the state of any model is checked against."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from posttrain.errors import ModelError
from posttrain.protocols import Share


class Whole:
    """One process holds all of it."""

    num_shards = 1
    is_sharded = False
    has_first_copy = True
    sequence = None
    tensor = None

    def square_sum(self, tensor: torch.Tensor) -> float:
        return float(tensor.square().sum())

    def together(self, parameters: Sequence[Any]) -> list[list[Any]]:
        return [list(parameters)]

    def largest(self, number: int) -> int:
        return number

    def cut(self, model: Any) -> Any:
        return model

    def shard(self, model: Any) -> Any:
        return model

    def release(self, model: Any) -> None:
        pass

    def accumulate(self, model: Any, *, is_last: bool) -> None:
        pass

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
        return float(norm)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu()

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def fill(self, parameter: torch.Tensor, whole: torch.Tensor) -> None:
        parameter.data.copy_(whole)

    def load_state(self, model: nn.Module, state: dict[str, torch.Tensor], optional: Collection[str] = ()) -> None:
        check_names(model, state, optional)
        model.load_state_dict(state, strict=False)

    def share_of(self, tensor: torch.Tensor) -> Share:
        return Share(tensor.detach(), 0, tuple(tensor.shape))

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        names = parameter_names(model, optimizer)
        state = optimizer.state_dict()
        return {names[index]: values for index, values in state["state"].items()}

    def load_optimizer_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]
    ) -> None:
        names = parameter_names(model, optimizer)
        present = optimizer.state_dict()
        present["state"] = {index: state[name] for index, name in enumerate(names) if name in state}
        optimizer.load_state_dict(present)


def check_names(model: nn.Module, state: Mapping[str, Any], optional: Collection[str]) -> None:
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


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order of its state."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for parameter in trained_parameters(optimizer)]
