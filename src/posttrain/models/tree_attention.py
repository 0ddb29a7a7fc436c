"""Exact attention of packed trees: which calls of a kernel they take, and how what these find is put together.

A segment attends to itself in one call, and what continues it attends to it in another; two calls over disjoint keys are
merged by their log-sum-exp. Given the merged output and log-sum-exp, the kernel's backward of each call yields that call's
share of the gradient (Liu et al. 2023, Ring Attention, arXiv 2310.01889, use the same identity across devices).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from posttrain.models.batch import Segment, Tree
from posttrain.models.varlen import Sequences, kernel_for

Where = slice | Tensor
"""Packed positions: a range, or their numbers."""
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""What a backward reads: the output's gradient, query, key, value, output, log-sum-exp."""


@dataclass(frozen=True, slots=True)
class Window:
    """How far back a layer attends: over `size` tokens, or (`chunked`) to the start of the chunk of that size."""

    size: int
    chunked: bool = False

    def reach(self, position: Tensor) -> Tensor:
        """Tokens that the token at each position attends to, itself included."""
        return position % self.size + 1 if self.chunked else torch.full_like(position, self.size)

    def first_seen(self, position: int) -> int:
        """The first position that the token at this one attends to."""
        return position - position % self.size if self.chunked else max(0, position - self.size + 1)

    def pieces(self, begin: int, end: int, most: int | None) -> Iterable[tuple[int, int, int]]:
        """The positions `[begin, end)` apart where chunks begin: begin and end of each piece, and the first key it sees.

        Of those that need a mask none is longer than `most`.
        """
        while begin < end:
            first = self.first_seen(begin)
            until = min(end, first + self.size) if self.chunked else end
            masked = begin > first or until - first > self.size
            if most is not None and masked:
                until = min(until, begin + most)
            yield begin, until, first
            begin = until


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the kernel; `more` adds to what earlier calls found, `repeated`: a key is there more than once."""

    rows: Where
    columns: Where
    sequences: Sequences
    more: bool = False
    repeated: bool = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return kernel_for(query).forward(query, key, value, self.sequences, scale)

    def backward(self, saved: Saved, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        return kernel_for(saved[1]).backward(*saved, self.sequences, scale)


@dataclass(frozen=True, eq=False)
class MaskedCall:
    """A small tree at once on a CPU, where a call costs more than the products that its mask hides."""

    rows: Where
    columns: Where
    mask: Tensor
    more: bool = False
    repeated: bool = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)), 0.0, False,
            attn_mask=self.mask, scale=scale,
        )  # fmt: skip
        return out[0].transpose(0, 1), lse[0]

    def backward(self, saved: Saved, scale: float) -> tuple[Tensor, ...]:
        *tensors, lse = saved
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(tensor.transpose(0, 1)[None] for tensor in tensors), lse[None], 0.0, False,
            attn_mask=self.mask, scale=scale,
        )  # fmt: skip
        return tuple(grad[0].transpose(0, 1) for grad in grads)


class TreeAttention(torch.autograd.Function):
    """Shapes: query [N, Hq, D], key and value [N, Hkv, D] → [N, Hq, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: Sequence[Call | MaskedCall], scale: float
    ) -> Tensor:
        rest = calls
        if calls and _is_all(calls[0].rows, query):
            out, lse = calls[0].forward(query, key[calls[0].columns], value[calls[0].columns], scale)
            rest = calls[1:]
        else:
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
            lse = out.new_empty(query.shape[1], query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
        for call in rest:
            rows, columns = call.rows, call.columns
            part, part_lse = call.forward(query[rows], key[columns], value[columns], scale)
            if call.more:
                part, part_lse = merge(out[rows], lse[:, rows].t(), part, part_lse.t())
                part_lse = part_lse.t()
            out[rows], lse[:, rows] = part, part_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse = ctx.saved_tensors
        rest = ctx.calls
        if rest and _is_all(rest[0].rows, query) and _is_all(rest[0].columns, key):
            totals: Any = rest[0].backward((grad_out, query, key, value, out, lse), ctx.scale)
            rest = rest[1:]
        else:
            totals = [_total(tensor, ctx.calls) for tensor in (query, key, value)]
        for call in rest:
            rows, columns = call.rows, call.columns
            saved = (grad_out[rows], query[rows], key[columns], value[columns], out[rows], lse[:, rows])
            grads = call.backward(saved, ctx.scale)
            for total, grad, where in zip(totals, grads, (rows, columns, columns), strict=True):
                if call.repeated and isinstance(where, Tensor):
                    total.index_add_(0, where, grad.to(total.dtype))
                elif call.more:
                    total[where] += grad
                else:
                    total[where] = grad
        return *(total.to(t.dtype) for total, t in zip(totals, (query, key, value), strict=True)), None, None


def _is_all(where: Where, tensor: Tensor) -> bool:
    return isinstance(where, slice) and where == slice(0, len(tensor))


def _total(tensor: Tensor, calls: Sequence[Call | MaskedCall]) -> Tensor:
    """What gradients add up in. Shares of many sequences in a half precision would lose the small ones."""
    by_head = tensor.transpose(0, 1)
    if not any(call.repeated for call in calls):
        return torch.empty_like(by_head, memory_format=torch.contiguous_format).transpose(0, 1)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros_like(by_head, dtype=dtype, memory_format=torch.contiguous_format).transpose(0, 1)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine softmax attention over two disjoint key sets. Shapes: out [..., T, D], lse [..., T]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp().unsqueeze(-1), (lse_b - lse).exp().unsqueeze(-1)
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


# --- which calls ---------------------------------------------------------------------------------------------------

_ONE_BY_ONE = frozenset({"cpu"})
"""Devices whose kernel goes from sequence to sequence: there ranges need no copies, and a small tree is one masked call."""
_PIECE = (512, 1024)
"""Where a window is a mask, as on a CPU: a sequence is cut into pieces of so many queries (the least, the most; half of the
window between them), so that masks stay small and what no token sees is not computed."""
_CALL_FLOPS = 12e6
"""What a CPU could compute in the time that one call of its kernel, and the merging of what it found, cost beside."""


@lru_cache(maxsize=8)
def calls_of(
    trees: tuple[Tree, ...], width: int, dtype: torch.dtype, window: Window | None, device: torch.device
) -> tuple[Call | MaskedCall, ...]:
    """The kernel calls of a layer with `width` query channels; the same for all such layers, and for the backward.

    One for all segments and one a level for all that continue others, however many trees there are. With a window, which hides all but a few tokens of a prefix, one call in which each segment has those keys before its own.
    """
    if window is not None:
        return (_windowed(trees, window, device),)
    one_by_one = device.type in _ONE_BY_ONE
    calls: list[Call | MaskedCall] = []
    for small, group in groupby(trees, key=lambda tree: one_by_one and _is_small(tree, width)):
        if small:
            calls += [_masked(tree, dtype) for tree in group]
        else:
            calls += _by_level([segment for tree in group for segment in tree.segments()], device)
    return tuple(calls)


def _is_small(tree: Tree, width: int) -> bool:
    spans = sum(segment.begin < segment.end for segment in tree.segments())
    return bool(tree.ends) and 4 * width * (tree.stop - tree.start) ** 2 < _CALL_FLOPS * spans


def _masked(tree: Tree, dtype: torch.dtype) -> MaskedCall:
    hidden = ~tree_mask(tree, None, torch.device("cpu"))
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    whole = slice(tree.start, tree.stop)
    return MaskedCall(whole, whole, mask[None, None])


def _by_level(segments: Sequence[Segment], device: torch.device) -> Iterable[Call]:
    """Each segment in itself, then all that continues a segment against it, from the roots on."""
    own = tuple(segment.end - segment.begin for segment in segments if segment.begin < segment.end)
    if not own:
        return
    whole = slice(segments[0].begin, max(segment.stop for segment in segments))
    yield Call(whole, whole, Sequences(own, own, True, None, device))
    parents = [segment for segment in segments if segment.begin < segment.end < segment.stop]
    for level in sorted({segment.depth for segment in parents}):
        at_level = [segment for segment in parents if segment.depth == level]
        for group in [[parent] for parent in at_level] if device.type in _ONE_BY_ONE else [at_level]:
            tails, heads = [(s.end, s.stop) for s in group], [(s.begin, s.end) for s in group]
            sequences = Sequences(_lengths(tails), _lengths(heads), False, None, device)
            yield Call(_where(tails, device), _where(heads, device), sequences, more=True)


def _lengths(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(end - begin for begin, end in spans)


def _where(spans: Sequence[tuple[int, int]], device: torch.device) -> Where:
    if len(spans) == 1:
        return slice(*spans[0])
    return torch.cat([torch.arange(begin, end) for begin, end in spans]).to(device)


def _windowed(trees: Sequence[Tree], window: Window, device: torch.device) -> Call:
    """All segments in one call, each on the keys before it that its window reaches, and its own."""
    path: list[int] = []
    most = max(_PIECE[0], min(_PIECE[1], window.size // 2)) if device.type in _ONE_BY_ONE else None
    lengths_q, lengths_k, columns = list[int](), list[int](), list[int]()
    segments = [segment for tree in trees for segment in tree.segments() if segment.begin < segment.end]
    for segment in segments:
        path[segment.position :] = range(segment.begin, segment.end)
        for begin, end, first in window.pieces(segment.position, len(path), most):
            lengths_q.append(end - begin)
            lengths_k.append(end - first)
            columns += path[first:end]
    rows = slice(segments[0].begin, max(segment.stop for segment in segments))
    repeated = len(set(columns)) < len(columns)
    where = torch.tensor(columns, device=device) if repeated else rows
    size = None if window.chunked else window.size
    return Call(rows, where, Sequences(tuple(lengths_q), tuple(lengths_k), True, size, device), repeated=repeated)


def tree_mask(tree: Tree, window: Window | None, device: torch.device) -> Tensor:
    """[L, L] bool: True where a token of the tree (row) attends to another (column)."""
    index = torch.arange(tree.stop - tree.start, device=device)
    position, stop = token_places([tree], device)
    mask = (index[None] <= index[:, None]) & (index[:, None] < stop[None] - tree.start)
    return mask if window is None else mask & (position[:, None] - position[None] < window.reach(position)[:, None])


def token_places(trees: Sequence[Tree], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each packed token its position, and where what continues its segment stops: it is seen from there on no more."""
    segments = [segment for tree in trees for segment in tree.segments()]
    lengths = torch.tensor([segment.end - segment.begin for segment in segments])
    first = torch.tensor([segment.position - segment.begin for segment in segments]).repeat_interleave(lengths)
    stop = torch.tensor([segment.stop for segment in segments]).repeat_interleave(lengths)
    begin = segments[0].begin if segments else 0
    return (first + torch.arange(begin, begin + len(first))).to(device), stop.to(device)
