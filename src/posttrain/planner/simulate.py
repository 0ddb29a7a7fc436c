"""A discrete-event simulation of rollout and training: who waits for whom when answers differ in length and machines fail.

The formulas of `steptime` know means; this knows order. Time is simulated, so a day of training on thousands of devices
takes seconds. An answer's tokens come at one rate, however full its engine is.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failures:
    """Engines and trainer fail independently, each after exponential times: mean seconds between two, seconds until it is back.

    An engine's failure loses the answers that it was writing, which start again elsewhere; a trainer's loses its step.
    """

    engine_every_s: float = math.inf
    engine_back_s: float = 0.0
    trainer_every_s: float = math.inf
    trainer_back_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Setup:
    """Decode slots and their speed, the training rate, and how stale a batch may be (0: sampling and training alternate)."""

    num_slots: int
    tokens_per_slot_s: float
    train_tokens_s: float
    completions_per_step: int
    max_staleness: int = 0
    sync_s: float = 0.0
    num_engines: int = 1
    failures: Failures = Failures()


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened. Idle shares are of the whole time; staleness is in policy versions, per step; `events` were simulated."""

    total_s: float
    num_steps: int
    trainer_idle: float
    rollout_idle: float
    staleness: tuple[int, ...]
    failed: int = 0
    events: int = 0

    @property
    def step_s(self) -> float:
        return self.total_s / self.num_steps

    @property
    def advice(self) -> str:
        """Which side to give more, if either waits for more than a tenth of the time."""
        if self.trainer_idle > 0.1 and self.trainer_idle >= self.rollout_idle:
            return f"the trainer waits {self.trainer_idle:.0%} of the time: give rollout more"
        if self.rollout_idle > 0.1:
            return f"rollout waits {self.rollout_idle:.0%} of the time: give training more"
        return "balanced"


class _Breakdowns:
    """When one machine fails next; asked in the order of time."""

    def __init__(self, rng: random.Random, every_s: float, back_s: float) -> None:
        self._rng, self._every_s, self._back_s = rng, every_s, back_s
        self.next = self._after(0.0)

    def _after(self, now: float) -> float:
        return math.inf if self._every_s == math.inf else now + self._rng.expovariate(1 / self._every_s)

    def up_from(self, start: float) -> float:
        """The first moment from `start` on at which it runs: failures before it are over by then."""
        while self.next + self._back_s <= start:
            self.next = self._after(self.next + self._back_s)
        return start if start < self.next else self.next + self._back_s

    @property
    def back_at(self) -> float:
        """When it runs again after the failure that is next."""
        return self.next + self._back_s

    def fails_before(self, end: float) -> bool:
        return self.next < end


class _Engines:
    """Slots by the time at which they are free. Slot n is of engine n modulo the engines."""

    def __init__(self, setup: Setup, rng: random.Random) -> None:
        failures = setup.failures
        self._free = [(0.0, slot) for slot in range(setup.num_slots)]
        self._clocks = [
            _Breakdowns(rng, failures.engine_every_s, failures.engine_back_s) for _ in range(setup.num_engines)
        ]
        self.failed = self.events = 0

    def write(self, seconds: float, allowed: float) -> tuple[float, float]:
        """(start, end) of an answer on the slot that is free first; what a failure ends starts again on the next one."""
        while True:
            self.events += 1
            free, slot = self._free[0]
            clock = self._clocks[slot % len(self._clocks)]
            start = clock.up_from(max(free, allowed))
            if start > max(free, allowed):
                # Down: another slot may be free before this engine is back.
                heapq.heapreplace(self._free, (start, slot))
                continue
            end = start + seconds
            if not clock.fails_before(end):
                heapq.heapreplace(self._free, (end, slot))
                return start, end
            self.failed += 1
            heapq.heapreplace(self._free, (clock.back_at, slot))


def simulate(setup: Setup, lengths: Sequence[int], num_steps: int, seed: int = 0) -> Timeline:
    """Run `num_steps` steps; `lengths` are the answers' tokens, used in order and again from the start.

    A batch b may be started once version b - max_staleness exists: a batch is trained at most that many versions late.
    """
    rng = random.Random(seed)
    engines = _Engines(setup, rng)
    trainer = _Breakdowns(rng, setup.failures.trainer_every_s, setup.failures.trainer_back_s)
    version_at = [0.0]  # when policy version v was there
    busy_rollout = busy_trainer = 0.0
    failed = 0
    staleness: list[int] = []
    for batch in range(num_steps):
        allowed = version_at[max(0, batch - setup.max_staleness)]
        first_start, ready, tokens = math.inf, 0.0, 0
        for place in range(setup.completions_per_step):
            length = lengths[(batch * setup.completions_per_step + place) % len(lengths)]
            start, end = engines.write(length / setup.tokens_per_slot_s, allowed)
            first_start, ready, tokens = min(first_start, start), max(ready, end), tokens + length
            busy_rollout += end - start
        train = tokens / setup.train_tokens_s
        began = trainer.up_from(max(ready, version_at[-1]))
        while trainer.fails_before(began + train):
            failed += 1
            began = trainer.up_from(trainer.back_at)
        busy_trainer += train
        staleness.append(batch - _newest(version_at, first_start))
        version_at.append(began + train + setup.sync_s)
    total = version_at[-1]
    return Timeline(
        total, num_steps, 1 - busy_trainer / total, 1 - busy_rollout / (total * setup.num_slots), tuple(staleness),
        failed + engines.failed, engines.events + num_steps,
    )  # fmt: skip


def _newest(version_at: Sequence[float], when: float) -> int:
    """The newest version there was: that which sampled the batch."""
    return next(v for v in range(len(version_at) - 1, -1, -1) if version_at[v] <= when)


def even_total_s(setup: Setup, length: int, num_steps: int) -> float:
    """What `simulate` must give where all answers have one length, fill the slots in whole rounds, and nothing fails."""
    rounds = setup.completions_per_step / setup.num_slots
    rollout = rounds * length / setup.tokens_per_slot_s
    train = setup.completions_per_step * length / setup.train_tokens_s + setup.sync_s
    slower = rollout + train if setup.max_staleness == 0 else max(rollout, train)
    return rollout + (num_steps - 1) * slower + train
