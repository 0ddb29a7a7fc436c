"""The rows of one source while they are made: what is kept, what is left out and why, and rows joined and cut."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

from posttrain.types import Origin, TokenSeq

NOTHING_LEFT = "nothing left to train after truncation"


@dataclass(slots=True)
class Gathered:
    """What one source gave so far."""

    rows: list[Any] = field(default_factory=list)
    kept: list[tuple[TokenSeq, ...]] = field(default_factory=list)
    skipped: dict[str, list[Origin]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)
    """Digests of the rows of this source and of those before it."""

    def skip(self, reason: str, origin: Origin) -> None:
        self.skipped.setdefault(reason, []).append(origin)

    def keep_blocks(self, blocks: Sequence[TokenSeq]) -> None:
        """Take what was cut, or count what trains nothing."""
        for block in blocks:
            assert block.origin is not None, "loaded rows know where they came from"
            if not block.num_loss_tokens:
                self.skip(NOTHING_LEFT, block.origin)
                continue
            self.kept.append((block,))
            self.rows.append(block)


def joined(rows: Sequence[TokenSeq], size: int) -> list[TokenSeq]:
    """The rows end to end, cut every `size` tokens; a block is of the row that it begins in."""
    ids = tuple(chain.from_iterable(row.ids for row in rows))
    mask = tuple(chain.from_iterable(row.loss_mask for row in rows))
    starts = [0, *accumulate(len(row.ids) for row in rows)]
    return [
        TokenSeq(ids[at : at + size], mask[at : at + size], rows[bisect.bisect_right(starts, at) - 1].origin)
        for at in range(0, len(ids), size)
    ]
