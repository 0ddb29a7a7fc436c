"""Many LoRA adapters beside each other on one frozen base; which token goes through which is said before each forward.

The base's product is computed once for all tokens; each adapter adds its own low-rank update to its own tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from posttrain.errors import ModelError
from posttrain.models.low_rank import adapter_config, adapter_weights, split
from posttrain.models.policy import Policy
from posttrain.models.provenance import recorded_bits

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module of the base → A, and B times the adapter's scale. Shapes: [r, inputs], [outputs, r]."""
_PREFIX = "base_model.model."
_MORE_THAN_LORA: Mapping[str, Any] = {
    "use_dora": False, "bias": "none", "modules_to_save": None, "target_parameters": None, "lora_bias": False,
    "fan_in_fan_out": False, "trainable_token_indices": None, "layer_replication": None,
}  # fmt: skip
"""Keys of an adapter's config → the only value with which it is a sum of low-rank updates of linear layers."""


Segments = list[tuple[str, torch.Tensor | None]]
"""Adapter → the tokens that go through it; None: all of them."""


class AdapterSlots:
    """Puts a slot at every linear layer of a policy's base. Raises: ModelError where rows cannot be run together.

    A head that is the embedding too has none: what is added to it would be added to the embedding.
    """

    def __init__(self, policy: Policy) -> None:
        if not policy.ragged or policy.has_adapter:
            raise ModelError(
                f"{policy.source}: its rows cannot be run together, which several adapters on one base need; "
                "merge each adapter (posttrain merge) and serve the merged folder"
            )
        self._device = policy.placement.device
        self.segments: Segments = []
        """Of the coming forward."""
        self._names: Sequence[str | None] = ()
        self._wanted: torch.Tensor | int = 0
        self._slots: dict[str, SlotLinear] = {}
        base: Any = policy.base
        head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
        for name, module in list(base.named_modules()):
            # An expert sees some of the tokens only.
            if type(module) is nn.Linear and module.weight is not embedding.weight and ".experts." not in name:
                parent, _, child = name.rpartition(".")
                self._slots[name] = (SlotHead if module is head else SlotLinear)(module, self)
                setattr(base.get_submodule(parent), child, self._slots[name])
        base.register_forward_pre_hook(self._note_wanted, with_kwargs=True)

    def load(self, name: str, factors: Factors) -> None:
        """Raises: ModelError if the adapter is for another base; nothing is loaded then."""
        for module, (a, b) in factors.items():
            slot = self._slots.get(module)
            if slot is None:
                raise ModelError(f"adapter {name} changes {module}, where this base has no linear layer")
            if (a.shape[1], b.shape[0]) != (slot.in_features, slot.out_features):
                raise ModelError(
                    f"adapter {name}: {module} is {a.shape[1]} → {b.shape[0]}, the base's {slot.in_features} → {slot.out_features}"
                )
        for module, (a, b) in factors.items():
            self._slots[module].factors[name] = (a.to(self._device), b.to(self._device))

    def unload(self, name: str) -> None:
        for slot in self._slots.values():
            slot.factors.pop(name, None)

    def assign(self, names: Sequence[str | None]) -> None:
        """The adapter of each token of the coming forward, in order; None: the base alone."""
        self._names, self._wanted = names, 0
        self.segments = self._segments(names)

    @property
    def num_tokens(self) -> int:
        return len(self._names)

    def segments_at_head(self) -> Segments:
        """The same of those tokens whose logits are wanted."""
        wanted = self._wanted
        if isinstance(wanted, int):
            return self._segments(self._names[-wanted:]) if wanted else self.segments
        return self._segments([self._names[place] for place in wanted.tolist()])

    def _segments(self, names: Sequence[str | None]) -> Segments:
        used = [name for name in dict.fromkeys(names) if name is not None]
        if len(used) == 1 and None not in names:
            return [(used[0], None)]
        where: dict[str, list[int]] = {name: [] for name in used}
        for place, name in enumerate(names):
            if name is not None:
                where[name].append(place)
        return [(name, torch.tensor(places, device=self._device)) for name, places in where.items()]

    def _note_wanted(self, _module: nn.Module, _args: Any, named: dict[str, Any]) -> None:
        self._wanted = named.get("logits_to_keep", 0)


class SlotLinear(nn.Module):
    """A linear layer, and the low-rank updates of the adapters that its tokens go through."""

    def __init__(self, base_layer: nn.Linear, slots: AdapterSlots) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.weight, self.bias = base_layer.weight, base_layer.bias
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # In a list: as an attribute it would look like one of the model's parts to `copy.deepcopy`.
        self._of = [slots]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if not self.factors:
            return y
        tokens, sums = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        for name, where in self._segments(len(tokens)):
            if name in self.factors:
                a, b = self.factors[name]
                update = linear(linear((tokens if where is None else tokens[where]).to(a.dtype), a), b).to(y.dtype)
                if where is None:
                    sums += update
                else:
                    sums.index_add_(0, where, update)
        return y

    def _segments(self, num_tokens: int) -> Segments:
        [slots] = self._of
        assert num_tokens == slots.num_tokens, "every token was assigned an adapter before the forward"
        return slots.segments


class SlotHead(SlotLinear):
    """The head, which sees those tokens alone whose logits are wanted."""

    def _segments(self, num_tokens: int) -> Segments:
        [slots] = self._of
        return slots.segments_at_head()


def read_factors(adapter: Path) -> Factors:
    """The updates of a PEFT adapter. Raises: ModelError for one that is more than a sum of low-rank updates."""
    from peft.utils.other import get_pattern_key

    config = adapter_config(adapter)
    for key, only in _MORE_THAN_LORA.items():
        value = config.get(key, only)
        if value != only and value:
            raise ModelError(
                f"{adapter}: {key}: {value} cannot be served beside other adapters; merge it (posttrain merge) and serve the "
                "merged folder"
            )
    if bits := recorded_bits(adapter):
        raise ModelError(
            f"{adapter} was trained on a base in {8 if bits.get('load_in_8bit') else 4} bits, which is not the base that is served; serve the stage's model/"
        )
    tensors = adapter_weights(adapter)
    pairs, saved = split(tensors)
    if saved or any(".lora_embedding_" in name for pair in pairs.values() for name in pair):
        raise ModelError(
            f"{adapter}: {next(iter(saved or pairs))} is no update of a linear layer; merge it (posttrain merge) and serve that"
        )
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module, (a_name, b_name) in pairs.items():
        name = module.removeprefix(_PREFIX)
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), name), config["lora_alpha"])
        a, b = tensors[a_name].float(), tensors[b_name].float()
        rank = math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0]
        factors[name] = a, b * (alpha / rank)
    return factors
