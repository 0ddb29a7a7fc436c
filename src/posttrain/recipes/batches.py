"""Which rows make up which step: a pure function of (data, seed, step), so a data cursor is a step count."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from posttrain.config.stages import ExampleKeys, TrainKeys
from posttrain.data.dataset import Dataset
from posttrain.data.rows import stored_length
from posttrain.errors import DataError
from posttrain.models.batch import fill_by_tokens
from posttrain.objectives.terms import LossTerms
from posttrain.protocols import Ranks
from posttrain.recipes.balance import deal, rank_metrics
from posttrain.recipes.metrics import StepMetrics

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MicroBatch(Generic[T]):
    """Rows that go through the model together. `idle` ones keep a rank in step with the others and weigh nothing."""

    rows: list[T]
    idle: bool = False

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's share of the loss."""
        (loss * 0.0 if self.idle else loss).backward()

    def learn(self, terms: LossTerms, metrics: StepMetrics, weight: float = 1.0) -> None:
        """Add the gradient of this rank's share of the loss, `weight` times; and to `metrics` what it says."""
        self.backward(weight * terms.loss)
        self.count(terms, metrics, weight)

    def count(self, terms: LossTerms, metrics: StepMetrics, weight: float = 1.0) -> None:
        """Add to `metrics` what the loss says; nothing of idle rows."""
        if not self.idle:
            metrics.add(terms.metrics)
            metrics.add_share("loss", weight * float(terms.loss.detach()))


