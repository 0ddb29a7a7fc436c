"""What a model type's config.json does not say: how its layers are built and what their modules are called.

A type that is not here is read as Llama's: gated MLPs, RMS norms, rotary positions. Source: the modeling files of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

SPLIT, GATED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """Names of the attention's linear modules (query, key, value, output; or one fused, output) and of the MLP's (all
    but the last widen). `per_norm`: vectors of a norm; `biases`: of which modules; `positions`: rows of a learned table."""

    attention: tuple[str, ...] = SPLIT
    mlp: tuple[str, ...] = GATED
    norms_per_layer: int = 2
    per_norm: int = 1
    biases: str = "none"
    positions: str = "rotary"
    tied: bool = False
    head_norms: bool = False
    fused_gate: bool = False

    @property
    def gated(self) -> bool:
        return self.fused_gate or len(self.mlp) == 3


_FC = ("fc1", "fc2")
_NEOX = ("dense_h_to_4h", "dense_4h_to_h")
FAMILIES: dict[str, Family] = {
    "gpt2": Family(("c_attn", "c_proj"), ("c_fc", "c_proj"), per_norm=2, biases="all", positions="learned", tied=True),
    "gpt_bigcode": Family(("c_attn", "c_proj"), ("c_fc", "c_proj"), per_norm=2, biases="all", positions="learned", tied=True),
    "gpt_neo": Family(SPLIT, ("c_fc", "c_proj"), per_norm=2, biases="all", positions="learned", tied=True),
    "gptj": Family(SPLIT, ("fc_in", "fc_out"), norms_per_layer=1, per_norm=2),
    "gpt_neox": Family(("query_key_value", "dense"), _NEOX, per_norm=2, biases="all"),
    "bloom": Family(("query_key_value", "dense"), _NEOX, per_norm=2, biases="all", tied=True),
    "falcon": Family(("query_key_value", "dense"), _NEOX, norms_per_layer=1, per_norm=2, tied=True),
    "mpt": Family(("Wqkv", "out_proj"), ("up_proj", "down_proj"), tied=True),
    "opt": Family(("q_proj", "k_proj", "v_proj", "out_proj"), _FC, per_norm=2, biases="all", positions="learned", tied=True),
    "phi": Family(("q_proj", "k_proj", "v_proj", "dense"), _FC, norms_per_layer=1, per_norm=2, biases="all"),
    "phi3": Family(("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj"), fused_gate=True),
    "starcoder2": Family(SPLIT, ("c_fc", "c_proj"), per_norm=2, biases="all", tied=True),
    "stablelm": Family(per_norm=2),
    "cohere": Family(norms_per_layer=1, tied=True),
    "cohere2": Family(norms_per_layer=1, tied=True),
    "qwen2": Family(biases="qkv"),
    "qwen2_moe": Family(biases="qkv"),
    "qwen3": Family(head_norms=True),
    "qwen3_moe": Family(head_norms=True),
    "olmo2": Family(head_norms=True),
    "olmo3": Family(head_norms=True),
    "gpt_oss": Family(biases="all"),
    "glm4": Family(SPLIT, ("gate_up_proj", "down_proj"), norms_per_layer=4, fused_gate=True),
    "glm4_moe": Family(),
    "gemma": Family(tied=True),
    "gemma2": Family(norms_per_layer=4, tied=True),
    "gemma3": Family(norms_per_layer=4, head_norms=True, tied=True),
    "mamba": Family(norms_per_layer=1, tied=True),
    "falcon_mamba": Family(norms_per_layer=1, tied=True),
    "mamba2": Family(norms_per_layer=1),
    "gemma3_text": Family(norms_per_layer=4, head_norms=True, tied=True),
}  # fmt: skip
LLAMA = Family()

NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "experts_per_token", "moe_top_k"),
    "vocab": ("vocab_size",),
}
"""A size → the keys under which configs have it, the first that is there counts."""
