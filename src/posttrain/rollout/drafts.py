"""What a completion may go on with, guessed from those of the same prompt: drafts, which the model then verifies in one pass.

A wrong guess costs time and changes nothing. Knows ids and counts, no model and no clock. Source: the drafts are those of
SuffixDecoding (arXiv 2411.04975), from a tree for each prompt; the random numbers that a token is drawn with are those of plain sampling.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

_CONTEXT = 2
"""Tokens after which a completion that nobody began so goes on as another did after them, or itself before."""
_DOUBT = 0.5
"""Completions that went on otherwise, added to those that were seen."""
_PASS_TOKENS = 128
"""What a CPU could verify in the time that a pass costs beside its tokens: an estimate, and no clock."""
_REMEMBERED = 4096
"""Drafted tokens after which those of before count half."""
_TREE_TOKENS = 1 << 18
"""Of the completions in all trees of a call, up to 0.7 kB each."""

AdapterPrompt = tuple[str | None, tuple[int, ...]]


@dataclass(eq=False, slots=True)
class _Node:
    """What followed: token → how often, and where that leads."""

    counts: dict[int, int] = field(default_factory=dict)
    next: dict[int, _Node] = field(default_factory=dict)


class DraftTree:
    """The completions of a prompt, finished or under way: of [5, 6, 7] and [5, 6, 8, 8] the draft after [5] is [6, 8]."""

    def __init__(self) -> None:
        self.root = _Node()
        self.num_tokens = 0
        self._after: dict[tuple[int, ...], _Node] = {}
        self._finished: deque[tuple[int, ...]] = deque()

    @property
    def has_finished(self) -> bool:
        return bool(self._finished)

    def grow(self, node: _Node, ids: Sequence[int]) -> _Node:
        """One that is at `node` went on to the last of its `ids`."""
        token = ids[-1]
        self.num_tokens += 1
        node.counts[token] = node.counts.get(token, 0) + 1
        if (child := node.next.get(token)) is None:
            child = node.next[token] = _Node()
            if len(ids) >= _CONTEXT:
                self._after.setdefault(tuple(ids[-_CONTEXT:]), child)
        return child

    def add(self, ids: Sequence[int]) -> None:
        node = self.root
        for end in range(1, len(ids) + 1):
            node = self.grow(node, ids[max(0, end - _CONTEXT) : end])
        self.finish(ids)

    def finish(self, ids: Sequence[int]) -> None:
        """`ids`, to which the tree was grown, get no longer: they may be forgotten, the oldest first."""
        if ids:
            self._finished.append(tuple(ids))

    def forget_oldest(self) -> None:
        """As if the completion that finished first had never been; what others share with it stays."""
        node, ids = self.root, self._finished.popleft()
        self.num_tokens -= len(ids)
        for end, token in enumerate(ids, start=1):
            here, node = node, node.next[token]
            here.counts[token] -= 1
            if here.counts[token]:
                continue
            del here.counts[token], here.next[token]
            if self._after.get(last := ids[max(0, end - _CONTEXT) : end]) is node:
                del self._after[last]

    def draft(self, node: _Node, most: int, chance: float, least: float) -> list[int]:
        """The most frequent way on, until the chance that all of it is right falls below `least`; it begins with `chance`."""
        found = list[int]()
        while node.counts and len(found) < most:
            token = max(node.counts, key=node.counts.__getitem__)
            chance *= node.counts[token] / (sum(node.counts.values()) + _DOUBT)
            if chance < least:
                break
            found.append(token)
            node = node.next[token]
        return found

    def elsewhere(self, ids: Sequence[int]) -> _Node | None:
        """Where the same last tokens stood first."""
        return self._after.get(tuple(ids[-_CONTEXT:]))


class DraftStore:
    """Completions of earlier calls by prompt, at most `max_tokens` of both: the prompts that were asked about longest ago go first."""

    def __init__(self, max_tokens: int = 1 << 19, most_each: int = 16) -> None:
        self._max_tokens, self._most_each = max_tokens, most_each
        self._completions: OrderedDict[AdapterPrompt, list[tuple[int, ...]]] = OrderedDict()
        self.num_tokens = 0

    def of(self, prompt: AdapterPrompt) -> Sequence[tuple[int, ...]]:
        return self._completions.get(prompt, ())

    def add(self, prompt: AdapterPrompt, ids: tuple[int, ...]) -> None:
        kept = self._completions.setdefault(prompt, [])
        self._completions.move_to_end(prompt)
        if not kept:
            self.num_tokens += len(prompt[1])
        kept.append(ids)
        self.num_tokens += len(ids)
        if len(kept) > self._most_each:
            self.num_tokens -= len(kept.pop(0))
        while self.num_tokens > self._max_tokens:
            (_, ids_of_prompt), gone = self._completions.popitem(last=False)
            self.num_tokens -= len(ids_of_prompt) + sum(map(len, gone))

    def to_json(self) -> list[Any]:
        """From what goes first on."""
        return [[adapter, list(ids), list(map(list, kept))] for (adapter, ids), kept in self._completions.items()]

    def restore(self, record: Sequence[Any]) -> None:
        self._completions.clear()
        self.num_tokens = 0
        for adapter, prompt, kept in record:
            for ids in kept:
                self.add((adapter, tuple(prompt)), tuple(ids))


@dataclass
class Acceptance:
    """Drafted tokens of one source, and those of them that were right: what its drafts are worth follows from these counts alone."""

    offered: int = 16
    accepted: int = 12

    @property
    def rate(self) -> float:
        return self.accepted / self.offered

    def note(self, offered: int, accepted: int) -> None:
        self.offered += offered
        self.accepted += accepted
        if self.offered > _REMEMBERED:
            self.offered, self.accepted = self.offered // 2, self.accepted // 2


class Drafted(Protocol):
    """A row of `Decoding`, as far as it is guessed how it goes on."""

    ids: list[int]

    @property
    def drafted_for(self) -> AdapterPrompt: ...

    @property
    def num_left(self) -> int: ...


@dataclass(eq=False)
class _Cursor:
    """How far a row came in the tree of its prompt, none where the tree has no room for its last tokens, and where its last draft was from."""

    tree: DraftTree
    node: _Node | None
    seen: int = 0
    source: str = ""


class Drafter:
    """Drafts for the rows of one call. Of a row that is at token 5, after which `DraftTree` knows of [6, 8]: the draft is [6, 8].

    Its trees have `tree_tokens` together, and what a pass adds. Then the largest forgets the completion that ended first; where none has ended, what rows go on with is kept no more.
    """

    def __init__(self, known: Speculation, most: int, tree_tokens: int = _TREE_TOKENS) -> None:
        self._known, self._most, self._tree_tokens = known, most, tree_tokens
        self._trees: WeakValueDictionary[AdapterPrompt, DraftTree] = WeakValueDictionary()
        self._cursors: dict[Any, _Cursor] = {}

    def drafts(self, rows: Sequence[Drafted]) -> list[list[int]]:
        """For each row what it may go on with; nothing where nobody knows."""
        self._known.counts.rows += len(rows)
        # A token that is right saves its row a pass, of which there are as many rows to pay.
        least = len(rows) / (len(rows) + _PASS_TOKENS)
        has_room = self._make_room()
        cursors = [self._caught_up(row, has_room) for row in rows]
        return [self._draft(row, cursor, least) for row, cursor in zip(rows, cursors, strict=True)]

    def _caught_up(self, row: Drafted, has_room: bool) -> _Cursor:
        if (cursor := self._cursors.get(row)) is None:
            tree = self._tree(row.drafted_for)
            cursor = self._cursors[row] = _Cursor(tree, tree.root)
        if not has_room:
            cursor.node = None
        if cursor.node is not None:
            for end in range(cursor.seen + 1, len(row.ids) + 1):
                cursor.node = cursor.tree.grow(cursor.node, row.ids[max(0, end - _CONTEXT) : end])
            cursor.seen = len(row.ids)
        return cursor

    def _tree(self, prompt: AdapterPrompt) -> DraftTree:
        if (tree := self._trees.get(prompt)) is None:
            tree = self._trees[prompt] = DraftTree()
            for ids in self._known.store.of(prompt):
                tree.add(ids)
                self._make_room()
        return tree

    def _make_room(self) -> bool:
        """Whether there is any, once what may be forgotten is."""
        trees = list(self._trees.values())
        while sum(tree.num_tokens for tree in trees) >= self._tree_tokens:
            if not (may_forget := [tree for tree in trees if tree.has_finished]):
                return False
            max(may_forget, key=lambda tree: tree.num_tokens).forget_oldest()
        return True

    def _draft(self, row: Drafted, cursor: _Cursor, least: float) -> list[int]:
        cursor.source, node = "tree", cursor.node
        if node is None or not node.counts:
            cursor.source, node = "suffix", cursor.tree.elsewhere(row.ids)
        if node is None:
            return []
        return cursor.tree.draft(
            node, min(self._most, row.num_left - 1), self._known.sources[cursor.source].rate, least
        )

    def note(self, row: Drafted, offered: int, accepted: int) -> None:
        """What became of the row's draft."""
        if offered:
            self._known.sources[self._cursors[row].source].note(offered, accepted)
            self._known.counts.offered += offered
            self._known.counts.accepted += accepted

    def leave(self, row: Drafted, *, is_whole: bool) -> None:
        """A row that is not sampled any more; one that is whole is remembered."""
        if (cursor := self._cursors.pop(row, None)) is not None:
            cursor.tree.finish(row.ids[: cursor.seen])
        if is_whole:
            self._known.store.add(row.drafted_for, tuple(row.ids))


@dataclass
class DraftCounts:
    """Rows of all passes, tokens that were drafted for them, and those of these that were right."""

    rows: int = 0
    offered: int = 0
    accepted: int = 0


class Speculation:
    """What an engine remembers from call to call, and counts. All of it is in a checkpoint: a run that goes on drafts as it would have."""

    def __init__(self, most: int = 7) -> None:
        self.store, self._most = DraftStore(), most
        self.sources = {"tree": Acceptance(), "suffix": Acceptance()}
        self.counts = DraftCounts()

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": {name: asdict(counts) for name, counts in self.sources.items()},
            "store": self.store.to_json(),
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        self.sources.update({name: Acceptance(**counts) for name, counts in record["counts"].items()})
        self.store.restore(record["store"])

    def of_call(self) -> Drafter:
        return Drafter(self, self._most)

    def take_counts(self) -> tuple[int, int, int]:
        """Those since the last call."""
        taken, self.counts = self.counts, DraftCounts()
        return astuple(taken)


def speculation_metrics(counts: Sequence[float]) -> dict[str, float]:
    """Of `DraftCounts`, as numbers in their order."""
    rows, offered, accepted = counts
    rate = {"speculation/acceptance_rate": accepted / offered} if offered else {}
    return rate | ({"speculation/tokens_per_pass": 1 + accepted / rows} if rows else {})
