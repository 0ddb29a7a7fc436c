"""Ragged batches: token sequences laid end to end, a common prefix stored once, no padding anywhere.

Knows nothing of losses: it says which token is where, what it attends to and which positions are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np
import torch

from posttrain.models.trie import LEAST_SHARED, TrieNode, shared_segments
from posttrain.protocols import TokenSplit
from posttrain.types import Counts, Sample, TokenSeq

T = TypeVar("T")


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
    """A prefix, branches that continue it, and branches that continue these, as ranges of packed positions.

    Segment 0 is the prefix `[start, split)`; segment i is `[ends[i-2], ends[i-1])`, the first one beginning at `split`. It
    continues segment `parents[i-1]`, which stands before it; without `parents` all continue the prefix. What continues a
    segment stands behind it without a gap. Every token attends to all that its segment continues and, causally, to its own
    segment. A plain document is a prefix without branches.

    Tree(0, 4, (7, 9, 14, 20), (0, 1, 1, 0)): a prefix of 4; a branch of 3, which branches into 2 and 5; a branch of 6.
    """

    start: int
    split: int
    ends: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        return self.ends[-1] if self.ends else self.split

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Begin and end of each segment, in packed order."""
        return list(pairwise((self.start, self.split, *self.ends)))

    def segments(self) -> list[Segment]:
        """In packed order. Attention knows a tree by these alone."""
        spans, before = self.spans, [0, *(self.parents or (0,) * len(self.ends))]
        stops = [end for _, end in spans]
        for number in range(len(spans) - 1, 0, -1):
            stops[before[number]] = max(stops[before[number]], stops[number])
        found = [Segment(self.start, self.split, stops[0])]
        for number in range(1, len(spans)):
            parent = found[before[number]]
            position = parent.position + parent.end - parent.begin
            found.append(Segment(*spans[number], stops[number], parent.depth + 1, position))
        return found

    def leaves(self) -> list[int]:
        """Numbers of the segments that sequences end with."""
        inner = set(self.parents) if self.parents else {0} if self.ends else set[int]()
        return [number for number in range(len(self.ends) + 1) if number not in inner]

    def path(self, number: int) -> list[int]:
        """Numbers of the segments that a segment continues, from the prefix on, and its own."""
        found = [number]
        while found[-1]:
            found.append(self.parents[found[-1] - 1] if self.parents else 0)
        return found[::-1]


@dataclass(frozen=True, slots=True)
class Layout:
    """Who attends to whom in a packed batch; `split`: which of its tokens are here, where other ranks hold the rest."""

    trees: tuple[Tree, ...]
    split: TokenSplit | None = None


def longest(layout: Layout) -> int:
    """Tokens of the longest sequence, its prefix included."""
    return max((s.position + s.end - s.begin for tree in layout.trees for s in tree.segments()), default=0)


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of S sequences over N packed tokens, M of them scored.

    Shapes: input_ids_N, position_ids_N; source_M indexes N: the position whose hidden state predicts target_M;
    seq_M: the sequence each scored token belongs to, tokens of a sequence contiguous and in order. `leaves`: the sequence
    that ends with each leaf of the trees, in packed order. routed_N: the experts that a sampler sent each token to, [N, layers, experts a
    token], -1 where nobody knows; None where nobody knows any.
    """

    input_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    layout: Layout
    source_M: torch.Tensor
    target_M: torch.Tensor
    seq_M: torch.Tensor
    leaves: tuple[int, ...]
    routed_N: torch.Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.leaves)

    @property
    def counts(self) -> Counts:
        return Counts(tokens=self.target_M.numel(), sequences=self.num_sequences)

    def lengths_S(self) -> torch.Tensor:
        """Scored tokens per sequence."""
        return torch.bincount(self.seq_M, minlength=self.num_sequences)

    def held(self, split: TokenSplit) -> tuple[Batch, torch.Tensor]:
        """What a rank that holds some of the tokens runs, and the places of the scored tokens that it predicts."""
        if split.num_held > len(self.input_ids_N):
            return self._filled(split.num_held).held(split)
        begin, end = split.span
        places = ((self.source_M >= begin) & (self.source_M < end)).nonzero()[:, 0]
        part = Batch(
            self.input_ids_N[begin:end], self.position_ids_N[begin:end], replace(self.layout, split=split),
            self.source_M[places] - begin, self.target_M[places], self.seq_M[places], self.leaves,
            None if self.routed_N is None else self.routed_N[begin:end],
        )  # fmt: skip
        return part, places

    def _filled(self, num_tokens: int) -> Batch:
        """With a document behind it that nothing is predicted from."""
        present = len(self.input_ids_N)
        more = torch.arange(num_tokens - present, device=self.input_ids_N.device)
        routed_N = self.routed_N
        if routed_N is not None:
            routed_N = torch.cat([routed_N, routed_N.new_full((len(more), *routed_N.shape[1:]), -1)])
        return replace(
            self, input_ids_N=torch.cat([self.input_ids_N, torch.zeros_like(more)]),
            position_ids_N=torch.cat([self.position_ids_N, more]),
            layout=replace(self.layout, trees=(*self.layout.trees, Tree(present, num_tokens))), routed_N=routed_N,
        )  # fmt: skip

    def to(self, device: torch.device) -> Batch:
        names = ["input_ids_N", "position_ids_N", "source_M", "target_M", "seq_M"]
        names += [] if self.routed_N is None else ["routed_N"]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def loss_counts(sequences: Iterable[TokenSeq]) -> Counts:
    """What a step's loss is divided by; the same tokens that `pack` scores."""
    lengths = [sequence.num_loss_tokens for sequence in sequences]
    return Counts(tokens=sum(lengths), sequences=len(lengths))


