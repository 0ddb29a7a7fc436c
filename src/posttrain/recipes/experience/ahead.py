"""Groups made ahead of the trainer, at most `rollout.max_staleness` batches: threads sample and score while it trains.

All that decides what is trained on goes through the ledger; the threads only ask, and say what arrived.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from posttrain.config.rl import RewardedKeys
from posttrain.errors import CheckpointError
from posttrain.health.controls import Controls
from posttrain.protocols import Engine, Ranks
from posttrain.recipes.experience.alternating import batches_skipped
from posttrain.recipes.experience.engines import sampling_params
from posttrain.recipes.experience.ledger import Beginning, Ledger, Rollouts, staleness
from posttrain.recipes.experience.prompts import PromptStream
from posttrain.recipes.experience.reward_range import stated_bounds
from posttrain.recipes.experience.sampled import Numbered, Sampled, has_spread
from posttrain.rewards.workers import MAX_UNSCORED, refuse_unscored
from posttrain.rollout.admission import Arrived, Batched, BatchRecord, Dropped, Issued
from posttrain.rollout.collect import ScoreRewards, groups_as_they_end, score_groups
from posttrain.rollout.experience import Experience
from posttrain.rollout.interrupt import InterruptedEngine
from posttrain.rollout.replicas import Replicas
from posttrain.types import Decode, RolloutGroup

_LOOK_S = 0.2
_MOST_LANES = 64


class Ahead:
    """Asks for groups as long as the bound has room, and gives them out batch by batch; goes on from `folder`.

    `resumable_from` says from which step on a start may go on. Raises, from `sampled`: what a thread met.
    """

    def __init__(
        self, keys: RewardedKeys, engine: Engine, decode: Decode, score: ScoreRewards, prompts: PromptStream, ranks: Ranks,
        folder: Path, resumable_from: Callable[[], int],
    ) -> None:  # fmt: skip
        self._keys, self._asked, self._decode, self._score = keys, engine, decode, score
        self._engine = engine.engine if isinstance(engine, InterruptedEngine) else engine
        self._prompts, self._ranks, self._folder, self._resumable_from = prompts, ranks, folder, resumable_from
        self._steps_per_batch = keys.steps_per_batch
        self._changed = threading.Condition()
        self._ledger: Ledger | None = None
        self._to_ask = deque[int]()
        self._weights = 0  # what the engine has, or older: numbered as in the ledger
        self._controls = Controls()
        self._failure: BaseException | None = None
        self._is_closing, self._scoring = False, 0
        self._lanes: list[threading.Thread] = []
        self._clock = _Clock()

    def sampled(self, generation: int, previous: Experience | None, controls: Controls) -> Sampled:
        """The groups of batch `generation`: as the ledger has it, where it was made before, else of those that arrive first."""
        ledger = self._ledger = self._ledger or self._opened(generation, previous, controls)
        metrics: dict[str, float] = {}
        if generation not in ledger.batches:
            metrics = self._make(ledger, generation, controls)
        with self._changed:
            ledger.forget(self._resumable_from() // self._steps_per_batch)
            record, rollouts = ledger.take(generation)
        return self._as_sampled(record, rollouts, previous, controls, metrics)

    def close(self) -> None:
        """Nothing is scored or written down any more. Threads that sample end with the engine, which is closed after this."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._scoring)
            if self._ledger is not None:
                self._ledger.close()

    # --- batches ---------------------------------------------------------------------------------------------------

    def _opened(self, generation: int, previous: Experience | None, controls: Controls) -> Ledger:
        keys = self._keys
        shift = batches_skipped(controls, keys) * keys.num_prompts_per_step
        first = (previous.next_prompt if previous else 0) + shift
        beginning = Beginning(
            keys.num_prompts_per_step, keys.rollout.max_staleness, controls.rollbacks, generation, first
        )
        ledger = Ledger(self._folder, beginning)
        reached = ledger.admission.version
        if generation not in ledger.batches and reached != generation:
            raise CheckpointError(
                f"{self._folder} leads to generation batch {reached}, and the run goes on with batch {generation}; the files of "
                "its batches are missing. Remove the folder to go on from the checkpoint with new groups"
            )
        return ledger

    def _make(self, ledger: Ledger, generation: int, controls: Controls) -> dict[str, float]:
        """Wait for a batch and put it on record; what the waiting took, as metrics."""
        with self._changed:
            assert ledger.admission.version == generation, (ledger.admission.version, generation)
            self._controls, self._weights = controls, generation
            if not self._lanes:
                # What was asked before a restart and had not arrived.
                self._to_ask.extend(ledger.admission.pending)
            self._admit(ledger)
        self._start_lanes()
        began = time.monotonic()
        batch = self._awaited(ledger)
        waited = time.monotonic() - began
        with self._changed:
            ledger.write(batch)
            state = ledger.admission
            depths = {"sampling/queue_depth": float(len(state.arrived)), "sampling/under_way": float(state.running)}
            return depths | self._clock.idle(waited)

    def _awaited(self, ledger: Ledger) -> Batched:
        while True:
            with self._changed:
                if self._failure is not None:
                    raise self._failure
                batch = ledger.admission.next_batch()
                if batch is not None:
                    return batch
                self._changed.wait(_LOOK_S)
            if isinstance(self._engine, Replicas):
                # The weights stand still while the trainer waits.
                self._engine.revive()

    def _as_sampled(
        self, record: BatchRecord, rollouts: dict[int, Rollouts], previous: Experience | None, controls: Controls,
        metrics: dict[str, float],
    ) -> Sampled:  # fmt: skip
        keys = self._keys
        groups = {number: self._group(number, found) for number, found in rollouts.items()}
        bounds = previous.reward_bounds if previous else stated_bounds(keys.reward_funcs)
        of_tokens = [
            age
            for number in record.numbers
            for age in staleness(rollouts[number], record.generation, self._steps_per_batch)
        ]
        sampled = Sampled(
            reward_bounds=bounds,
            kept=[(number, groups[number]) for number in record.numbers],
            let_go=[(number, groups[number]) for number in record.dropped],
            metrics=metrics | staleness_metrics(of_tokens, keys.rollout.max_staleness),
            issued=list(record.issued),
            passed_over=list(record.passed_over),
            rounds=1 + -(-len(record.dropped) // keys.num_prompts_per_step),
            next_prompt=record.next_number - batches_skipped(controls, keys) * keys.num_prompts_per_step,
        )
        self._refuse_unscored(sampled.kept)
        sampled.judge(bounds, keys, self._ranks)
        self._prompts.learn_from(sampled.of_this_rank, self._ranks)
        sampled.metrics |= self._prompts.metrics()
        return sampled

    def _group(self, number: int, rollouts: Rollouts) -> RolloutGroup:
        prompt, ids = self._prompts(number)
        return RolloutGroup(prompt, ids, rollouts)

    def _refuse_unscored(self, kept: Sequence[Numbered]) -> None:
        """Raises: RewardError; of a single group one completion may be a large share."""
        all_of_them = list(chain.from_iterable(group.rollouts for _, group in kept))
        errors = [r.reward.error or "every reward returned None" for r in all_of_them if r.status == "unscored"]
        refuse_unscored(errors, len(all_of_them), MAX_UNSCORED)

    # --- threads ---------------------------------------------------------------------------------------------------

    def _admit(self, ledger: Ledger) -> None:
        """Ask for as many groups as there is room for."""
        while ledger.admission.has_room(self._weights):
            (number,), _ = self._prompts.next(ledger.admission.next_number, 1, resample=self._controls.resample)
            ledger.write(Issued(number, self._weights))
            self._to_ask.append(number)
        self._changed.notify_all()

    def _start_lanes(self) -> None:
        if self._lanes:
            return
        lanes, at_once = self._sizes()
        for number in range(lanes):
            lane = threading.Thread(target=self._lane, args=(at_once,), daemon=True, name=f"rollouts-{number}")
            self._lanes.append(lane)
            lane.start()

    def _sizes(self) -> tuple[int, int]:
        """Threads, and groups that each asks for at once.

        An engine in this process takes what it is given together, and an update waits for it: a batch at most. Servers are
        given groups one by one, so that one that ends makes room for the next.
        """
        keys = self._keys
        num_groups = max(1, keys.rollout_batch_size // keys.num_generations)
        if not isinstance(self._engine, Replicas):
            return 1, min(num_groups, keys.num_prompts_per_step)
        most = (keys.rollout.max_staleness + 1) * keys.num_prompts_per_step
        wanted = min(2 * num_groups * keys.rollout.replicas, most)
        lanes = min(wanted, _MOST_LANES)
        return lanes, -(-wanted // lanes)

    def _lane(self, at_once: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._to_ask)
                if self._is_closing or self._failure is not None:
                    return
                numbers = [self._to_ask.popleft() for _ in range(min(at_once, len(self._to_ask)))]
                controls = self._controls
            try:
                with self._clock.sampling(self._changed):
                    self._ask(numbers, controls)
            except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for a batch
                with self._changed:
                    self._failure = self._failure or error
                    self._changed.notify_all()
                return

    def _ask(self, numbers: Sequence[int], controls: Controls) -> None:
        """Sample and score groups; the seed is that of a prompt's number, whenever and of whichever engine it is asked."""
        keys = self._keys
        rows = [self._prompts(number) for number in numbers]
        found = groups_as_they_end(
            self._asked, rows, keys.num_generations * controls.group_scale, sampling_params(keys),
            (controls.seed(keys.seed),), numbers,
        )  # fmt: skip
        # An error is kept until it is raised, and with it this frame: the engine would never be given back.
        with closing(found):
            for place, completions in found:
                with self._unless_closed() as is_closed:
                    if is_closed:
                        return
                    (group,) = score_groups([rows[place]], [completions], self._decode, self._score)
                    with self._changed:
                        self._arrived(numbers[place], group)

    @contextmanager
    def _unless_closed(self) -> Iterator[bool]:
        """Whether it is closed; if not, `close` waits."""
        with self._changed:
            is_closed = self._is_closing
            self._scoring += 1
        try:
            yield is_closed
        finally:
            with self._changed:
                self._scoring -= 1
                self._changed.notify_all()

    def _arrived(self, number: int, group: RolloutGroup) -> None:
        """On record; one without a difference in reward is replaced, so many times a batch."""
        ledger, keys = self._ledger, self._keys
        assert ledger is not None
        ages = staleness(group.rollouts, ledger.admission.issued_at[number], self._steps_per_batch)
        assert max(ages, default=0.0) <= 0.0, f"prompt {number}: sampled by older weights than it was asked of"
        ledger.write(Arrived(number), group.rollouts)
        most = (keys.dynamic_sampling_max_rounds - 1) * keys.num_prompts_per_step
        if keys.dynamic_sampling and not has_spread(group) and len(ledger.admission.dropped) < most:
            ledger.write(Dropped(number))
            self._admit(ledger)
        self._changed.notify_all()


class _Clock:
    """How long trainer and engine waited for each other since the last batch."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._busy_s, self._active, self._busy_from = 0.0, 0, 0.0

    @contextmanager
    def sampling(self, changed: threading.Condition) -> Iterator[None]:
        """The engine has something to do meanwhile."""
        self._count(changed, 1)
        try:
            yield
        finally:
            self._count(changed, -1)

    def _count(self, changed: threading.Condition, change: int) -> None:
        with changed:
            self._settle()
            self._active += change

    def _settle(self) -> None:
        now = time.monotonic()
        if self._active:
            self._busy_s += now - self._busy_from
        self._busy_from = now

    def idle(self, waited_s: float) -> dict[str, float]:
        """Shares of the time since the last batch, and begin anew. Under the lock of `sampling`."""
        self._settle()
        elapsed = max(time.monotonic() - self._since, 1e-9)
        engine = 1.0 - min(1.0, self._busy_s / elapsed)
        self._since, self._busy_s = time.monotonic(), 0.0
        return {"time/trainer_idle": min(1.0, waited_s / elapsed), "time/engine_idle": engine}


def staleness_metrics(of_tokens: Sequence[float], bound: int) -> dict[str, float]:
    """Mean and largest age of the tokens of a batch, in batches, and the share of each age: weights taken in between count up."""
    ages = np.array(of_tokens or [0.0])
    shares = {f"sampling/staleness/{age}": float((np.ceil(ages) == age).mean()) for age in range(bound + 1)}
    return {"sampling/staleness/mean": float(ages.mean()), "sampling/staleness/max": float(ages.max()), **shares}
