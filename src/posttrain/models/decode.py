"""One decode step of a Llama-shaped model, without the Python that surrounds it in transformers' modules.

At a few live rows a step costs what its Python and its small tensor operations cost. A step is made for one call of
`generate`, during which weights do not change: the LoRA adapter of a small model is added to its weights once, not to every product.
Projections of any other kind (quantised, DoRA) are called as the modules they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, silu

from posttrain.models.attention import AttendOptions, KVStore, window_of
from posttrain.models.policy import Policy

FAMILIES: dict[str, Callable[[Any], int | None]] = {
    "llama": lambda attention: None,
    "mistral": lambda attention: attention.config.sliding_window,
    "qwen2": lambda attention: attention.sliding_window,
    "qwen3": lambda attention: attention.sliding_window,
}
"""Model types whose decoder layer is the one written out below, and how far back a layer's attention looks."""

DecodeStep = Callable[[torch.Tensor, torch.Tensor, KVStore], torch.Tensor]
"""Newest token and position of each row, [R] and [R] → logits [R, V]."""
Projection = Callable[[torch.Tensor], torch.Tensor]
"""[R, inputs] → [R, outputs]."""
_MOST_COPIED = 256 << 20
"""Bytes of a model up to which its weights are copied to add an adapter; a larger one must not need memory twice."""


def decode_step(policy: Policy) -> DecodeStep:
    """The fast step where the model is of a known family and everything has one dtype, else the model's own forward."""
    config = policy.base.config
    dtypes = {parameter.dtype for parameter in policy.base.parameters() if parameter.dtype.is_floating_point}
    plain = policy.placement.autocast_dtype is None and len(dtypes) == 1
    if plain and config.model_type in FAMILIES and getattr(config, "hidden_act", "silu") == "silu":
        return _LlamaStep(policy)
    return lambda ids_R, positions_R, cache: _by_modules(policy, ids_R, positions_R, cache)


def _by_modules(policy: Policy, ids_R: torch.Tensor, positions_R: torch.Tensor, cache: KVStore) -> torch.Tensor:
    model: Any = policy.model
    output = model(input_ids=ids_R[None], position_ids=positions_R[None], use_cache=False, kv_store=cache)
    return output.logits[0]


class _LlamaStep:
    """Source: the forward of transformers' Llama, Mistral, Qwen2 and Qwen3 at one token per row."""

    def __init__(self, policy: Policy) -> None:
        self._model: Any = policy.base.get_decoder()
        self._offloaded = policy.offloaded
        self._head: Any = policy.base.get_output_embeddings()
        sliding_window = FAMILIES[policy.base.config.model_type]
        attentions = [layer.self_attn for layer in self._model.layers]
        self._options = [
            AttendOptions(attention.scaling, window_of(attention, sliding_window(attention)), None)
            for attention in attentions
        ]
        size = sum(parameter.numel() * parameter.element_size() for parameter in policy.base.parameters())
        copied = size <= _MOST_COPIED and policy.offloaded is None
        project = _projection if copied else lambda module: module
        self._qkv = [[project(layer.q_proj), project(layer.k_proj), project(layer.v_proj)] for layer in attentions]
        self._out = [project(layer.o_proj) for layer in attentions]
        self._mlps = [
            [project(layer.mlp.gate_proj), project(layer.mlp.up_proj), project(layer.mlp.down_proj)]
            for layer in self._model.layers
        ]

    def __call__(self, ids_R: torch.Tensor, positions_R: torch.Tensor, cache: KVStore) -> torch.Tensor:
        x_RE = self._model.embed_tokens(ids_R)
        cos_RD, sin_RD = self._rotation(x_RE, positions_R)
        for number, layer in enumerate(self._model.layers):
            if self._offloaded is not None:
                self._offloaded.fetch(number)  # these layers are not called as modules
            h_RE = _norm(x_RE, layer.input_layernorm)
            q, k, v = _turned(layer.self_attn, [project(h_RE) for project in self._qkv[number]], cos_RD, sin_RD)
            heads = cache.attend(number, q, k, v, self._options[number])
            x_RE = x_RE + self._out[number](heads[0].transpose(0, 1).flatten(1))
            gate, up, down = self._mlps[number]
            h_RE = _norm(x_RE, layer.post_attention_layernorm)
            x_RE = x_RE + down(silu(gate(h_RE)) * up(h_RE))
        return self._head(_norm(x_RE, self._model.norm))

    def _rotation(self, x_RE: torch.Tensor, positions_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine, and sine with the first half negated, so that turning is one roll. Shapes: [R, 1, D]."""
        cos, sin = (part[0].unsqueeze(1) for part in self._model.rotary_emb(x_RE[None], positions_R[None]))
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)


def _projection(module: Any) -> Projection:
    """The module, or one product with its weight and the LoRA update that it would add."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if kind != "peft.tuners.lora.layer.Linear" or type(module.base_layer) is not torch.nn.Linear:
        return module
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or module.disable_adapters or module.lora_variant or any(module.lora_bias[a] for a in adapters):
        return module
    weight = module.base_layer.weight + sum(module.get_delta_weight(name) for name in adapters)
    return lambda x: linear(x, weight, module.base_layer.bias)


def _turned(
    attention: Any, projected: Sequence[torch.Tensor], cos_RD: torch.Tensor, sin_RD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys in their positions, and values: each [1, H, R, D]."""
    query, key, value = (part.view(len(part), -1, attention.head_dim) for part in projected)
    if hasattr(attention, "q_norm"):
        query, key = _norm(query, attention.q_norm), _norm(key, attention.k_norm)
    # Both at once: at a few rows the number of operations is what costs.
    both = torch.cat([query, key], 1)
    both = torch.addcmul(both * cos_RD, both.roll(attention.head_dim // 2, -1), sin_RD)
    query, key = both.split([query.shape[1], key.shape[1]], 1)
    return query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def _norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    return rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
