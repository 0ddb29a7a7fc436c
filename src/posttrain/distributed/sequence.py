"""Sequence parallelism (Ulysses): a rank holds a part of a micro-batch's tokens, and in attention all tokens of a part of the heads.

Source: Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv 2309.14509; differs: parts may differ in length, so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.errors import ModelError
from posttrain.protocols import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class SequenceGroup:
    """Neighbours that go through the same micro-batches together; `place` is this rank's among them."""

    group: Any
    size: int
    place: int

    def split(self, num_tokens: int) -> UlyssesSplit:
        """A micro-batch's tokens dealt to the group, in order; models do not run without a token, so that each gets one."""
        each, more = divmod(max(num_tokens, self.size), self.size)
        return UlyssesSplit(self, tuple(each + (place < more) for place in range(self.size)), num_tokens)


@dataclass(frozen=True)
class UlyssesSplit:
    """How many tokens of a micro-batch each rank of a group holds, one after the other, with those that fill it up."""

    ranks: SequenceGroup
    lengths: tuple[int, ...]
    num_tokens: int

    def part(self, batch: Any) -> tuple[Any, Tensor]:
        """What a rank runs of the batch, and the places of the scored tokens that it predicts."""
        return batch.held(self)

    @property
    def span(self) -> tuple[int, int]:
        """The packed positions that this rank holds."""
        ends = list(accumulate(self.lengths, initial=0))
        return ends[self.ranks.place], ends[self.ranks.place + 1]

    @property
    def num_held(self) -> int:
        return sum(self.lengths)

    def to_heads(self, *heads: Tensor) -> tuple[Tensor, ...]:
        """Of this rank's tokens all heads → of all tokens this rank's heads. Shapes: each [1, H, n, D] → [1, h, N, D].

        Where there are fewer heads (of keys and values) than ranks, several ranks get the same one.
        """
        size, own = self.ranks.size, self.lengths[self.ranks.place]
        rows = [_by_rank(tensor, size) for tensor in heads]
        sent = torch.cat(rows, -1).flatten(0, 1)
        found: Any = _AllToAll.apply(sent, [own] * size, list(self.lengths), self.ranks.group)
        parts = found.split([part.shape[-1] for part in rows], -1)
        widths = [tensor.shape[-1] for tensor in heads]
        return tuple(p.unflatten(-1, (-1, width)).transpose(0, 1)[None] for p, width in zip(parts, widths, strict=True))

    def to_tokens(self, out: Tensor) -> Tensor:
        """The way back. Shapes: [1, N, h, D] → [1, n, H, D]."""
        size, own = self.ranks.size, self.lengths[self.ranks.place]
        sent = out[0].flatten(1)
        found: Any = _AllToAll.apply(sent, list(self.lengths), [own] * size, self.ranks.group)
        return found.view(size, own, *out.shape[2:]).transpose(0, 1).flatten(1, 2)[None]

    def whole(self, part: Tensor, places: Tensor, length: int) -> Tensor:
        """Rows that the ranks have at these places, of all ranks. Shape: [n, ...] → [length, ...].

        Each rank computes the same loss of the whole, so a rank's gradient is that of its own rows.
        """
        return gathered_rows(part, places, length, self.ranks.group)


def gathered_rows(part: Tensor, places: Tensor, length: int, group: Any) -> Tensor:
    """See `UlyssesSplit.whole`."""
    found: Any = _GatherRows.apply(part, places, length, group)
    return found


def _by_rank(heads: Tensor, size: int) -> Tensor:
    """[1, H, n, D] → [size, n, H / size · D]"""
    number = heads.shape[1]
    if number % size and size % number:
        raise ModelError(
            f"sharding.sp_size: {size} with {number} attention heads in a layer; expected a number that divides them"
        )
    if number < size:
        heads = heads.repeat_interleave(size // number, 1)
    return heads[0].unflatten(0, (size, -1)).transpose(1, 2).flatten(2)


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows: the first `give[0]` go to the first rank, and so on. Its backward sends gradients the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, give: Sequence[int], take: Sequence[int], group: Any) -> Tensor:
        ctx.give, ctx.take, ctx.group = give, take, group
        return _exchanged(rows, give, take, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchanged(grad, ctx.take, ctx.give, ctx.group), None, None, None


def _exchanged(rows: Tensor, give: Sequence[int], take: Sequence[int], group: Any) -> Tensor:
    found = rows.new_empty(sum(take), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), list(take), list(give), group=group)
    return found


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, places: Tensor, length: int, group: Any) -> Tensor:
        ctx.save_for_backward(places)
        found = part.new_zeros(length, *part.shape[1:])
        found[places] = part
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad[ctx.saved_tensors[0]], None, None, None


class DataRanks:
    """What a loop sees of ranks of which `size` neighbours share their sequences: such a group is one, and counts once."""

    def __init__(self, ranks: Ranks, size: int) -> None:
        self._ranks, self._size = ranks, size
        self.rank, self._place = divmod(ranks.rank, size)
        self.world_size, self.is_main = ranks.world_size // size, ranks.is_main

    def share(self, items: Sequence[T]) -> list[T]:
        return list(items[self.rank :: self.world_size])

    def among(self, items: Sequence[T], work: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
        done = self._ranks.gather(work(items[self._place :: self._size]))
        mine = done[self.rank * self._size : (self.rank + 1) * self._size]
        return [mine[number % self._size][number // self._size] for number in range(len(items))]

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather([float(value) for value in values]), strict=True)]

    def gather(self, value: T) -> list[T]:
        found: list[Any] = self._ranks.gather(None if self._place else value)
        return found[:: self._size]

    def broadcast(self, value: T) -> T:
        return self._ranks.broadcast(value)

    def barrier(self) -> None:
        self._ranks.barrier()

    def main_only(self, work: Callable[[], T]) -> T:
        return self._ranks.main_only(work)

    def each(self, work: Callable[[], T]) -> list[T]:
        return self._ranks.each(work)[:: self._size]


def data_ranks(ranks: Ranks, size: int) -> Ranks:
    """The ranks that rows are dealt to, where `size` neighbours share their sequences."""
    return ranks if size == 1 or ranks.world_size == 1 else DataRanks(ranks, size)
