"""Rows that are made when they are asked for: what is held of a set is where each row begins, not its tokens."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import eq
from typing import Any, TypeVar, overload

from posttrain.data.cache import Cached
from posttrain.types import Origin, TokenSeq

T = TypeVar("T")
Restore = Callable[[tuple[TokenSeq, ...], Any, Origin], T]
"""The sequences of a row, its JSON value and where it is from → the row."""


class LazyRows(Sequence[T]):
    """A sequence whose rows are made anew each time; a slice is a list of them."""

    @abstractmethod
    def row(self, index: int) -> T:
        """The row at a place from 0 on."""

    @abstractmethod
    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return [self.row(place) for place in places] if isinstance(places, range) else self.row(places)

    def __iter__(self) -> Iterator[T]:
        return map(self.row, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # pyright: ignore[reportAssignmentType] - as a list has none


class StoredRows(LazyRows[T]):
    """The rows of a cache entry; the first `sizes[0]` are of the file `paths[0]`, and so on."""

    def __init__(self, found: Cached, restore: Restore[T], paths: Sequence[str], sizes: Sequence[int]) -> None:
        self._found, self._restore, self._paths = found, restore, paths
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return len(self._found)

    def row(self, index: int) -> T:
        seqs = self._found.seqs(index, self._paths[bisect_right(self._ends, index)])
        origin = seqs[0].origin
        assert origin is not None, "rows of an entry know where they came from"
        return self._restore(seqs, self._found.extra(index), origin)

    def num_tokens(self, index: int) -> int:
        return self._found.num_tokens(index)


class ChosenRows(LazyRows[T]):
    """Rows of another sequence, by their places in it."""

    def __init__(self, rows: Sequence[T], places: Sequence[int]) -> None:
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    def row(self, index: int) -> T:
        return self.rows[int(self.places[index])]


class MappedRows(LazyRows[T]):
    """What `of` makes of each row of another sequence."""

    def __init__(self, rows: Sequence[Any], of: Callable[[Any], T]) -> None:
        self._rows, self._of = rows, of

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> T:
        return self._of(self._rows[index])


def stored_length(rows: Sequence[Any], index: int) -> int | None:
    """Of all sequences of a row, where that is known without making the row."""
    if isinstance(rows, ChosenRows):
        return stored_length(rows.rows, int(rows.places[index]))
    return rows.num_tokens(index) if isinstance(rows, StoredRows) else None
