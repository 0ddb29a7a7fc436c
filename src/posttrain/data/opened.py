"""A source of rows that is open: read as often as it is asked for, whole or part by part, and the same each time or refused.

Knows nothing of what the columns mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.config.datasets import DatasetKeys
from posttrain.data.fetch import needs_fetching
from posttrain.data.sources import (
    BLANK,
    READERS,
    Source,
    SourceRow,
    an_object,
    check_columns,
    checked,
    fetched,
    hub_table,
    is_local,
    prepared,
    short_path,
)
from posttrain.errors import DataError
from posttrain.files import digest_file
from posttrain.types import Origin

ROWS_OF_PART, _CHARACTERS_OF_PART = 2048, 1 << 20


class RowPart(NamedTuple):
    """Rows that follow each other in a source, as `Source` has all of them."""

    rows: list[SourceRow]
    blank_lines: list[Origin]
    invented_nulls: int


class OpenSource:
    """`digest` is of what is read. Raises: DataError if the source is missing or cannot be fetched."""

    def __init__(self, keys: DatasetKeys) -> None:
        self.keys = keys
        self._file = _file_of(keys) if is_local(keys.path) else None
        self._table: Any = None if self._file else hub_table(keys, streaming=False)
        self._written = self._last_written()
        self.digest = digest_file(self._file) if self._file else self._table_digest()

    def rows(self) -> Iterator[SourceRow | Origin]:
        """As they are read, `limit` at most; a blank line is its origin alone. Raises: DataError."""
        if self._file is None:
            yield from self._table_rows()
            return
        here, there = self._file, short_path(self.keys.path)
        try:
            for row in _file_rows(here, self.keys.limit):
                yield Origin(there, row.line) if isinstance(row, Origin) else (Origin(there, row[0].line), row[1])
        except DataError as error:  # of a file that was fetched, or unpacked, the name that was given
            raise DataError(str(error).replace(short_path(here), there).replace(str(here), there)) from None

    def parts(self) -> Iterator[RowPart]:
        """All rows as they are needed: so many rows or characters at once, which depends on nothing but what is read. Raises: DataError."""
        check_columns((row for row in self.rows() if not isinstance(row, Origin)), self.keys)
        rows: list[SourceRow] = []
        blank: list[Origin] = []
        size = 0
        for row in self.rows():
            if isinstance(row, Origin):
                blank.append(row)
                continue
            rows.append(row)
            size += _characters(row[1])
            if len(rows) == ROWS_OF_PART or size >= _CHARACTERS_OF_PART:
                yield self._part(rows, blank)
                rows, blank, size = [], [], 0
        if rows or blank:
            yield self._part(rows, blank)

    def refuse_changed(self) -> None:
        """Raises: DataError where the rows that were read are not those of the digest."""
        if self._last_written() != self._written:
            raise DataError(
                f"{short_path(self.keys.path)}: was written, or taken away, while it was read; start again when it stays as it is"
            )

    def _part(self, rows: list[SourceRow], blank: list[Origin]) -> RowPart:
        rows, nulls = prepared(rows, self.keys, is_first=False)
        return RowPart(rows, blank, nulls)

    def _last_written(self) -> tuple[int, ...]:
        """What changes when somebody writes the file, or takes it away."""
        try:
            stat = self._file.stat() if self._file else None
        except FileNotFoundError:
            stat = None
        return () if stat is None else (stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def _table_rows(self) -> Iterator[SourceRow]:
        table, limit = self._table, self.keys.limit
        rows = table.select(range(min(limit, len(table)))) if limit else table
        if not len(rows):
            raise DataError(f"{self.keys.path}: split {self.keys.split!r} has no rows; expected at least one")
        for number, row in enumerate(rows, start=1):
            yield Origin(self.keys.path, number), dict(row)

    def _table_digest(self) -> str:
        """Of the text of a list of the rows."""
        hasher = hashlib.sha256(b"[")
        for number, (_, row) in enumerate(self._table_rows()):
            hasher.update((", " * bool(number) + repr(row)).encode("utf-8", "surrogatepass"))
        hasher.update(b"]")
        return "sha256:" + hasher.hexdigest()


def read_rows(source: DatasetKeys) -> list[SourceRow]:
    """Raises: DataError if the source is missing, empty or malformed."""
    return read_source(source).rows


def read_source(source: DatasetKeys) -> Source:
    """Rows with renamed columns, cut to `limit`. Raises: DataError, with file and line where there is one."""
    opened = OpenSource(source)
    found = list(opened.rows())
    rows, nulls = prepared([row for row in found if not isinstance(row, Origin)], source)
    return Source(rows, tuple(row for row in found if isinstance(row, Origin)), opened.digest, nulls)


def _file_of(keys: DatasetKeys) -> Path:
    return fetched(keys.path) if needs_fetching(keys.path) else checked(keys.path)


def _file_rows(path: Path, limit: int | None) -> Iterator[SourceRow | Origin]:
    num_rows = num_blank = 0
    for origin, value in READERS[path.suffix.lower()](path):
        if value is BLANK:
            num_blank += 1
            yield origin
            continue
        yield origin, an_object(value, origin)
        num_rows += 1
        if num_rows == limit:
            break
    if not num_rows:
        raise DataError(
            f"{short_path(path)}: no rows in this file ({num_blank} blank lines); expected at least one row"
        )


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1
