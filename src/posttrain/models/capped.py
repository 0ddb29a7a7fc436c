"""Attention with capped scores on a GPU: flex_attention, which alone of the kernels there takes a soft cap."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.models.batch import Layout
from posttrain.models.tree_attention import Window, token_places

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: Window | None, softcap: float
) -> Tensor:
    """Shapes: query [1, Hq, N, D], key and value [1, Hkv, N, D] → [1, Hq, N, D]."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    blocks = block_mask(layout, window, query.device)
    return _kernel(query.device.type)(
        query, key, value, score_mod=capped, block_mask=blocks, scale=scale, enable_gqa=True
    )


@lru_cache(maxsize=2)
def _kernel(device_type: str) -> Callable[..., Any]:
    """Compiled on a GPU, for uncompiled it writes all scores out; to compile it for a CPU takes minutes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


@lru_cache(maxsize=8)
def block_mask(layout: Layout, window: Window | None, device: torch.device) -> BlockMask:
    """Who attends to whom, by blocks; made once a batch and window, from the segments, without a mask of tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    position_N, stop_N = token_places(layout.trees, device)
    reach_N = None if window is None else window.reach(position_N)

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = (column <= row) & (row < stop_N[column])
        return seen if reach_N is None else seen & (position_N[row] - position_N[column] < reach_N[row])

    num_tokens = position_N.numel()
    counts, indices = _blocks(layout, num_tokens)
    return BlockMask.from_kv_blocks(
        counts.to(device), indices.to(device), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(num_tokens, num_tokens)
    )


def _blocks(layout: Layout, num_tokens: int) -> tuple[Tensor, Tensor]:
    """For each block of rows how many blocks of columns it may see, and which. Shapes: [1, 1, R], [1, 1, R, R]."""
    size = -(-num_tokens // _BLOCK)
    seen = torch.zeros(size, size, dtype=torch.bool)
    for tree in layout.trees:
        for segment in tree.segments():
            if segment.begin < segment.end:
                rows = slice(segment.begin // _BLOCK, (segment.stop - 1) // _BLOCK + 1)
                columns = slice(segment.begin // _BLOCK, (segment.end - 1) // _BLOCK + 1)
                seen[rows, columns] = True
    seen.tril_()
    order = seen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return seen.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
