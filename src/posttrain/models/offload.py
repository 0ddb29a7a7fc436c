"""What leaves the device until it is needed: inputs of layers for the backward pass, and the weights of frozen layers.

Frozen layers lie in the machine's memory, and are on the device while they are computed with, the next one a layer ahead.

A module's tensors stay the same ones; what comes and goes is their storage. So what a forward pass recorded past every hook (a 4-bit
product keeps its weights there) is filled again when the backward pass recomputes that layer. Without storage many kernels would
read at address 0, so a module of a layer that was not fetched refuses to be called. Knows no adapter and no stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

from posttrain.distributed.sharding import decoder_layers
from posttrain.errors import ModelError


@dataclass(frozen=True, slots=True)
class _OffloadedWeight:
    """A weight: `tensor` has the storage that the model computes with, while it is there; `host` is what is copied into it."""

    tensor: torch.Tensor
    host: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.host.numel() * self.host.element_size()

    @property
    def resident_bytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()

    def resize(self, num_bytes: int) -> None:
        self.tensor.untyped_storage().resize_(num_bytes)


class OffloadedLayers:
    """What is frozen in a model's layers; everything else of the model is moved to the device, for good.

    At most two layers are on the device: the one that is computed with, and the one after it. A layer goes when another is
    fetched, and not before, for a recomputation that has all it needs ends in the middle of a layer.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        layers = decoder_layers(model)
        uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._weights: dict[int, _OffloadedWeight] = {}
        self._layer_of: dict[int, int] = {}
        for index, layer in enumerate(layers):
            for parameter in layer.parameters():
                # What several modules share is not one layer's.
                if not parameter.requires_grad and uses[id(parameter)] == 1:
                    self._weights[id(parameter)] = self._emptied(parameter)
                    self._layer_of[id(parameter)] = index
            layer.register_forward_pre_hook(partial(self._enter, index))
            for module in layer.modules():
                if any(id(parameter) in self._weights for parameter in module._parameters.values()):
                    module.register_forward_pre_hook(partial(self._require, index))
        self._layers = [[w for key, w in self._weights.items() if self._layer_of[key] == n] for n in range(len(layers))]
        self._present: dict[int, torch.cuda.Event | None] = {}
        """Layers on the device or on their way, each with the copy that is not waited for yet."""
        self._last = 0
        """The layer that was fetched."""
        self.copied_bytes = 0
        model.to(device)

    @property
    def host_bytes(self) -> int:
        return sum(weight.num_bytes for weight in self._weights.values())

    @property
    def resident_bytes(self) -> int:
        """What of them is on the device now."""
        return sum(weight.resident_bytes for weight in self._weights.values())

    def fetch(self, index: int) -> None:
        """When this returns, layer `index` may be computed with, and the one that follows is on its way; no other is there."""
        ahead = self._after(index)
        for other in [layer for layer in self._present if layer not in (index, ahead)]:
            self._release(other)
        for layer in (index, ahead):
            if layer not in self._present:
                self._copy(layer)
        self._wait_for(index)
        self._last = index

    def fetch_those_of(self, tensors: Iterable[torch.Tensor]) -> None:
        """The layer that these are in, for who reads weights outside of a forward pass."""
        found = {self._layer_of[id(tensor)] for tensor in tensors if id(tensor) in self._layer_of}
        assert len(found) <= 1, "two layers are never read at once"
        for index in found:
            self.fetch(index)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight on the device, for whoever keeps it; any other tensor as it is."""
        weight = self._weights.get(id(tensor))
        return tensor if weight is None else weight.host.to(self._device, copy=True)

    def _enter(self, index: int, layer: nn.Module, _: Any) -> None:
        # In its eval mode transformers recomputes nothing, and the backward pass would find no weights.
        assert layer.training or not torch.is_grad_enabled(), "a backward pass through offloaded layers recomputes them"
        self.fetch(index)

    def _require(self, index: int, *_: Any) -> None:
        # One that is on its way may still be copied.
        assert index == self._last and index in self._present, f"layer {index} is called and was not fetched"

    def _emptied(self, parameter: nn.Parameter) -> _OffloadedWeight:
        host = parameter.data if self._copies is None else parameter.data.pin_memory()
        weight = _OffloadedWeight(torch.empty_like(host, device=self._device), host)
        parameter.data = weight.tensor
        weight.resize(0)
        return weight

    def _after(self, index: int) -> int:
        """The layer that is most likely needed next: a guess costs a wait where it is wrong, and nothing else."""
        last = len(self._layers) - 1
        if 0 < index < self._last:  # backward
            return index - 1
        if index < last:
            return index + 1
        # At the top a backward pass turns around, and a pass without gradients is followed by another from below.
        return max(0, last - 1) if torch.is_grad_enabled() else 0

    def _copy(self, index: int) -> None:
        weights = self._layers[index]
        for weight in weights:
            weight.resize(weight.num_bytes)
        side: Any = self._copies
        if side is not None:
            # The room may have been another tensor's, in work that is still queued.
            side.wait_stream(torch.cuda.current_stream(self._device))
        with nullcontext() if side is None else torch.cuda.stream(side):
            for weight in weights:
                weight.tensor.copy_(weight.host, non_blocking=True)
        self._present[index] = None if side is None else side.record_event()
        self.copied_bytes += sum(weight.num_bytes for weight in weights)

    def _wait_for(self, index: int) -> None:
        if (event := self._present[index]) is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
            self._present[index] = None

    def _release(self, index: int) -> None:
        self._wait_for(index)  # a copy under way would write into somebody else's room
        del self._present[index]
        for weight in self._layers[index]:
            weight.resize(0)


def checkpoint_layers(model: Any, *, offload: bool) -> None:
    """Layers keep nothing but their input for the backward pass, which runs them again; with `offload` it lies in pinned host memory.

    Raises: ModelError for a model without layers that transformers recomputes.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    if offload and not layers:
        raise ModelError(
            f"gradient_checkpointing: offload: {type(model).__name__} has no layers that transformers recomputes; set it to true"
        )
    for layer in layers if offload else ():
        layer._gradient_checkpointing_func = partial(_with_inputs_on_host, layer._gradient_checkpointing_func)


def _with_inputs_on_host(checkpoint: Any, layer: Any, *inputs: Any) -> Any:
    # Around the layer alone: what the head keeps, and what is recomputed, stays where it is.
    with save_on_cpu(pin_memory=True):
        return checkpoint(layer, *inputs)
