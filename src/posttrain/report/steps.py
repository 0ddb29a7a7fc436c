"""The logged steps of a stage, by columns: a row is made when it is asked for. Knows nothing of what the numbers mean."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

LoggedRow = Mapping[str, Any]
_MOST_TABLES = 64
"""Rows of more sets of names than these, as of a step or a sample in the name, are kept as they are."""
_TYPECODES = {float: "d", int: "q"}


class LoggedSteps(Sequence[LoggedRow]):
    """The rows of a `metrics.jsonl` as they were read, in about 8 bytes a number. Rows of the same names lie in one table."""

    def __init__(self, rows: Iterable[LoggedRow] = ()) -> None:
        tables: dict[tuple[str, ...], int] = {}
        self._tables: list[_Table] = []
        self._table_of, self._place_in = array("l"), array("l")
        self._as_read: list[LoggedRow] = []
        for row in rows:
            names = tuple(row)
            table = tables.get(names, -1)
            if table < 0 and len(tables) < _MOST_TABLES:
                table = tables[names] = len(tables)
                self._tables.append(_Table(names))
            self._table_of.append(table)
            if table < 0:
                self._place_in.append(len(self._as_read))
                self._as_read.append(row)
            else:
                self._place_in.append(self._tables[table].add(row))

    def __len__(self) -> int:
        return len(self._table_of)

    @overload
    def __getitem__(self, place: int) -> LoggedRow: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[LoggedRow]: ...
    def __getitem__(self, place: int | slice) -> LoggedRow | Sequence[LoggedRow]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        return self._row(self._table_of[place], self._place_in[place])

    def __iter__(self) -> Iterator[LoggedRow]:
        return map(self._row, self._table_of, self._place_in)

    def names(self) -> dict[str, None]:
        """All that were logged, in the order in which they first were."""
        return dict.fromkeys(name for table in self._tables for name in table.names) | dict.fromkeys(
            name for row in self._as_read for name in row
        )

    def column(self, name: str) -> Iterator[Any]:
        """Its value in each row. Raises: KeyError at one without it."""
        for table, place in zip(self._table_of, self._place_in, strict=True):
            yield self._as_read[place][name] if table < 0 else self._tables[table].value(name, place)

    def _row(self, table: int, place: int) -> LoggedRow:
        return self._as_read[place] if table < 0 else self._tables[table].row(place)


class _Table:
    """Columns of equal length: arrays where all values are floats, or integers of 8 bytes, else lists."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._number = {name: number for number, name in enumerate(names)}
        self._columns: list[array[float] | array[int] | list[Any]] | None = None
        self._types: list[type] = []

    def add(self, row: LoggedRow) -> int:
        """Its place."""
        if self._columns is None:
            self._types = [type(value) for value in row.values()]
            self._columns = [array(_TYPECODES[kind]) if kind in _TYPECODES else [] for kind in self._types]
        place = 0
        for number, value in enumerate(row.values()):
            column = self._columns[number]
            place = len(column)
            if type(value) is not self._types[number] and not isinstance(column, list):
                column = self._columns[number] = list(column)
            try:
                column.append(value)
            except OverflowError:
                self._columns[number] = [*column, value]
        return place

    def value(self, name: str, place: int) -> Any:
        assert self._columns is not None, "a row was added"
        return self._columns[self._number[name]][place]

    def row(self, place: int) -> LoggedRow:
        assert self._columns is not None, "a row was added"
        return dict(zip(self.names, [column[place] for column in self._columns], strict=True))
