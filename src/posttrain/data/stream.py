"""Rows of sources read as they are needed, from any place on; of several shares each reads rows of its own.

A place is a number of passes and of rows, so whoever goes on from it reads the same rows. Knows nothing of what columns mean.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.config.datasets import DatasetKeys
from posttrain.config.places import is_uri
from posttrain.data.fetch import name_inside, needs_fetching, stream_lines
from posttrain.data.sources import (
    BLANK,
    READERS,
    Source,
    SourceRow,
    an_object,
    checked,
    csv_rows,
    first_line,
    hub_table,
    is_local,
    json_rows,
    parquet_rows,
    prepared,
    short_path,
)
from posttrain.errors import DataError
from posttrain.files import decode_utf8, digest_json
from posttrain.types import Origin
from posttrain.uris import without_secrets

_OF_LINES = {".jsonl": json_rows, ".ndjson": json_rows, ".csv": csv_rows}
"""What is read line by line, wherever it lies."""


class RowStream:
    """The rows of `sources` that are `share`'s: every `num_shares`-th of each. Without weights source after source, else drawn by weight."""

    def __init__(self, sources: Sequence[DatasetKeys], seed: int, share: int = 0, num_shares: int = 1) -> None:
        self._sources, self._seed, self._share, self._num_shares = list(sources), seed, share, num_shares
        self.places: list[list[int]] = [[0, 0] for _ in sources]
        """Of each source how many passes are done, and how many rows of the present one were gone by."""
        self.drawn = 0
        self._open: list[Iterator[tuple[int, SourceRow | Origin]] | None] = [None for _ in sources]

    def go_to(self, places: Sequence[Sequence[int]], drawn: int) -> None:
        self.places, self.drawn = [list(place) for place in places], drawn
        self._open = [None for _ in self._sources]

    @property
    def passes(self) -> int:
        """How often every source was gone through."""
        return min(done for done, _ in self.places)

    def take(self, count: int) -> list[list[SourceRow | Origin]]:
        """The next rows, by source: `count` of all, fewer where a pass ends. A blank line is its origin alone.

        Raises: DataError, also for a source that has no row for this share.
        """
        taken: list[list[SourceRow | Origin]] = [[] for _ in self._sources]
        passes = self.passes
        while sum(map(len, taken)) < count and not (any(taken) and not self._is_drawn and self.passes > passes):
            number = self._next_source()
            row = self._next_row(number)
            if row is not None:
                taken[number].append(row)
        return taken

    @property
    def _is_drawn(self) -> bool:
        return self._sources[0].weight is not None

    def _next_source(self) -> int:
        if not self._is_drawn:
            return next(number for number, (done, _) in enumerate(self.places) if done == self.passes)
        draw = random.Random(f"{self._seed}/{self._share}/draw/{self.drawn}")
        self.drawn += 1
        return draw.choices(range(len(self._sources)), [source.weight or 0.0 for source in self._sources])[0]

    def _next_row(self, number: int) -> SourceRow | Origin | None:
        """None where a pass over the source has ended."""
        place = self.places[number]
        rows = self._open[number]
        if rows is None:
            rows = self._open[number] = self._rows(self._sources[number], place[1])
        for place[1], row in rows:
            return row
        if place[1] <= self._share:
            raise DataError(
                f"{short_path(self._sources[number].path)}: has no row for share {self._share + 1} of {self._num_shares}; expected at "
                "least one for each process; take out streaming, or name larger files"
            )
        self.places[number], self._open[number] = [place[0] + 1, 0], None
        return None

    def _rows(self, source: DatasetKeys, start: int) -> Iterator[tuple[int, SourceRow | Origin]]:
        """Rows of this share, each with how many rows have been gone by."""
        left = None if source.limit is None else max(source.limit - start, 0)
        for number, (origin, value) in enumerate(islice(open_rows(source, start), left), start=start):
            if number % self._num_shares == self._share:
                yield number + 1, origin if value is BLANK else (origin, an_object(value, origin))


def open_rows(source: DatasetKeys, start: int = 0) -> Iterator[tuple[Origin, Any]]:
    """The rows of a source from row `start` on, without loading it; a blank line counts as a row. Raises: DataError."""
    if not is_local(source.path):
        return _hub_rows(source, hub_table(source, streaming=True).skip(start), start)
    name, suffix = short_path(source.path), Path(name_inside(source.path)).suffix.lower()
    if suffix == ".json":
        raise DataError(f"{name}: streaming: true reads line by line, and a JSON list is one value; write it as JSONL")
    if not needs_fetching(source.path):
        path = checked(source.path)
        return parquet_rows(path, name, start) if suffix == ".parquet" else islice(READERS[suffix](path), start, None)
    if suffix not in _OF_LINES:
        raise DataError(
            f"{name}: streaming: true reads a file from elsewhere, or a compressed one, line by line; got {suffix or 'no ending'}, "
            f"expected one of {', '.join(_OF_LINES)}; copy it here, or write it as JSONL"
        )
    path = source.path if is_uri(source.path) else str(Path(source.path).expanduser())
    lines = (
        (number, decode_utf8(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, f"{name}:{number}"))
        for number, raw in enumerate(stream_lines(path), start=1)
    )
    return islice(_OF_LINES[suffix](lines, name), start, None)


def _hub_rows(source: DatasetKeys, table: Iterable[Any], start: int) -> Iterator[tuple[Origin, Any]]:
    number = start
    try:
        for number, row in enumerate(table, start=start + 1):
            yield Origin(source.path, number), dict(row)
    except Exception as error:  # noqa: BLE001 - the hub's client, once it reads: each format and HTTP library has errors of its own
        raise DataError(
            f"{source.path}: could not be read on behind row {number}: {without_secrets(first_line(error))}; "
            "check the network and the files, or give a local file"
        ) from None


def first_rows(source: DatasetKeys, count: int) -> Source:
    """What `read_source` gives, of the first `count` rows alone; its digest is of them. Raises: DataError."""
    found = RowStream([source.model_copy(update={"weight": None})], seed=0).take(count)[0]
    return as_source(source, found)


def as_source(source: DatasetKeys, found: Sequence[SourceRow | Origin], *, is_first: bool = True) -> Source:
    """Rows that were taken, under our names. Raises: DataError."""
    rows, nulls = prepared([row for row in found if not isinstance(row, Origin)], source, is_first=is_first)
    blank = tuple(row for row in found if isinstance(row, Origin))
    digest = digest_json([repr(row) for _, row in rows])
    return Source(rows, blank, digest, nulls)
