"""What loading gives: rendered rows, an order that is a pure function of (seed, epoch), and a summary.

Knows nothing of files or tokenizers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from posttrain.types import Origin, TokenSeq

T = TypeVar("T")
PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Rows left out for one reason, by line; `first` are up to three of them."""

    count: int
    first: tuple[str, ...]
    lines: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """What became of one source. Lengths are tokens per sequence; `notes` count what was handled specially."""

    path: str
    format: str
    rows_read: int
    rows_kept: int
    skipped: dict[str, Skipped]
    tokens: int
    loss_tokens: int
    lengths: dict[str, int]
    digest: str
    notes: dict[str, int] = field(default_factory=dict)
    weight: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Without the lines of what was skipped: they may be many."""
        record = asdict(self)
        for skipped in record["skipped"].values():
            del skipped["lines"]
        return record


@dataclass(frozen=True, slots=True)
class DataSummary:
    sources: tuple[SourceSummary, ...]
    cache: str

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def loss_tokens(self) -> int:
        return sum(source.loss_tokens for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        return {"sources": [source.to_json() for source in self.sources], "cache": self.cache}

    def lines(self) -> list[str]:
        """The summary as plain lines for a log."""
        return [line for source in self.sources for line in _source_lines(source)] + [f"cache: {self.cache}"]


@dataclass(frozen=True, slots=True)
class Dataset(Generic[T]):
    """Rows in file order, made when they are asked for; `sizes` are the rows of each source, in the order of the config, and `weights` its shares."""

    rows: Sequence[T]
    summary: DataSummary
    digest: str
    sizes: tuple[int, ...]
    weights: tuple[float | None, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[T]:
        return iter(self.rows)

    def order(self, seed: int, epoch: int, *, sequential: bool = False) -> list[int]:
        """Row indices of one epoch, which is as long as all rows: a pure function of (seed, epoch); `sequential` shuffles nothing.

        Without weights, each row once. With weights, a source without one still gives each row once, and the others
        share the rest by weight. A source's rows come in its own shuffled passes that run on over the epochs, so a small
        source repeats evenly and a large one is seen whole before any of its rows comes again.
        """
        shares = epoch_shares(self.sizes, self.weights)
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        picked: list[int] = []
        for source, (start, size, share) in enumerate(zip(starts, self.sizes, shares, strict=True)):
            if sequential:
                picked += (start + place % size for place in range(epoch * share, (epoch + 1) * share))
            else:
                picked += (start + row for row in _drawn(f"{seed}/{source}", size, epoch * share, share))
        if not sequential:
            random.Random(f"{seed}/epoch/{epoch}").shuffle(picked)
        return picked


def epoch_shares(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows per source in one epoch; they add up to all rows (largest remainders round up)."""
    shares = [size if weight is None else 0 for size, weight in zip(sizes, weights, strict=True)]
    weighted = [i for i, weight in enumerate(weights) if weight is not None and sizes[i]]
    left = sum(sizes) - sum(shares)
    total = sum(weights[i] or 0.0 for i in weighted)
    exact = {i: left * (weights[i] or 0.0) / total for i in weighted}
    for i in weighted:
        shares[i] = int(exact[i])
    for i in sorted(weighted, key=lambda i: (int(exact[i]) - exact[i], i))[: left - sum(shares[i] for i in weighted)]:
        shares[i] += 1
    return shares


def _drawn(key: str, size: int, start: int, count: int) -> Iterator[int]:
    """Elements start … start + count of the endless row of shuffled passes over range(size)."""
    done = 0
    while done < count:
        number, offset = divmod(start + done, size)
        shuffled = list(range(size))
        random.Random(f"{key}/pass/{number}").shuffle(shuffled)
        part = shuffled[offset : offset + count - done]
        yield from part
        done += len(part)


def sequences(row: Any) -> tuple[TokenSeq, ...]:
    """The rendered sequences of a row of any stage; an RL prompt is a sequence without trained tokens."""
    if isinstance(row, TokenSeq):
        return (row,)
    first, second, *_ = row
    if isinstance(second, TokenSeq):
        return (first, second)
    if isinstance(first, TokenSeq):
        return (first,)
    return (TokenSeq(second, (False,) * len(second), first.origin),)


def origin(row: Any) -> Origin:
    found = sequences(row)[0].origin
    assert found is not None, "loaded rows know where they came from"
    return found


def length_percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles p50, p90, p99 and max."""
    ordered = sorted(lengths)
    names = {100: "max"}
    return (
        {names.get(p, f"p{p}"): ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}
        if ordered
        else {}
    )


def _source_lines(source: SourceSummary) -> list[str]:
    weight = f", weight {source.weight:g}" if source.weight is not None else ""
    lengths = ", ".join(f"{name} {value:,}" for name, value in source.lengths.items())
    lines = [
        f"{source.path}: {source.format}{weight}; {source.rows_kept:,} of {source.rows_read:,} rows, "
        f"{source.tokens:,} tokens, {source.loss_tokens:,} trained; length {lengths}"
    ]
    lines += [f"  skipped {s.count:,}: {reason} ({', '.join(s.first)})" for reason, s in source.skipped.items()]
    return lines + [f"  {note}: {count:,}" for note, count in source.notes.items()]