@dataclass(frozen=True)
class Schedule(Generic[T]):
    """The optimizer steps of a stage over `data`."""

    data: Dataset[T]
    seed: int
    micro_per_step: int
    rows_per_micro: int
    tokens_per_micro: int | None
    size: Callable[[T], int]
    packing_window: int | None = None
    num_shares: int = 1
    """Processes that a step is counted for; its rows are dealt to so many shares of nearly equal cost."""
    parts_per_micro: int = 1
    """In how many parts a micro-batch is cut, so that more processes than that have rows."""
    cost: Callable[[T], float] | None = None
    """What a row costs, against others; None deals micro-batches as they come."""
    sequential: bool = False
    """Whether rows come, and are packed, in the order of the files."""
    least_rows: int = 1
    """A last step of an epoch with fewer rows is folded into the one before it."""
    _plans: dict[int, list[list[list[int]]]] = field(default_factory=dict, repr=False, compare=False)
    _steps: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    _ends: list[int] = field(default_factory=list, repr=False, compare=False)
    """The step after each epoch's last one, as far as any step was located."""

    @classmethod
    def of(
        cls, data: Dataset[T], keys: TrainKeys, ranks: Ranks, size: Callable[[T], int],
        cost: Callable[[T], float] | None = None, least_rows: int = 1,
    ) -> Schedule[T]:  # fmt: skip
        packing = isinstance(keys, ExampleKeys) and keys.packing
        processes = ranks.world_size * keys.sharding.group_size
        micro_per_step = keys.micro_batches_per_step(processes)
        return cls(
            data=data,
            seed=keys.seed,
            sequential=keys.train_sampling_strategy == "sequential",
            micro_per_step=micro_per_step,
            rows_per_micro=keys.per_device_train_batch_size,
            tokens_per_micro=keys.per_device_train_batch_size * keys.sequence_len if packing else None,
            packing_window=keys.packing_window if isinstance(keys, ExampleKeys) else None,
            size=size,
            num_shares=keys.shares_of_step(processes),
            parts_per_micro=math.ceil(ranks.world_size / micro_per_step),
            cost=cost,
            least_rows=least_rows,
        )

    def total_steps(self, keys: TrainKeys) -> int:
        """Raises: DataError if the data makes no step."""
        if keys.max_steps > 0:
            return keys.max_steps
        whole, part = divmod(keys.num_train_epochs, 1)
        steps = sum(self.steps_in(epoch) for epoch in range(int(whole)))
        steps += math.ceil(part * self.steps_in(int(whole))) if part else 0
        if not steps:
            raise DataError(
                f"{len(self.data)} rows for {keys.num_train_epochs} epochs make no optimizer step; raise num_train_epochs"
            )
        return steps

    def steps_in(self, epoch: int) -> int:
        """Without packing every epoch has as many, so that one is planned however late the run goes on."""
        epoch = 0 if self.tokens_per_micro is None else epoch
        if epoch not in self._steps:
            self._steps[epoch] = len(self._epoch(epoch))
        return self._steps[epoch]

    def step(self, number: int) -> list[list[T]]:
        """The micro-batches of optimizer step `number`, counted from 0, over all ranks; every `num_shares`-th is one share's."""
        return [[self.data.rows[index] for index in part] for part in self._places(number)]

    def places_until(self, number: int) -> list[int]:
        """The rows that the steps before `number` train, each once, in the order in which they come."""
        seen: dict[int, None] = {}
        for step in range(number):
            seen.update(dict.fromkeys(index for part in self._places(step) for index in part))
            if len(seen) == len(self.data):
                break
        return list(seen)

    def _places(self, number: int) -> list[list[int]]:
        epoch, first = self.locate(number)
        micros = self._epoch(epoch)[first]
        if self.num_shares > 1 and self.cost is not None:
            micros = self._balanced(micros, self.cost)
        return [part for micro in micros for part in self._cut(micro)]

    def _balanced(self, micros: list[list[int]], cost: Callable[[T], float]) -> list[list[int]]:
        """The rows of a step dealt to the shares by their cost; where rows are packed, whole micro-batches."""
        costs = {index: cost(self.data.rows[index]) for micro in micros for index in micro}
        if self.tokens_per_micro is not None:
            each = math.ceil(len(micros) / self.num_shares)
            shares = deal([sum(costs[index] for index in micro) for micro in micros], self.num_shares, each)
            return in_turn([[micros[place] for place in share] for share in shares])
        rows = flat(micros)
        dealt = dealt_micros([costs[index] for index in rows], self.rows_per_micro, self.num_shares)
        return [[rows[place] for place in micro] for micro in dealt]

    def balance(self, micros: Sequence[Sequence[T]], world_size: int) -> dict[str, float]:
        """How evenly a step's micro-batches cost the ranks."""
        if world_size == 1 or self.cost is None:
            return {}
        return rank_metrics([[self.cost(row) for row in flat(micros[rank::world_size])] for rank in range(world_size)])

    def _cut(self, micro: list[int]) -> list[list[int]]:
        size = math.ceil(len(micro) / self.parts_per_micro)
        return [micro[i : i + size] for i in range(0, len(micro), size)]

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch and step within it."""
        while not self._ends or number >= self._ends[-1]:
            self._ends.append((self._ends[-1] if self._ends else 0) + self.steps_in(len(self._ends)))
        epoch = bisect.bisect_right(self._ends, number)
        return epoch, number - (self._ends[epoch - 1] if epoch else 0)

    def epoch_after(self, number: int) -> float:
        """Passes over the data once step `number` is done, as TRL logs it."""
        epoch, first = self.locate(number)
        return epoch + (first + 1) / self.steps_in(epoch)

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        """The epoch's steps, each its micro-batches as row indices; the last two epochs asked for are kept."""
        if epoch not in self._plans:
            if len(self._plans) == 2:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._steps_of(self._plan(epoch))
        return self._plans[epoch]

    def _steps_of(self, micros: list[list[int]]) -> list[list[list[int]]]:
        steps = [micros[i : i + self.micro_per_step] for i in range(0, len(micros), self.micro_per_step)]
        if len(steps) > 1 and sum(len(micro) for micro in steps[-1]) < self.least_rows:
            steps[-2:] = [steps[-2] + steps[-1]]
        return steps

    def _tokens_of(self, index: int) -> int:
        known = stored_length(self.data.rows, index)
        return self.size(self.data.rows[index]) if known is None else known

    def _plan(self, epoch: int) -> list[list[int]]:
        order = self.data.order(self.seed, epoch, sequential=self.sequential)
        if self.tokens_per_micro is None:
            return [order[i : i + self.rows_per_micro] for i in range(0, len(order), self.rows_per_micro)]
        if self.sequential:
            return fill_by_tokens(order, self._tokens_of, self.tokens_per_micro)
        window = self.packing_window or max(1, len(order))
        packed: list[list[int]] = []
        for at in range(0, len(order), window):
            bins = best_fit(order[at : at + window], self._tokens_of, self.tokens_per_micro)
            # The first bins hold the long rows and the last ones what is left over: no stretch of steps should.
            random.Random(f"{self.seed}/packing/{epoch}/{at}").shuffle(bins)
            packed += bins
        return packed


