"""An adapter merged into its base a layer at a time. Knows no folder.

The base stays as it was read: in its file's dtype, and where that is what the file holds, in pages of the file that take no memory of
the process. Only while a layer runs, or one of its tensors is written, are its matrices there in float32 with the adapter added.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.distributed.whole import Whole

Unpack = Callable[[], torch.Tensor]
"""Gives the float32 matrix of a quantised linear."""


class MergedByLayer(Whole):
    """The model that PEFT's `merge_and_unload` would make of `adapted`: `model`, whose tensors are merged when `whole` asks for them.

    `dequantized`: linears, by their names in the base, that have another weight than that of the base's file.
    """

    def __init__(self, adapted: Any, dequantized: Mapping[str, Unpack]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers: list[Any] = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
        self._layers: dict[int, list[Any]] = {}
        for layer in layers:
            self._layers.setdefault(id(layer.get_base_layer()), []).append(layer)
        self.model: PreTrainedModel = _unloaded(adapted, layers)
        self._unpack = {id(self.model.get_submodule(name)): unpack for name, unpack in dequantized.items()}
        changed = [part for part in self.model.modules() if id(part) in self._layers or id(part) in self._unpack]
        self._part_of = {id(parameter): part for part in changed for parameter in part.parameters(recurse=False)}
        self._as_read: dict[int, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        part = self._part_of.get(id(tensor))
        if part is None:
            return super().whole(tensor)
        merged = self._merge(part)
        try:
            return super().whole(tensor)
        finally:
            self._take_back(merged)

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """The merged model, to be called: a layer is merged while it runs. All of it, for its modules read each other's weights."""
        layers = {id(layer) for part in self.model.modules() if isinstance(part, nn.ModuleList) for layer in part}
        merged: dict[int, list[int]] = {}

        def merge(module: nn.Module, _: Any) -> None:
            parts = module.modules() if id(module) in layers else [module]
            merged[id(module)] = [key for part in parts for key in self._merge(part)]

        def take_back(module: nn.Module, _: Any, __: Any) -> None:
            self._take_back(merged.pop(id(module)))

        hooks = [module.register_forward_pre_hook(merge) for module in self.model.modules()]
        hooks += [module.register_forward_hook(take_back) for module in self.model.modules()]
        try:
            yield self.model
        finally:
            for hook in hooks:
                hook.remove()
            self._take_back(list(self._as_read))

    @torch.no_grad()
    def _merge(self, part: nn.Module) -> list[int]:
        """Returns what is to be taken back: nothing where the part is not changed, or merged already."""
        key, layers, unpack = id(part), self._layers.get(id(part), []), self._unpack.get(id(part))
        if key in self._as_read or not (layers or unpack):
            return []
        self._as_read[key] = [(parameter, parameter.data) for parameter in part.parameters(recurse=False)]
        for parameter, data in self._as_read[key]:
            parameter.data = data.float()
        if unpack is not None:
            weight: Any = part.weight
            weight.data = as_held(part, unpack()).to(weight.device)
        for layer in layers:
            layer.merge(safe_merge=True)
            layer.merged_adapters.clear()
        return [key]

    def _take_back(self, merged: list[int]) -> None:
        for key in merged:
            for parameter, data in self._as_read.pop(key):
                parameter.data = data


def _unloaded(adapted: Any, layers: list[Any]) -> PreTrainedModel:
    """The base as a model of its own, nothing merged yet, with the modules that were trained whole."""
    for layer in layers:
        layer.merge = lambda *_, **__: None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        model = adapted.merge_and_unload(safe_merge=True)
    for layer in layers:
        del layer.merge
    return model


def as_held(linear: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """GPT-2's linears hold their matrix the other way round, and 4 bits turn it."""
    return weight.T if isinstance(linear, Conv1D) else weight
