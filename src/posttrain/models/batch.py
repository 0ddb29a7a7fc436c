"""Ragged batches: token sequences laid end to end, a common prefix stored once, no padding anywhere.

Knows nothing of losses: it says which token is where, what it attends to and which positions are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from posttrain.types import Counts, Sample, TokenSeq


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `[begin, end)` that follow one another; what continues them lies in `[end, stop)`.

    `depth`: how many segments come before it in its sequence; `position`: how many tokens.
    """

    begin: int
    end: int
    stop: int
    depth: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class Tree:
    """A prefix and the branches that continue it, as ranges of packed positions.

    The prefix is `[start, split)`; branch i is `[ends[i-1], ends[i])`, the first one beginning at `split`. Every
    token attends to its own prefix and, causally, to its own branch. A plain document is a prefix without branches.
    """

    start: int
    split: int
    ends: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        return self.ends[-1] if self.ends else self.split

    def branches(self) -> Iterable[tuple[int, int]]:
        begin = self.split
        for end in self.ends:
            yield begin, end
            begin = end

    def segments(self) -> Iterable[Segment]:
        """Prefix and branches, in packed order. Attention knows a tree by these alone, and takes them of any depth."""
        yield Segment(self.start, self.split, self.stop)
        for begin, end in self.branches():
            yield Segment(begin, end, end, depth=1, position=self.split - self.start)


@dataclass(frozen=True, slots=True)
class Layout:
    """Who attends to whom in a packed batch."""

    trees: tuple[Tree, ...]


def longest(layout: Layout) -> int:
    """Tokens of the longest sequence, its prefix included."""
    return max((s.position + s.end - s.begin for tree in layout.trees for s in tree.segments()), default=0)


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of S sequences over N packed tokens, M of them scored.

    Shapes: input_ids_N, position_ids_N; source_M indexes N: the position whose hidden state predicts target_M;
    seq_M: the sequence each scored token belongs to, tokens of a sequence contiguous and in order.
    """

    input_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    layout: Layout
    source_M: torch.Tensor
    target_M: torch.Tensor
    seq_M: torch.Tensor
    num_sequences: int

    @property
    def counts(self) -> Counts:
        return Counts(tokens=self.target_M.numel(), sequences=self.num_sequences)

    def lengths_S(self) -> torch.Tensor:
        """Scored tokens per sequence."""
        return torch.bincount(self.seq_M, minlength=self.num_sequences)

    def to(self, device: torch.device) -> Batch:
        names = ("input_ids_N", "position_ids_N", "source_M", "target_M", "seq_M")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def loss_counts(sequences: Iterable[TokenSeq]) -> Counts:
    """What a step's loss is divided by; the same tokens that `pack` scores."""
    lengths = [sequence.num_loss_tokens for sequence in sequences]
    return Counts(tokens=sum(lengths), sequences=len(lengths))


def pack(families: Sequence[Sequence[TokenSeq | Sample]]) -> Batch:
    """Lay out families of sequences (a document alone, a preference pair, the completions of one prompt).

    The longest common prefix of a family is stored and computed once. The last token of a sequence predicts nothing
    and is left out of the input.
    """
    packer = _Packer()
    for family in families:
        packer.add(family)
    return packer.batch()


def split_by_length(batch: Batch, key: Callable[[int], Hashable]) -> list[tuple[Batch, torch.Tensor | None]]:
    """The sequences of a batch apart by `key(inputs of the sequence)`, each part with the places of its scored tokens.

    A prefix goes with each part that continues it. One part is the batch itself, and None stands for all its places.
    """
    chosen: dict[Hashable, list[tuple[Tree, tuple[int, int], int]]] = {}
    number = 0
    for tree in batch.layout.trees:
        for begin, end in list(tree.branches()) or [(tree.split, tree.split)]:
            length = tree.split - tree.start + end - begin
            chosen.setdefault(key(length), []).append((tree, (begin, end), number))
            number += 1
    if len(chosen) <= 1:
        return [(batch, None)]
    return [_part(batch, members) for members in chosen.values()]


