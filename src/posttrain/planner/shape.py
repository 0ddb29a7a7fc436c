"""A model's sizes, read from its config.json; no weights are touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import ModelError

_SANDWICHED = ("gemma2", "gemma3", "glm4")
"""Model types with a norm behind attention and MLP as well as before."""
DECODED_BY_WEIGHTS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose decode step adds a LoRA adapter to a copy of the matrices."""
_REQUIRED = ("hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer with gated MLPs.

    `num_experts` is 0 for a dense model; `stored_bytes` is a saved weight's size; `max_positions` 0 is unlimited.
    """

    num_layers: int
    hidden: int
    intermediate: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    stored_bytes: int = 2
    max_positions: int = 0
    norms_per_layer: int = 2
    attention_softcap: bool = False
    logit_softcap: bool = False
    decodes_by_weights: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Raises: ModelError naming the keys that are missing."""
        text = config.get("text_config")
        values: Mapping[str, Any] = {**config, **text} if isinstance(text, Mapping) else config
        missing = [name for name in _REQUIRED if not values.get(name)]
        if missing:
            raise ModelError(
                f"config.json has no {', '.join(missing)}; expected the config of a transformers causal LM"
            )
        hidden, heads = int(values["hidden_size"]), int(values.get("num_attention_heads") or 1)
        experts = int(
            values.get("num_experts") or values.get("num_local_experts") or values.get("n_routed_experts") or 0
        )
        wide = int(values.get("intermediate_size") or 4 * hidden)
        return cls(
            num_layers=int(values["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(values.get("moe_intermediate_size") or wide) if experts else wide,
            vocab=int(values["vocab_size"]),
            num_heads=heads,
            num_kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            tied=bool(values.get("tie_word_embeddings", False)),
            num_experts=experts,
            experts_per_token=int(values.get("num_experts_per_tok") or 0),
            stored_bytes=2
            if str(values.get("dtype") or values.get("torch_dtype") or "").endswith(("float16", "bfloat16"))
            else 4,
            max_positions=int(values.get("max_position_embeddings") or 0),
            norms_per_layer=4 if str(values.get("model_type", "")).startswith(_SANDWICHED) else 2,
            decodes_by_weights=values.get("model_type") in DECODED_BY_WEIGHTS,
            attention_softcap=bool(values.get("attn_logit_softcapping")),
            logit_softcap=bool(values.get("final_logit_softcapping")),
        )

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Linear modules of a layer: name → (inputs, outputs, how many)."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlps = max(1, self.num_experts)
        return {
            "q_proj": (self.hidden, query, 1),
            "k_proj": (self.hidden, key, 1),
            "v_proj": (self.hidden, key, 1),
            "o_proj": (query, self.hidden, 1),
            "gate_proj": (self.hidden, self.intermediate, mlps),
            "up_proj": (self.hidden, self.intermediate, mlps),
            "down_proj": (self.intermediate, self.hidden, mlps),
        }

    @property
    def linear_params(self) -> int:
        """Weights of the layers' linear modules: what 4-bit quantisation applies to."""
        return self.num_layers * sum(rows * columns * count for rows, columns, count in self.linear_shapes.values())

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def num_params(self) -> int:
        norms = self.num_layers * self.norms_per_layer * self.hidden + self.hidden
        router = self.num_layers * self.hidden * self.num_experts
        return self.linear_params + self.embedding_params + norms + router

    @property
    def active_params(self) -> int:
        """Parameters a token passes through: of the experts, only those it is routed to."""
        if not self.num_experts:
            return self.num_params
        expert = 3 * self.hidden * self.intermediate * self.num_layers
        return self.num_params - expert * (self.num_experts - self.experts_per_token)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value
