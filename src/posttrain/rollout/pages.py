"""Which pages of the key/value cache each row's tokens are in: bookkeeping alone, no tensors and no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PAGE = 256
"""Tokens of a page; FlashAttention-2 takes multiples of this."""


@dataclass(eq=False)
class PagedPrompt:
    """A prompt's pages, in order. Of 300 tokens two: the first is shared by its rows, the second copied for each, which writes on there."""

    length: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """What a row that goes on from a prompt has to copy: the page that the prompt filled only in part."""

    source: int
    target: int


class PageTable:
    """Rows 0..R-1 are alive; a finished row is overwritten by the last one. Pages are counted, and free when nobody has them.

    `num_pages` grows when none is free; page 0 belongs to nobody: rows that only fill a bucket write there.
    """

    def __init__(self) -> None:
        self.num_pages = 1
        self.rows: list[list[int]] = []
        self.lengths: list[int] = []
        self._users = [1]
        self._free: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def add_prompt(self, length: int) -> PagedPrompt:
        return PagedPrompt(length, tuple(self._take(-(-length // PAGE))))

    def drop_prompt(self, pages: Sequence[int]) -> None:
        self._release(pages)

    def add_row(self, prompt: PagedPrompt) -> Copy | None:
        whole = prompt.length // PAGE
        shared = list(prompt.pages[:whole])
        for page in shared:
            self._users[page] += 1
        own = self._take(len(prompt.pages) - whole)
        self.rows.append(shared + own)
        self.lengths.append(prompt.length)
        return Copy(prompt.pages[whole], own[0]) if own else None

    def drop_row(self, row: int) -> None:
        self._release(self.rows[row])
        self.rows[row], self.lengths[row] = self.rows[-1], self.lengths[-1]
        self.rows.pop()
        self.lengths.pop()

    def advance(self) -> bool:
        """Every row gets a token; whether a row got a page for it."""
        grown = [row for row, length in enumerate(self.lengths) if length == len(self.rows[row]) * PAGE]
        for row in grown:
            self.rows[row] += self._take(1)
        self.lengths = [length + 1 for length in self.lengths]
        return bool(grown)

    def place(self, pages: Sequence[int], position: int) -> int:
        """Where the token at a position is in the whole cache."""
        return pages[position // PAGE] * PAGE + position % PAGE

    def _take(self, count: int) -> list[int]:
        missing = count - len(self._free)
        if missing > 0:
            # By half, so that graphs, which know the cache's address, are seldom captured again.
            grown = max(self.num_pages + missing, self.num_pages * 3 // 2)
            self._free += range(grown - 1, self.num_pages - 1, -1)
            self._users += [0] * (grown - self.num_pages)
            self.num_pages = grown
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)
