"""One decode step of a Llama-shaped model, without the Python that surrounds it in transformers' modules.

At a few live rows a step costs what its Python and its small tensor operations cost. A step is made for one call of
`generate`, during which weights do not change: the LoRA adapter of a small model is added to its weights once, not to every product.
Projections of any other kind (quantised, DoRA) are called as the modules they are. With `prepack` those that share an input are one
product with weights laid out for it, the head's too, and prompts are encoded by the step as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, silu

from posttrain.models.attention import AttendOptions, KVStore, window_of
from posttrain.models.packed import Projections, WeightAndBias, can_be_packed, packed, why_not_packed
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


def decode_step(policy: Policy, prepack: bool = False) -> DecodeStep:
    """The fast step where the model is of a known family, whole and of one dtype, else the model's own forward. `prepack` where `why_not_prepacked` has no reason."""
    if _is_written_out(policy):
        return LlamaStep(policy, prepack)
    return lambda ids_R, positions_R, cache: _by_modules(policy, ids_R, positions_R, cache)


def why_not_prepacked(policy: Policy) -> str:
    """Why `prepack` does nothing for the policy; empty where it does."""
    return why_not_in_float32(policy) or why_not_packed(policy)


def why_not_in_float32(policy: Policy) -> str:
    """Why the policy is not decoded by the step below with float32 on a CPU; empty where it is."""
    if not _is_written_out(policy):
        return f"{policy.source} decodes by its own modules"
    if policy.base.dtype != torch.float32:
        return f"the weights are in {str(policy.base.dtype).removeprefix('torch.')}, not in float32"
    return "" if policy.placement.device.type == "cpu" else "it is made for a CPU"


def _is_written_out(policy: Policy) -> bool:
    config = policy.base.config
    dtypes = {parameter.dtype for parameter in policy.base.parameters() if parameter.dtype.is_floating_point}
    plain = policy.placement.autocast_dtype is None and len(dtypes) == 1
    # Shares of a layer are gathered when its module is called.
    return (
        plain
        and not policy.sharded
        and config.model_type in FAMILIES
        and getattr(config, "hidden_act", "silu") == "silu"
    )


def _by_modules(policy: Policy, ids_R: torch.Tensor, positions_R: torch.Tensor, cache: KVStore) -> torch.Tensor:
    model: Any = policy.model
    output = model(input_ids=ids_R[None], position_ids=positions_R[None], use_cache=False, kv_store=cache)
    return output.logits[0]


class LlamaStep:
    """Source: the forward of transformers' Llama, Mistral, Qwen2 and Qwen3 at one token per row."""

    def __init__(self, policy: Policy, prepack: bool) -> None:
        self.encodes = prepack
        """Whether it encodes prompts too: its bits are then not those of the model's own modules."""
        self._model: Any = policy.base.get_decoder()
        self._offloaded = policy.offloaded
        sliding_window = FAMILIES[policy.base.config.model_type]
        attentions = [layer.self_attn for layer in self._model.layers]
        self._options = [
            AttendOptions(attention.scaling, window_of(attention, sliding_window(attention)), None)
            for attention in attentions
        ]
        size = sum(parameter.numel() * parameter.element_size() for parameter in policy.base.parameters())
        copied = size <= _MOST_COPIED and policy.offloaded is None

        def project(*modules: Any) -> Projections:
            return _projections(modules, copied, prepack)

        self._qkv = [project(layer.q_proj, layer.k_proj, layer.v_proj) for layer in attentions]
        self._out = [project(layer.o_proj) for layer in attentions]
        self._gate_up = [project(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in self._model.layers]
        self._down = [project(layer.mlp.down_proj) for layer in self._model.layers]
        self._head = project(policy.base.get_output_embeddings())

    def __call__(
        self, ids_R: torch.Tensor, positions_R: torch.Tensor, cache: KVStore, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`wanted`: the places whose logits are computed; all where it is None."""
        x_RE = self._model.embed_tokens(ids_R)
        cos_RD, sin_RD = self._rotation(x_RE, positions_R)
        for number, layer in enumerate(self._model.layers):
            if self._offloaded is not None:
                self._offloaded.fetch(number)  # these layers are not called as modules
            h_RE = _norm(x_RE, layer.input_layernorm)
            q, k, v = _turned(layer.self_attn, self._qkv[number](h_RE), cos_RD, sin_RD)
            heads = cache.attend(number, q, k, v, self._options[number])
            [update] = self._out[number](heads[0].transpose(0, 1).flatten(1))
            x_RE = x_RE + update
            gate, up = self._gate_up[number](_norm(x_RE, layer.post_attention_layernorm))
            [update] = self._down[number](silu(gate).mul_(up))
            x_RE = x_RE + update
        [logits] = self._head(_norm(x_RE if wanted is None else x_RE[wanted], self._model.norm))
        return logits

    def _rotation(self, x_RE: torch.Tensor, positions_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine, and sine with the first half negated, so that turning is one roll. Shapes: [R, 1, D]."""
        cos, sin = (part[0].unsqueeze(1) for part in self._model.rotary_emb(x_RE[None], positions_R[None]))
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)


def _projections(modules: Sequence[Any], copied: bool, prepack: bool) -> Projections:
    """Matrices that share an input. `copied`: a LoRA update may be added to a copy of the weight."""
    projections = [_projection(module) if copied else module for module in modules]

    def plain(x: torch.Tensor) -> Sequence[torch.Tensor]:
        return [project(x) for project in projections]

    weights = [_with_update(module) for module in modules] if prepack else []
    return packed([one for one in weights if one], plain) if prepack and can_be_packed(weights) else plain


def _projection(module: Any) -> Projection:
    """The module, or one product with its weight and the LoRA update that it would add."""
    if type(module) is torch.nn.Linear or (found := _with_update(module)) is None:
        return module
    weight, bias = found
    return lambda x: linear(x, weight, bias)


def _with_update(module: Any) -> WeightAndBias | None:
    """The weight that a linear layer multiplies by, any LoRA update added to it; None of another kind."""
    if type(module) is torch.nn.Linear:
        return module.weight, module.bias
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if kind != "peft.tuners.lora.layer.Linear" or type(module.base_layer) is not torch.nn.Linear:
        return None
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or module.disable_adapters or module.lora_variant or any(module.lora_bias[a] for a in adapters):
        return None
    weight = module.base_layer.weight + sum(module.get_delta_weight(name) for name in adapters)
    return weight, module.base_layer.bias


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