def pack(families: Sequence[Sequence[TokenSeq | Sample]], least_shared: float = LEAST_SHARED) -> Batch:
    """Lay out families of sequences (a document alone, a preference pair, the completions of one prompt).

    The longest common prefix of a family is stored and computed once, and so is what any sequences share beyond it, from
    `least_shared` tokens on; with infinity each family is a tree of two levels by itself. The last token of a sequence
    predicts nothing and is left out of the input.
    """
    sequences = [sequence for family in families for sequence in family]
    rows = iter([np.asarray(sequence.ids, dtype=np.int32)[:-1] for sequence in sequences])
    inputs = [[next(rows) for _ in family] for family in families]
    return _laid_out(sequences, [ids for family in inputs for ids in family], shared_segments(inputs, least_shared))


def _laid_out(sequences: Sequence[TokenSeq | Sample], inputs: Sequence[np.ndarray], nodes: Sequence[TrieNode]) -> Batch:
    """The batch of sequences whose inputs have these segments."""
    begins = list(accumulate((node.end - node.begin for node in nodes), initial=0))
    places: list[np.ndarray] = []
    """Of each node, where the tokens that it ends, from the first of their sequence on, are packed."""
    placed: list[np.ndarray] = [_NOTHING] * len(sequences)
    for node, (begin, end) in zip(nodes, pairwise(begins), strict=True):
        own = np.arange(begin, end)
        places.append(own if node.parent is None else np.concatenate([places[node.parent], own]))
        if node.is_leaf:
            placed[node.row] = places[-1]
    # The token behind each input, where it is trained; the first of a sequence has no input before it.
    trained = [np.flatnonzero(np.asarray(sequence.loss_mask, dtype=bool)[1:]) for sequence in sequences]
    targets = [np.asarray(sequence.ids)[1:][at] for sequence, at in zip(sequences, trained, strict=True)]
    sources = [place[at] for place, at in zip(placed, trained, strict=True)]
    return Batch(
        input_ids_N=_joined([inputs[node.row][node.begin : node.end] for node in nodes]),
        position_ids_N=_joined([np.arange(node.begin, node.end) for node in nodes]),
        layout=Layout(_trees(nodes, begins)),
        source_M=_joined(sources),
        target_M=_joined(targets),
        seq_M=torch.repeat_interleave(
            torch.arange(len(sequences)), torch.tensor([len(at) for at in trained], dtype=torch.long)
        ),
        leaves=tuple(node.row for node in nodes if node.is_leaf),
        routed_N=_routed(sequences, sources, begins[-1]),
    )


def _routed(
    sequences: Sequence[TokenSeq | Sample], sources: Sequence[np.ndarray], num_tokens: int
) -> torch.Tensor | None:
    """Of a token that sequences share, as the last of them has it."""
    known = [
        (at, sequence.routed_experts)
        for sequence, at in zip(sequences, sources, strict=True)
        if isinstance(sequence, Sample) and sequence.routed_experts is not None
    ]
    if not known:
        return None
    routed_N = np.full((num_tokens, *known[0][1].shape[1:]), -1, np.int16)
    for at, routed in known:
        routed_N[at] = routed
    return torch.from_numpy(routed_N)


