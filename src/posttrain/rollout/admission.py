"""How far groups may be made ahead of the trainer, and which of those that are there make the next batch. Knows no clock and no disk.

Weights have the number of the batch that is made next when they arrive at the engine. While a batch is trained on the engine still
has those that it was made with: `version`, which counts the batches made, is then one ahead of them. A group is admitted, to be sampled
by weights w or later ones, while `accepted + running < (staleness + w + 1) · B`, where B is the groups of one batch and accepted and running
are counted since version 0. It is trained on in batch w + staleness at the latest: a batch takes groups in the order in which they
arrived, but waits for those whose last chance it is. So nothing is thrown away for its age. Source: AReaL, arXiv 2505.24298, which
bounds admissions alone; there a group that others overtake can become older than the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Issued(NamedTuple):
    """Prompt `number` is asked of weights `weights`, or later ones; those between the last one and it are passed over."""

    number: int
    weights: int


class Arrived(NamedTuple):
    """All completions of a group are there."""

    number: int


class Dropped(NamedTuple):
    """A group that has arrived is let go of: it leaves the count, and another one is admitted in its place."""

    number: int


class Batched(NamedTuple):
    """Groups that one batch is made of, in the order of their prompts."""

    generation: int
    numbers: tuple[int, ...]


AdmissionEvent = Issued | Arrived | Dropped | Batched


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch, what was issued, passed over and dropped since the one before it, and the number that is issued next."""

    generation: int
    numbers: tuple[int, ...]
    issued: tuple[int, ...]
    passed_over: tuple[int, ...]
    dropped: tuple[int, ...]
    next_number: int


@dataclass
class Admission:
    """A state that events move. Two that were given the same events are equal.

    Example: batch 2, staleness 1. Weights 0 have room for 4 groups. Once 0 and 2 made the first batch weights 1 have it for 2 more, and
    the second batch waits for 1 and 3, which weights 0 may have sampled, even where 4 and 5 are there.
    """

    batch: int
    staleness: int
    version: int = 0
    next_number: int = 0
    issued_at: dict[int, int] = field(default_factory=dict[int, int])
    """Weights of each group that is in no batch yet."""
    arrived: list[int] = field(default_factory=list[int])
    """Those of them that are there, in the order in which they came."""
    issued: list[int] = field(default_factory=list[int])
    passed_over: list[int] = field(default_factory=list[int])
    dropped: list[int] = field(default_factory=list[int])
    """Of these three those since the last batch."""

    @property
    def accepted(self) -> int:
        return self.version * self.batch + len(self.arrived)

    @property
    def running(self) -> int:
        return len(self.issued_at) - len(self.arrived)

    @property
    def pending(self) -> list[int]:
        """What was issued and has not arrived, in order of issue."""
        there = set(self.arrived)
        return [number for number in self.issued_at if number not in there]

    def has_room(self, weights: int) -> bool:
        """For a group that these weights may sample."""
        return self.accepted + self.running < (self.staleness + weights + 1) * self.batch

    def next_batch(self) -> Batched | None:
        """The groups of the next batch; None while it waits.

        So many of those due by batch d are taken that the rest fits into the batches until d; the others in order of arrival.
        """
        due_by = {number: weights + self.staleness for number, weights in self.issued_at.items()}
        chosen: list[int] = []
        for deadline in sorted(set(due_by.values())):
            due = {number for number, last in due_by.items() if last <= deadline}
            missing = len(due) - (deadline - self.version) * self.batch - len(due.intersection(chosen))
            ready = [number for number in self.arrived if number in due and number not in chosen]
            if missing > len(ready):
                return None
            chosen += ready[: max(0, missing)]
        rest = [number for number in self.arrived if number not in chosen]
        chosen += rest[: max(0, self.batch - len(chosen))]
        return Batched(self.version, tuple(sorted(chosen))) if len(chosen) == self.batch else None

    def apply(self, event: AdmissionEvent) -> BatchRecord | None:
        """Move on; the record of a batch that was made."""
        match event:
            case Issued(number, weights):
                assert weights <= self.version and number >= self.next_number, (event, self)
                self.passed_over += range(self.next_number, number)
                self.issued.append(number)
                self.issued_at[number] = weights
                self.next_number = number + 1
            case Arrived(number):
                assert number in self.issued_at and number not in self.arrived, (event, self)
                self.arrived.append(number)
            case Dropped(number):
                self._leave([number])
                self.dropped.append(number)
            case Batched(generation, numbers):
                assert generation == self.version, (event, self)
                self._leave(numbers)
                self.version += 1
                return self._since_last_batch(event)
        return None

    def _leave(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.arrived.remove(number)
            del self.issued_at[number]

    def _since_last_batch(self, batch: Batched) -> BatchRecord:
        since = tuple(self.issued), tuple(self.passed_over), tuple(self.dropped)
        self.issued, self.passed_over, self.dropped = [], [], []
        return BatchRecord(batch.generation, batch.numbers, *since, self.next_number)
