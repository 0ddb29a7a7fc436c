"""A discrete-event simulation of rollout and training: who waits for whom when answers differ in length.

The formulas of `steptime` know means; this knows order. Time is simulated, so a day of training takes milliseconds.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Setup:
    """Decode slots and their speed, the training rate, and how stale a batch may be (0: sampling and training alternate)."""

    num_slots: int
    tokens_per_slot_s: float
    train_tokens_s: float
    completions_per_step: int
    max_staleness: int = 0
    sync_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened. Idle shares are of the whole time; staleness is in policy versions, per step."""

    total_s: float
    num_steps: int
    trainer_idle: float
    rollout_idle: float
    staleness: tuple[int, ...]

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


def simulate(setup: Setup, lengths: Sequence[int], num_steps: int) -> Timeline:
    """Run `num_steps` steps; `lengths` are the answers' tokens, used in order and again from the start.

    A batch b may be started once version b - max_staleness exists: a batch is trained at most that many versions late.
    """
    slots = [0.0] * setup.num_slots  # when each slot is free
    version_at = [0.0]  # when policy version v was there
    busy_rollout = busy_trainer = 0.0
    staleness: list[int] = []
    for batch in range(num_steps):
        allowed = version_at[max(0, batch - setup.max_staleness)]
        first_start, ready, tokens = math.inf, 0.0, 0
        for place in range(setup.completions_per_step):
            length = lengths[(batch * setup.completions_per_step + place) % len(lengths)]
            start = max(heapq.heappop(slots), allowed)
            seconds = length / setup.tokens_per_slot_s
            heapq.heappush(slots, start + seconds)
            first_start, ready, tokens = min(first_start, start), max(ready, start + seconds), tokens + length
            busy_rollout += seconds
        began = max(ready, version_at[-1])
        train = tokens / setup.train_tokens_s
        busy_trainer += train
        # The version that sampled the batch is the newest one there was when its first answer began.
        sampled_by = max(v for v, at in enumerate(version_at) if at <= first_start)
        staleness.append(batch - sampled_by)
        version_at.append(began + train + setup.sync_s)
    total = version_at[-1]
    return Timeline(
        total, num_steps, 1 - busy_trainer / total, 1 - busy_rollout / (total * setup.num_slots), tuple(staleness)
    )


def lognormal_lengths(mean: float, spread: float, longest: int, count: int, seed: int = 0) -> list[int]:
    """Answer lengths with a heavy tail: `spread` is the standard deviation of the logarithm; cut at `longest`."""
    draw = random.Random(seed)
    centre = math.log(mean) - spread**2 / 2
    return [max(1, min(longest, round(draw.lognormvariate(centre, spread)))) for _ in range(count)]
