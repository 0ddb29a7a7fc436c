"""Attention over ragged batches and over a decode cache, registered through transformers' attention interface.

Every causal LM of transformers reaches `ragged_attention` with its own queries, keys and values; what attends to what
comes in as the keyword argument `layout` (training, scoring, prefill) or `kv_store` (prefill and decode), which
transformers hands through untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from posttrain.errors import ModelError
from posttrain.models.batch import Layout, Tree, longest
from posttrain.models.capped import capped_attention
from posttrain.models.tree_attention import TreeAttention, Window, calls_of, tree_mask

NAME = "posttrain_ragged"
_CAPS_WRITTEN_OUT = frozenset({"cpu"})
"""Devices on which scores with a soft cap are made with a mask, tree by tree; elsewhere flex attention caps them."""
_WIDTH_MULTIPLE = 8
"""Kernels of a GPU take heads whose width this divides."""


class KVStore(Protocol):
    """Keys and values of past tokens, as the rollout engine keeps them."""

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Prefill: keep the prompts' keys and values, [1, Hkv, N, D]."""
        ...

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttendOptions
    ) -> torch.Tensor:
        """Decode: one token per row, [1, H, R, D]; each attends to its own past. Returns [1, Hq, R, D]."""
        ...


@dataclass(frozen=True)
class Prefill:
    """A `KVStore` for a step that encodes prompts: each attends to itself as `layout` says, and `store` keeps its keys and values."""

    layout: Layout
    store: KVStore

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.store.keep(layer, key, value)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttendOptions
    ) -> torch.Tensor:
        """Shapes: [1, H, N, D], of all prompts' tokens → [1, Hq, N, D]."""
        self.keep(layer, key, value)
        out = _attended(query, key, value, self.layout, options.scale, options.window, options.softcap, 0.0)
        return out.transpose(1, 2)


def window_of(module: Any, sliding_window: int | None) -> Window | None:
    """The window of an attention layer. Chunks are not handed to the attention function: the config has them."""
    config: Any = getattr(module, "config", None)
    chunk: int | None = getattr(config, "attention_chunk_size", None)
    layer_types = getattr(config, "layer_types", None)
    if chunk and (layer_types is None or layer_types[module.layer_idx] == "chunked_attention"):
        return Window(chunk, chunked=True)
    return None if sliding_window is None else Window(sliding_window)


@dataclass(frozen=True, slots=True)
class AttendOptions:
    scale: float
    window: Window | None
    softcap: float | None


def register() -> None:
    """Make `attn_implementation=NAME` known. No mask function goes with it, so transformers builds no mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(NAME, ragged_attention)


def register_uncompiled() -> None:
    """From now on compiled layers leave it out: its calls follow from a batch's trees, not from its shapes."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, torch.compiler.disable(ragged_attention))


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    kv_store: KVStore | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Shapes: query [1, Hq, N, D], key and value [1, Hkv, N, D] → [1, N, Hq, D]."""
    if kwargs.get("s_aux") is not None:
        raise ModelError("attention sinks are not expressible in the ragged layout")
    if query.shape[0] != 1:
        raise ModelError(f"ragged attention takes one row of packed tokens, got {query.shape[0]} rows")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key, value = _same_dtype(query, key, value)
    window, softcap = window_of(module, kwargs.get("sliding_window")), kwargs.get("softcap")
    if kv_store is not None and layout is None:
        options = AttendOptions(scale, window, softcap)
        return kv_store.attend(module.layer_idx, query, key, value, options).transpose(1, 2), None  # pyright: ignore[reportArgumentType]
    if kv_store is not None:
        kv_store.keep(module.layer_idx, key, value)  # pyright: ignore[reportArgumentType]
    layout = layout or Layout((Tree(0, query.shape[2]),))
    if layout.split is not None:
        query, key, value = layout.split.to_heads(query, key, value)
    out = _attended(query, key, value, layout, scale, window, softcap, dropout)
    return out if layout.split is None else layout.split.to_tokens(out), None


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float,
    window: Window | None, softcap: float | None, dropout: float,
) -> torch.Tensor:  # fmt: skip
    """Shapes: as `ragged_attention`, of all tokens."""
    if window is not None and longest(layout) <= window.size:
        window = None
    if dropout or (softcap is not None and query.device.type in _CAPS_WRITTEN_OUT):
        return _dense_attention(query, key, value, layout, scale, window, softcap, dropout).transpose(1, 2)
    if softcap is not None:
        return capped_attention(query, key, value, layout, scale, window, softcap).transpose(1, 2)
    return _tree_attention(query, key, value, layout, scale, window)


def _tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, window: Window | None
) -> torch.Tensor:
    """Shapes: as `ragged_attention`. Heads are widened by zeros, which change no score, to one width that kernels take."""
    multiple, out_width = 1 if query.device.type == "cpu" else _WIDTH_MULTIPLE, value.shape[-1]
    width = -(-max(query.shape[-1], out_width) // multiple) * multiple
    # Not `tensor[0]`: the backward of that makes zeros of the whole and copies into them.
    packed = [_widened(tensor.squeeze(0).transpose(0, 1), width) for tensor in (query, key, value)]
    calls = calls_of(layout.trees, query.shape[1] * query.shape[3], query.dtype, window, query.device)
    out: Any = TreeAttention.apply(*packed, calls, scale)
    return (out if out.shape[-1] == out_width else out[..., :out_width]).unsqueeze(0)


def _widened(heads: torch.Tensor, width: int) -> torch.Tensor:
    return heads if heads.shape[-1] == width else torch.nn.functional.pad(heads, (0, width - heads.shape[-1]))


def _same_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast a norm may have lifted queries and keys above the values' dtype."""
    dtype = tensors[-1].dtype
    kind = tensors[0].device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float,
    window: Window | None, softcap: float | None, dropout: float,
) -> torch.Tensor:  # fmt: skip
    """Each tree by itself with an explicit mask: soft caps on a CPU, and dropout, which is of training on documents."""
    if query.device.type != "cpu" and (window is not None or softcap is not None):
        raise ModelError(
            f"attention_dropout={dropout} with a sliding window or a soft cap, which no kernel of a GPU computes; "
            "set attention_dropout to 0 in the model's config.json"
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts: list[torch.Tensor] = []
    for tree in layout.trees:
        own = slice(tree.start, tree.stop)
        q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
        if softcap is None and window is None and not tree.ends:
            parts.append(scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale))
            continue
        mask = tree_mask(tree, window, query.device)
        if softcap is None:
            parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale))
            continue
        scores = torch.tanh(q @ k.transpose(-1, -2) * scale / softcap) * softcap
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
        parts.append(torch.dropout(weights, dropout, dropout > 0) @ v)
    return torch.cat(parts, dim=2)
