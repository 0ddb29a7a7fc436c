"""Which architectures GGUF is written for, and what each means by its tensors and numbers. Reads no weights.

Names of tensors are gguf's own map. What a family cannot say in GGUF is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from posttrain.errors import ModelError


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A row of `GGUF_FAMILIES`: gguf's architecture, whether queries and keys are stored in its order, norms as 1 + w."""

    arch: str
    permutes: bool = False
    norms_plus_one: bool = False
    check: Callable[[Any], str] = lambda config: ""


def _whole_attention(config: Any) -> str:
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window and window < config.max_position_embeddings and kinds != {"full_attention"}:
        return f"a sliding window of {window} tokens in a form that has none"
    return ""


_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
"""llama.cpp knows the largest of a family by this, and scales its queries by their share of the width instead of by head_dim."""


def _own_scale(config: Any) -> str:
    is_largest = config.num_hidden_layers == _LAYERS_OF_27B[config.model_type]
    read = config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
    if config.query_pre_attn_scalar != read:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar}, where llama.cpp takes {read}"
    return ""


def _pattern(every: int) -> Callable[[Any], str]:
    def check(config: Any) -> str:
        expected = [
            "full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != expected:
            return f"layers of other kinds than one full attention in {every}"
        return _own_scale(config)

    return check


GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "qwen2": GgufFamily("qwen2", check=_whole_attention),
    "qwen3": GgufFamily("qwen3", check=_whole_attention),
    "llama": GgufFamily("llama", permutes=True, check=_whole_attention),
    "mistral": GgufFamily("llama", permutes=True, check=_whole_attention),
    "gemma2": GgufFamily("gemma2", norms_plus_one=True, check=_pattern(2)),
    "gemma3_text": GgufFamily("gemma3", norms_plus_one=True, check=_pattern(6)),
}
"""model_type → how GGUF holds it."""


def family_of(config: Any) -> GgufFamily:
    """Raises: ModelError for an architecture, or a number of it, that the form has no place for."""
    family = GGUF_FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"gguf: {config.model_type} is not among the architectures written: {', '.join(GGUF_FAMILIES)}"
        )
    reason = family.check(config) or _rope(config)[0]
    if reason:
        raise ModelError(f"gguf: this {config.model_type} has {reason}; the exported model would be another one")
    return family


def numbers_of(config: Any) -> dict[str, tuple[str, Any]]:
    """GGUF's keys below the architecture → (kind, value)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _full_rope(config)
    found: dict[str, tuple[str, Any]] = {
        "context_length": ("uint32", config.max_position_embeddings),
        "embedding_length": ("uint32", config.hidden_size),
        "block_count": ("uint32", config.num_hidden_layers),
        "feed_forward_length": ("uint32", config.intermediate_size),
        "attention.head_count": ("uint32", config.num_attention_heads),
        "attention.head_count_kv": ("uint32", config.num_key_value_heads),
        "attention.key_length": ("uint32", head_dim),
        "attention.value_length": ("uint32", head_dim),
        "attention.layer_norm_rms_epsilon": ("float32", config.rms_norm_eps),
        "rope.dimension_count": ("uint32", head_dim),
        "rope.freq_base": ("float32", float(rope["rope_theta"])),
        "vocab_size": ("uint32", config.vocab_size),
    }
    if config.model_type.startswith("gemma"):
        found["attention.sliding_window"] = ("uint32", config.sliding_window)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, key, None)) is not None:
            found[key] = ("float32", cap)
    if rope.get("rope_type") == "linear":
        found |= {"rope.scaling.type": ("string", "linear"), "rope.scaling.factor": ("float32", float(rope["factor"]))}
    return found


def _full_rope(config: Any) -> Mapping[str, Any]:
    """The rotary parameters of layers with full attention."""
    parameters: Mapping[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _rope(config: Any) -> tuple[str, torch.Tensor | None]:
    """Why the form cannot say the rotary scaling, or its factors by frequency where it says them by a tensor."""
    kind = _full_rope(config).get("rope_type", "default")
    local = config.rope_parameters.get("sliding_attention")
    if local is not None and (local["rope_theta"] != 10000.0 or local.get("rope_type", "default") != "default"):
        return "rotary embeddings of local layers that are not those of base 10000", None
    if kind in ("default", "linear"):
        return "", None
    if kind != "llama3" or config.model_type != "llama":
        return f"rotary scaling {kind}", None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    scaled, factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert math.isclose(factor, 1.0), "llama3 scales no attention"
    return "", plain / scaled


def rope_factors(config: Any) -> torch.Tensor | None:
    """Each rotary frequency is divided by its factor; None where they are not scaled one by one."""
    return _rope(config)[1]


def stored(family: GgufFamily, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as the form holds it."""
    if family.norms_plus_one and name.endswith("norm.weight"):
        return tensor + 1
    if family.permutes and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        # Pairs of a rotation lie side by side there, half a head apart here.
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor
