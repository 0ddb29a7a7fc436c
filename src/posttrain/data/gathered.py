"""The rows of one source while they are made: what is kept, what is left out and why, and rows joined and cut."""

from __future__ import annotations

import bisect
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

from posttrain.types import Origin, TokenSeq

NOTHING_LEFT = "nothing left to train after truncation"


Out = Callable[[tuple[TokenSeq, ...], Any], None]
"""Where a row goes that is kept: its sequences, and what it is."""


@dataclass(slots=True)
class Gathered:
    """What one source gave so far. Rows go `out` as they come; what is held of them is how long they are."""

    out: Out
    seen: set[bytes] = field(default_factory=set)
    """Digests of the rows of this source and of those before it."""
    skipped: dict[str, list[Origin]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("l"))
    """Tokens of each sequence."""
    num_read: int = 0
    num_rows: int = 0
    loss_tokens: int = 0

    def skip(self, reason: str, origin: Origin) -> None:
        self.skipped.setdefault(reason, []).append(origin)

    def keep(self, seqs: tuple[TokenSeq, ...], row: Any) -> None:
        self.num_rows += 1
        self.lengths.extend(len(seq.ids) for seq in seqs)
        self.loss_tokens += sum(seq.num_loss_tokens for seq in seqs)
        self.out(seqs, row)

    def keep_blocks(self, blocks: Sequence[TokenSeq]) -> None:
        """Take what was cut, or count what trains nothing."""
        for block in blocks:
            assert block.origin is not None, "loaded rows know where they came from"
            if block.num_loss_tokens:
                self.keep((block,), block)
            else:
                self.skip(NOTHING_LEFT, block.origin)


@dataclass(slots=True)
class Joiner:
    """Cuts rows that come one after the other every `size` tokens, as `joined` does with all of them."""

    into: Gathered
    size: int
    waiting: list[TokenSeq] = field(default_factory=list)

    def add(self, seqs: tuple[TokenSeq, ...], _: Any) -> None:
        self.waiting += seqs

    def cut(self, *, is_last: bool = False) -> None:
        """Into blocks; of what came until now a last one that is not full waits for more."""
        blocks, self.waiting = joined(self.waiting, self.size), []
        if blocks and not is_last and len(blocks[-1].ids) < self.size:
            self.waiting = [blocks.pop()]
        self.into.keep_blocks(blocks)


def joined(rows: Sequence[TokenSeq], size: int) -> list[TokenSeq]:
    """The rows end to end, cut every `size` tokens; a block is of the row that it begins in."""
    ids = tuple(chain.from_iterable(row.ids for row in rows))
    mask = tuple(chain.from_iterable(row.loss_mask for row in rows))
    starts = [0, *accumulate(len(row.ids) for row in rows)]
    return [
        TokenSeq(ids[at : at + size], mask[at : at + size], rows[bisect.bisect_right(starts, at) - 1].origin)
        for at in range(0, len(ids), size)
    ]