_NOTHING = np.empty(0, dtype=np.int64)


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([_NOTHING, *parts]).astype(np.int64, copy=False))


def _trees(nodes: Sequence[TrieNode], begins: Sequence[int]) -> tuple[Tree, ...]:
    """The trees of nodes that are packed at `begins`, and the last one up to the last of these."""
    roots = [number for number, node in enumerate(nodes) if node.parent is None]
    trees: list[Tree] = []
    for root, following in pairwise([*roots, len(nodes)]):
        parents = [node.parent - root for node in nodes[root + 1 : following] if node.parent is not None]
        trees.append(_tree(begins[root : following + 1], parents))
    return tuple(trees)


def _tree(borders: Sequence[int], parents: Sequence[int]) -> Tree:
    """The tree of adjacent segments; one of two levels says no more than where its branches end."""
    return Tree(borders[0], borders[1], tuple(borders[2:]), tuple(parents) if any(parents) else ())


def fill_by_tokens(items: Iterable[T], tokens: Callable[[T], int], budget: int) -> list[list[T]]:
    """Items in order, a new part wherever the next one would exceed the budget; nothing is split or dropped."""
    parts: list[list[T]] = []
    used = budget + 1
    for item in items:
        size = tokens(item)
        if used + size > budget:
            parts.append([])
            used = 0
        parts[-1].append(item)
        used += size
    return parts


def split_by_length(batch: Batch, key: Callable[[int], Hashable]) -> list[tuple[Batch, torch.Tensor | None]]:
    """The sequences of a batch apart by `key(inputs of the sequence)`, each part with the places of its scored tokens.

    A shared segment goes with each part that continues it. One part is the batch itself, and None stands for all its places.
    """
    chosen: dict[Hashable, list[tuple[Tree, list[tuple[int, int]]]]] = {}
    sequences = iter(batch.leaves)
    for tree in batch.layout.trees:
        segments = tree.segments()
        mine: dict[Hashable, list[tuple[int, int]]] = {}
        for leaf in tree.leaves():
            length = segments[leaf].position + segments[leaf].end - segments[leaf].begin
            mine.setdefault(key(length), []).append((leaf, next(sequences)))
        for encoding, leaves in mine.items():
            chosen.setdefault(encoding, []).append((tree, leaves))
    if len(chosen) <= 1:
        return [(batch, None)]
    return [_part(batch, members) for members in chosen.values()]


def _part(batch: Batch, members: Sequence[tuple[Tree, Sequence[tuple[int, int]]]]) -> tuple[Batch, torch.Tensor]:
    """The batch of some of the sequences: of each tree its leaves, with the numbers of the sequences that they end."""
    device = batch.input_ids_N.device
    taken: list[int] = []
    trees: list[Tree] = []
    for tree, leaves in members:
        spans = tree.spans
        kept = sorted({number for leaf, _ in leaves for number in tree.path(leaf)})
        borders = [len(taken)]
        for begin, end in (spans[number] for number in kept):
            taken += range(begin, end)
            borders.append(len(taken))
        trees.append(_tree(borders, [kept.index(tree.path(number)[-2]) for number in kept[1:]]))
    order = [number for _, leaves in members for _, number in leaves]
    numbers = torch.tensor(sorted(order), device=device)
    places = torch.isin(batch.seq_M, numbers).nonzero()[:, 0]
    taken_N = torch.tensor(taken, dtype=torch.long, device=device)
    where = torch.zeros(batch.input_ids_N.numel(), dtype=torch.long, device=device)
    where[taken_N] = torch.arange(len(taken), device=device)
    leaves = torch.searchsorted(numbers, torch.tensor(order, device=device))
    part = Batch(
        batch.input_ids_N[taken_N], batch.position_ids_N[taken_N], Layout(tuple(trees)), where[batch.source_M[places]],
        batch.target_M[places], torch.searchsorted(numbers, batch.seq_M[places]), tuple(leaves.tolist()),
        None if batch.routed_N is None else batch.routed_N[taken_N],
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
