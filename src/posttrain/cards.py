"""Which cards of its machine each server of a run gets: pure values, read by the plan, by who refuses, and by who starts the servers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerCards:
    """Colocated, servers are on the cards of the `trainers` processes of their machine; split, on those after them.

    Two trainers and two servers over two cards each, split: trainers have 0 and 1, servers (2, 3) and (4, 5).
    """

    is_split: bool
    trainers: int
    replicas: int
    tensor_parallel_size: int

    @property
    def taken(self) -> int:
        """Cards that are kept from the trainers."""
        return self.replicas * self.tensor_parallel_size if self.is_split else 0

    def lack(self, cards: int) -> str:
        """Why a machine of so many cards has no place for them; "" where it has."""
        size = self.tensor_parallel_size
        if size > cards:
            return f"rollout.tensor_parallel_size: {size} on a machine of {cards} cards; a server of vLLM is on one machine: set {cards} or less"
        if not self.is_split or self.trainers + self.taken <= cards:
            return ""
        over = f"over {size} cards" if size > 1 else "on a card"
        each = f"{self.replicas} servers {over} each" if self.replicas > 1 else f"a server {over}"
        less = self.trainers + size <= cards and self.replicas > 1
        fewer = f"rollout.replicas: {(cards - self.trainers) // size}" if less else "fewer training processes"
        return (
            f"rollout.placement: split with {each} beside {self.trainers} for training needs {self.trainers + self.taken} cards, and {cards} are "
            f"seen here; set {fewer}, or placement: colocated"
        )

    def of(self, replica: int, cards: int) -> tuple[int, ...]:
        """The cards of a server, counted as the machine does; () without any. They must suffice (`lack`)."""
        size = self.tensor_parallel_size
        if not cards:
            return ()
        start = self.trainers + replica * size if self.is_split else replica % self._places(cards) * size
        return tuple(range(start, start + size))

    def on_one_card(self, cards: int) -> int:
        """Servers on the fullest card."""
        return 1 if self.is_split else -(-self.replicas // self._places(cards))

    def _places(self, cards: int) -> int:
        """For a server on the trainers' cards, or on the first ones where it is over more than those."""
        return min(max(self.trainers, self.tensor_parallel_size), cards) // self.tensor_parallel_size


def visible_cards(environ: Mapping[str, str], count: int) -> tuple[str, ...]:
    """The `count` cards that a process sees, as `CUDA_VISIBLE_DEVICES` names them: numbers, or a card's own name."""
    said = environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(map(str, range(count))) if said is None else tuple(part.strip() for part in said.split(","))[:count]
