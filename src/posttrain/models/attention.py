"""Attention over ragged batches and over a decode cache, registered through transformers' attention interface.

Every causal LM of transformers reaches `ragged_attention` with its own queries, keys and values; what attends to what
comes in as the keyword argument `layout` (training, scoring, prefill) or `kv_store` (prefill and decode), which
transformers hands through untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from posttrain.errors import ModelError
from posttrain.models.batch import Layout, Tree

NAME = "posttrain_ragged"


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


@dataclass(frozen=True, slots=True)
class Window:
    """How far back a layer attends: over `size` tokens, or (`chunked`) to the start of the chunk of that size."""

    size: int
    chunked: bool = False

    def reach(self, position: torch.Tensor) -> torch.Tensor:
        """Tokens that the token at each position attends to, itself included."""
        return position % self.size + 1 if self.chunked else torch.full_like(position, self.size)


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
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, ragged_attention)


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
    longest = max((_depth(tree) for tree in layout.trees), default=0)
    if dropout or softcap is not None or (window is not None and longest > window.size):
        out = _dense_attention(query, key, value, layout, scale, window, softcap, dropout)
    elif query.device.type == "cpu":
        out = _TreeAttention.apply(query, key, value, layout, scale)
    else:
        out = _dense_attention(query, key, value, layout, scale, None, None, 0.0)
    return out.transpose(1, 2), None  # pyright: ignore[reportOptionalMemberAccess]


def _same_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast a norm may have lifted queries and keys above the values' dtype."""
    dtype = tensors[-1].dtype
    if torch.is_autocast_enabled(tensors[0].device.type):
        dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _depth(tree: Tree) -> int:
    return tree.split - tree.start + max((end - begin for begin, end in tree.branches()), default=0)


class _TreeAttention(torch.autograd.Function):
    """Exact attention of each tree by the CPU flash kernel, without copying a shared prefix.

    A branch attends to its prefix and to itself in two calls, merged by their log-sum-exp. Given the merged output
    and log-sum-exp, the kernel's backward of each call yields that call's share of the gradient (Liu et al. 2023,
    Ring Attention, arXiv 2310.01889, use the same identity across devices). A small tree is one masked call.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
    ) -> torch.Tensor:
        _, num_heads, num_tokens, width = query.shape
        out = query.new_empty(1, num_tokens, num_heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_empty(1, num_heads, num_tokens, dtype=torch.float32)
        for call in _calls(layout, num_heads * width, query.dtype):
            rows, columns = call.rows, call.columns
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows], key[:, :, columns], value[:, :, columns],
                0.0, call.causal, attn_mask=call.mask, scale=scale,
            )  # fmt: skip
            if call.more:
                part, part_lse = merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
            out[:, :, rows], lse[:, :, rows] = part, part_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse = ctx.saved_tensors
        totals = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
        for call in _calls(ctx.layout, query.shape[1] * query.shape[3], query.dtype):
            rows, columns = call.rows, call.columns
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, rows], query[:, :, rows], key[:, :, columns], value[:, :, columns],
                out[:, :, rows], lse[:, :, rows], 0.0, call.causal, attn_mask=call.mask, scale=ctx.scale,
            )  # fmt: skip
            for total, grad, where in zip(totals, grads, (rows, columns, columns), strict=True):
                if call.more:
                    total[:, :, where] += grad
                else:
                    total[:, :, where] = grad
        return *totals, None, None


@dataclass(frozen=True)
class _Call:
    """One call of the kernel: packed positions of queries and keys; `more` adds to what earlier calls found."""

    rows: slice
    columns: slice
    causal: bool = True
    mask: torch.Tensor | None = None
    more: bool = False


_CALL_FLOPS = 12e6
"""What the kernel could compute in the time that one call of it, and the merging of what it found, cost beside."""


@lru_cache(maxsize=4)
def _calls(layout: Layout, width: int, dtype: torch.dtype) -> tuple[_Call, ...]:
    """The kernel calls of a layer with `width` query channels; the same for all layers, and for the backward."""
    calls: list[_Call] = []
    for tree in layout.trees:
        own = [slice(begin, end) for begin, end in ((tree.start, tree.split), *tree.branches()) if begin < end]
        whole, tail, prefix = (
            slice(*ends) for ends in ((tree.start, tree.stop), (tree.split, tree.stop), (tree.start, tree.split))
        )
        size = tree.stop - tree.start
        if tree.ends and 4 * width * size**2 < _CALL_FLOPS * len(own):
            hidden = ~tree_mask(tree, None, torch.device("cpu"))
            mask = torch.zeros(size, size, dtype=dtype).masked_fill_(hidden, -torch.inf)
            calls.append(_Call(whole, whole, causal=False, mask=mask[None, None]))
            continue
        calls += [_Call(span, span) for span in own]
        if tree.ends and tree.start < tree.split < tree.stop:
            calls.append(_Call(tail, prefix, causal=False, more=True))
    return tuple(calls)


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine softmax attention over two disjoint key sets. Shapes: out [..., T, D], lse [..., T]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp().unsqueeze(-1), (lse_b - lse).exp().unsqueeze(-1)
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def _dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float,
    window: Window | None, softcap: float | None, dropout: float,
) -> torch.Tensor:  # fmt: skip
    """Each tree by itself with an explicit mask: windows, soft caps, dropout, and devices without the flash kernel."""
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


def tree_mask(tree: Tree, window: Window | None, device: torch.device) -> torch.Tensor:
    """[L, L] bool: True where a token of the tree (row) attends to another (column)."""
    prefix = tree.split - tree.start
    branch = torch.zeros(tree.stop - tree.start, dtype=torch.long, device=device)
    position = torch.arange(tree.stop - tree.start, device=device)
    for number, (begin, end) in enumerate(tree.branches(), start=1):
        own = slice(begin - tree.start, end - tree.start)
        branch[own] = number
        position[own] = torch.arange(prefix, prefix + end - begin, device=device)
    mask = ((branch[None] == 0) | (branch[None] == branch[:, None])) & (position[None] <= position[:, None])
    return mask if window is None else mask & (position[:, None] - position[None] < window.reach(position)[:, None])
