"""Which tokens of many sequences are one and the same: a tree of shared segments, as deep as the sequences branch.

Knows token ids and nothing else; `models/batch.py` lays the tree out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LEAST_SHARED = 64
"""Tokens from which a segment below the prefix of a family is shared: a tile of a GPU's kernels, which a shorter segment would
not fill, and on a CPU the work of a layer 90 wide that takes as long as the call which attends to it."""


@dataclass(frozen=True, slots=True)
class TrieNode:
    """Tokens `[begin, end)` of sequence `row`, which continue the node numbered `parent` (None: nothing comes before them).

    A leaf is where `row` ends; of any other node `row` is one of the sequences that share it. 1 2 3 4 5, 1 2 3 7 8 and
    1 2 3 4 6 share 1 2 3, and the first and the last of them 4 too: nodes 1 2 3, 4, 5, 6 and 7 8.
    """

    row: int
    begin: int
    end: int
    parent: int | None
    is_leaf: bool


def shared_segments(families: Sequence[Sequence[np.ndarray]], least_shared: float = LEAST_SHARED) -> list[TrieNode]:
    """The segments of families of sequences, each node before what continues it; a sequence has one leaf, which may be empty.

    What all of a family begin with is one node, however short. Other segments are shared from `least_shared` tokens on, by
    sequences of different families too. Rows are numbered through all families; siblings stand in the order of their first
    rows, so that the branches of a family of two levels stand in its own. A pure function of the ids.
    """
    trie = _Trie([ids for family in families for ids in family], least_shared)
    numbers = iter(range(len(trie.rows)))
    members = [[next(numbers) for _ in family] for family in families]
    for united in _united(trie, members):
        trie.add(united)
    return trie.nodes


def _united(trie: _Trie, families: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Families together of which any two sequences share enough, each such set at the place of its first."""
    if len(families) == 1 or trie.least_shared == math.inf:
        return [[family] for family in families]
    family_of = [number for number, family in enumerate(families) for _ in family]
    leader = list(range(len(families)))

    def first(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    order = trie.sorted(range(len(trie.rows)))
    for before, after in pairwise(order):
        a, b = sorted((first(family_of[before]), first(family_of[after])))
        if a != b and trie.alike(before, after) >= trie.least_shared:
            leader[b] = a
    sets: dict[int, list[Sequence[int]]] = {}
    for number, family in enumerate(families):
        sets.setdefault(first(number), []).append(family)
    return list(sets.values())


class _Trie:
    def __init__(self, rows: Sequence[np.ndarray], least_shared: float) -> None:
        self.rows, self.least_shared = rows, least_shared
        self.nodes: list[TrieNode] = []
        # Bytes that sort as the ids do, with what continues a sequence behind it.
        self._keys = [ids.astype(">i4").tobytes() for ids in rows]

    def sorted(self, rows: Iterable[int]) -> list[int]:
        return sorted(rows, key=lambda row: self._keys[row])

    def alike(self, a: int, b: int) -> int:
        """With how many of the same tokens two rows begin."""
        size = min(len(self.rows[a]), len(self.rows[b]))
        different = self.rows[a][:size] != self.rows[b][:size]
        return int(different.argmax()) if different.any() else size

    def add(self, families: Sequence[Sequence[int]]) -> None:
        order = self.sorted(row for family in families for row in family)
        shared = [self.alike(a, b) for a, b in pairwise(order)]
        place = {row: at for at, row in enumerate(order)}
        prefix = [0] * len(shared)
        """Between neighbours in that order: the longest prefix of a family that both of them begin with."""
        for family in families:
            places = sorted(place[row] for row in family)
            if len(places) > 1:
                common = min(shared[places[0] : places[-1]])
                for at in range(places[0], places[-1]):
                    prefix[at] = max(prefix[at], common)
        self._grow(order, shared, prefix, 0, None)

    def _grow(
        self, order: Sequence[int], shared: Sequence[int], prefix: Sequence[int], begin: int, parent: int | None
    ) -> None:
        """The nodes of sorted rows that agree in their first `begin` tokens, from there on."""
        apart = [
            at for at, both in enumerate(shared, 1) if both < begin + self.least_shared and prefix[at - 1] <= begin
        ]
        groups = pairwise([0, *apart, len(order)])
        for low, high in sorted(groups, key=lambda group: min(order[group[0] : group[1]])):
            if high - low == 1:
                self.nodes.append(TrieNode(order[low], begin, len(self.rows[order[low]]), parent, True))
                continue
            end = min(shared[low : high - 1])
            self.nodes.append(TrieNode(order[low], begin, end, parent, False))
            inner = slice(low, high - 1)
            self._grow(order[low:high], shared[inner], prefix[inner], end, len(self.nodes) - 1)