def _part(batch: Batch, members: Sequence[tuple[Tree, tuple[int, int], int]]) -> tuple[Batch, torch.Tensor]:
    """The batch of some of the sequences, given as tree, branch and number."""
    device = batch.input_ids_N.device
    taken: list[int] = []
    trees: list[Tree] = []
    for tree, group in groupby(members, key=lambda member: member[0]):
        start = len(taken)
        taken += range(tree.start, tree.split)
        split, ends = len(taken), list[int]()
        for _, (begin, end), _ in group:
            taken += range(begin, end)
            ends.append(len(taken))
        trees.append(Tree(start, split, tuple(ends) if tree.ends else ()))
    numbers = torch.tensor([number for _, _, number in members], device=device)
    places = torch.isin(batch.seq_M, numbers).nonzero()[:, 0]
    taken_N = torch.tensor(taken, dtype=torch.long, device=device)
    where = torch.zeros(batch.input_ids_N.numel(), dtype=torch.long, device=device)
    where[taken_N] = torch.arange(len(taken), device=device)
    part = Batch(
        batch.input_ids_N[taken_N], batch.position_ids_N[taken_N], Layout(tuple(trees)), where[batch.source_M[places]],
        batch.target_M[places], torch.searchsorted(numbers, batch.seq_M[places]), len(members),
    )  # fmt: skip
    return part, places


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    # The least and the greatest differ as early as any two do.
    shortest, longest = min(map(tuple, sequences)), max(map(tuple, sequences))
    length = min(len(shortest), len(longest))
    for index in range(length):
        if shortest[index] != longest[index]:
            return index
    return length


def _listed(values: Sequence[int] | np.ndarray) -> Sequence[int]:
    return values.tolist() if isinstance(values, np.ndarray) else values


class _Packer:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.trees: list[Tree] = []
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.owners: list[int] = []
        self.num_sequences = 0

    def add(self, family: Sequence[TokenSeq | Sample]) -> None:
        inputs = [_listed(sequence.ids)[:-1] for sequence in family]
        shared = common_prefix(inputs) if len(family) > 1 else 0
        if shared == 0:
            for sequence, ids in zip(family, inputs, strict=True):
                self._add_document(sequence, ids)
            return
        start = len(self.ids)
        self._extend(inputs[0][:shared], first_position=0)
        ends: list[int] = []
        for sequence, ids in zip(family, inputs, strict=True):
            begin = len(self.ids)
            self._extend(ids[shared:], first_position=shared)
            ends.append(len(self.ids))
            self._score(sequence, lambda t, begin=begin: start + t if t < shared else begin + t - shared)
        self.trees.append(Tree(start, start + shared, tuple(ends)))

    def _add_document(self, sequence: TokenSeq | Sample, ids: Sequence[int]) -> None:
        start = len(self.ids)
        self._extend(ids, first_position=0)
        self._score(sequence, lambda t: start + t)
        self.trees.append(Tree(start, len(self.ids)))

    def _extend(self, ids: Sequence[int], first_position: int) -> None:
        self.ids.extend(ids)
        self.positions.extend(range(first_position, first_position + len(ids)))

    def _score(self, sequence: TokenSeq | Sample, place) -> None:
        """Register the trained tokens; `place(t)` is the packed position of token t."""
        for t, (token, trained) in enumerate(zip(_listed(sequence.ids), _listed(sequence.loss_mask), strict=True)):
            if trained and t > 0:
                self.sources.append(place(t - 1))
                self.targets.append(token)
                self.owners.append(self.num_sequences)
        self.num_sequences += 1

    def batch(self) -> Batch:
        return Batch(
            input_ids_N=torch.tensor(self.ids, dtype=torch.long),
            position_ids_N=torch.tensor(self.positions, dtype=torch.long),
            layout=Layout(tuple(self.trees)),
            source_M=torch.tensor(self.sources, dtype=torch.long),
            target_M=torch.tensor(self.targets, dtype=torch.long),
            seq_M=torch.tensor(self.owners, dtype=torch.long),
            num_sequences=self.num_sequences,
        )