def best_fit(order: Sequence[int], size: Callable[[int], int], budget: int) -> list[list[int]]:
    """Rows in micro-batches of at most `budget` tokens: the longest first, each where it leaves least; within one, in order.

    Nothing is split or dropped; a row above the budget is alone. Source: best-fit decreasing, as in arXiv 2404.10830.
    """
    place = {index: at for at, index in enumerate(order)}
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in sorted(order, key=lambda index: (-size(index), place[index])):
        tokens = size(index)
        fit = bisect.bisect_left(room, (tokens, 0))
        if fit < len(room):
            left, number = room.pop(fit)
        else:
            left, number = budget, len(bins)
            bins.append([])
        bins[number].append(index)
        if left > tokens:
            bisect.insort(room, (left - tokens, number))
    return [sorted(rows, key=place.__getitem__) for rows in bins]


def in_turn(shares: Sequence[Sequence[T]]) -> list[T]:
    """The first of each share, then the second of each …; the shares with most come first, so that every n-th is of one share."""
    ordered = sorted(shares, key=lambda share: -len(share))
    return [share[turn] for turn in range(len(ordered[0])) for share in ordered if turn < len(share)]


def dealt_micros(costs: Sequence[float], at_once: int, num_shares: int) -> list[list[int]]:
    """The places of `costs` in micro-batches of at most `at_once`; every `num_shares`-th is one share's, all of nearly equal cost."""
    each = math.ceil(len(costs) / (num_shares * at_once)) * at_once
    shares = deal(costs, num_shares, each)
    return in_turn([[share[i : i + at_once] for i in range(0, len(share), at_once)] for share in shares])


def split_groups(groups: Sequence[Sequence[T]], at_once: int) -> list[tuple[T, ...]]:
    """Groups in parts of at most `at_once` members, in order; a group that fits stays whole."""
    return [tuple(group[i : i + at_once]) for group in groups for i in range(0, len(group), at_once)]


def fill_with_groups(parts: Sequence[tuple[T, ...]], at_once: int) -> list[list[tuple[T, ...]]]:
    """Parts of groups in micro-batches of at most `at_once` members."""
    return fill_by_tokens(parts, len, at_once)


def for_rank(micros: Sequence[list[T]], ranks: Ranks) -> list[MicroBatch[T]]:
    """This rank's micro-batches of a step. Every rank gets as many: collectives inside the model must match."""
    mine = [MicroBatch(rows) for rows in ranks.share(micros)]
    while len(mine) < math.ceil(len(micros) / ranks.world_size):
        mine.append(MicroBatch(micros[0], idle=True))
    return mine


def in_their_order(rows: Sequence[T], at_once: int, ranks: Ranks) -> Iterator[MicroBatch[T]]:
    """This rank's micro-batches of rows that are gone through once, made when it is their turn."""
    for micro in for_rank([[at] for at in range(0, len(rows), at_once)], ranks):
        (at,) = micro.rows
        yield MicroBatch(list(rows[at : at + at_once]), micro.idle)


def flat(micros: Sequence[Sequence[Any]]) -> list[Any]:
    return [row for micro in micros for row in micro]
