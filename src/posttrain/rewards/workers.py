"""Rewards in worker processes with deadlines: a completion that hangs or crashes a reward costs that completion only.
Those that are a model's opinion are asked in this process, where the model is, and have no deadline but their own.

A failure is *unscored*, with its reason, and never 0. Results do not depend on the number of workers, because the
completions are cut into chunks of a fixed size; a reward must score each completion by itself.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain.asked import AskedProcess, ScribbledError, wait_for
from posttrain.errors import ConfigError, RewardError
from posttrain.grading.learned import check_learned_options, split_learned
from posttrain.names import reward_names
from posttrain.rewards.learned import LearnedReward, LoadLearned
from posttrain.rewards.library import REWARDS
from posttrain.rewards.resolve import check_spec, options_by_name, reward_digest
from posttrain.types import RewardBreakdown, StepScores

CHUNK_SIZE = 16
"""Completions per call of a reward function."""
MAX_UNSCORED = 0.1
"""Share of a batch that training does without."""
TIMED_OUT = "took longer than"
_ENTRY = "posttrain.rewards.worker:main"
_SCRATCH = "posttrain-reward-"
_MAX_SENDS = 3
_MAX_HUNG = 8
"""Completions on which a reward may hang that has never answered yet."""


@dataclass(frozen=True)
class _Task:
    """One call: a function on some of the completions."""

    function: int
    items: tuple[int, ...]
    num_sends: int = 0


@dataclass
class _PoolWorker:
    """A process and the task it works on."""

    process: AskedProcess
    task: _Task | None = None

    def taken(self) -> _Task:
        """Its task, which it no longer has."""
        task, self.task = self.task, None
        assert task is not None
        return task


@dataclass
class _ScoreCall:
    """One `score` call: what is asked, and what came back per function and completion."""

    names: Sequence[str]
    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]
    values: list[list[float | None]]
    reasons: list[list[str | None]]
    max_unscored: float
    answered_before: set[int]
    counts: list[dict[str, float]]
    steps: list[dict[str, StepScores]]
    reads: Mapping[int, Mapping[str, Any]]
    queue: deque[_Task] = field(default_factory=deque)
    num_hung: Counter[int] = field(default_factory=Counter)

    def request(self, task: _Task) -> dict[str, Any]:
        items = task.items
        return {
            "function": task.function,
            "prompts": [self.prompts[i] for i in items],
            "completions": [self.completions[i] for i in items],
            "columns": {name: [column[i] for i in items] for name, column in self._columns_for(task.function).items()},
        }

    def _columns_for(self, function: int) -> Mapping[str, Sequence[Any]]:
        """Those that it takes; all where it lacks one, because the message names what there is."""
        reads = self.reads[function]
        lacks = not all(any(name in self.columns for name in group) for group in reads["needs"])
        if lacks or reads["accepts"] is None:
            return self.columns
        return {name: column for name, column in self.columns.items() if name in reads["accepts"]}

    def not_begun(self, task: _Task, reason: str) -> None:
        """Its worker was gone before it had the task: another one gets it."""
        if task.num_sends < _MAX_SENDS:
            self.queue.appendleft(replace(task, num_sends=task.num_sends + 1))
        else:
            self.failed(task, reason)

    def failed(self, task: _Task, reason: str) -> None:
        """A failed batch is retried item by item; a failed item is unscored."""
        *others, last = task.items
        if others:
            self.queue.extendleft(_Task(task.function, (item,)) for item in reversed(task.items))
        else:
            self._unscored(task.function, last, reason)
            self._give_up_if_hopeless()

    def timed_out(self, task: _Task, limit_s: float) -> None:
        """Raises: RewardError for a reward that answers nothing at all; a check of it would take hours."""
        self.failed(task, f"{TIMED_OUT} {limit_s:g} s and was killed")
        self.num_hung[task.function] += len(task.items) == 1
        if self.num_hung[task.function] >= _MAX_HUNG and task.function not in self.answered_before:
            raise RewardError(
                f"reward {self.names[task.function]!r} has not answered yet: each of {_MAX_HUNG} completions {TIMED_OUT} "
                f"{limit_s:g} s. Fix the reward, or raise reward_timeout_s if it is slow"
            )

    def ask(self, function: int, reward: LearnedReward) -> None:
        """A model's opinion of all completions at once."""
        opinions = reward.score(self.prompts, self.completions, self.columns)
        for item, opinion in enumerate(opinions):
            finite = opinion.value is None or math.isfinite(opinion.value)
            self.values[function][item] = opinion.value if finite else None
            if reason := opinion.error if finite else f"the model says {opinion.value}, which is no finite number":
                self._unscored(function, item, reason)
            if opinion.steps:
                self.steps[item][self.names[function]] = opinion.steps
            for name, count in opinion.counts.items():
                self.counts[item][f"{self.names[function]}/{name}"] = count
        self._give_up_if_hopeless()

    def _unscored(self, function: int, item: int, reason: str) -> None:
        self.reasons[function][item] = f"{self.names[function]}: {reason}"

    def _give_up_if_hopeless(self) -> None:
        """Raises: RewardError once more completions are unscored than may be; the rest could take hours to time out."""
        errors = [next(filter(None, reasons), None) for reasons in zip(*self.reasons, strict=True)]
        refuse_unscored([error for error in errors if error], len(errors), self.max_unscored, already=" already")

    def answered(self, task: _Task, answer: Mapping[str, Any]) -> None:
        if broken := answer.get("column") or answer.get("count"):
            raise RewardError(broken)
        self.answered_before.add(task.function)
        if "failed" in answer:
            self.failed(task, answer["failed"])
            return
        for item, value, reason in zip(task.items, answer["values"], answer["reasons"], strict=True):
            self.values[task.function][item] = value
            if reason is not None:
                self._unscored(task.function, item, reason)


class RewardPool:
    """Reward functions behind worker processes: `with RewardPool(specs) as pool: pool.score(...)`.

    `timeout_s` is the deadline of one completion, and of one batch call before it is retried item by item. `load` loads those that are a
    model's opinion.
    Raises: ConfigError for rewards that cannot be loaded.
    """

    def __init__(
        self,
        specs: Sequence[str],
        weights: Sequence[float] | None = None,
        kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        num_workers: int = 1,
        timeout_s: float = 10.0,
        memory_bytes: int = 8 << 30,
        *,
        folder: Path | None = None,
        hash_seed: int = 0,
        load: LoadLearned | None = None,
    ) -> None:
        self.specs, self.folder, self.timeout_s = tuple(specs), folder, timeout_s
        self.names = reward_names(specs)
        self.weights = [float(w) for w in weights] if weights is not None else [1.0] * len(specs)
        self.kwargs = options_by_name(kwargs)
        if not specs or len(self.weights) != len(specs):
            raise ConfigError(
                f"reward_weights has {len(self.weights)} entries for {len(specs)} reward_funcs; give one each"
            )
        if not all(map(math.isfinite, self.weights)):
            raise ConfigError(f"reward_weights: got {self.weights}; expected finite numbers")
        if unknown := sorted(set(self.kwargs) - set(self.names)):
            raise ConfigError(f"reward_kwargs: no reward {unknown[0]!r}; reward_funcs are {', '.join(self.names)}")
        for name, spec in zip(self.names, specs, strict=True):
            check_spec(spec, folder)
            if split_learned(spec) and name in self.kwargs:
                check_learned_options(name, spec, self.kwargs[name], folder)
        self._load, self._learned = load, dict[int, LearnedReward]()
        self.num_workers, self.memory_bytes, self._hash_seed = num_workers, memory_bytes, hash_seed
        self._workers: list[_PoolWorker] = []
        self._lock = threading.Lock()
        self._answered: set[int] = set()
        self._reads: dict[int, Mapping[str, Any]] = {}

    @property
    def digest(self) -> str:
        """Digest of the rewards, their options and weights, as the certificate is bound to."""
        return reward_digest(self.specs, self.kwargs, self.weights, self.folder)

    def twin(self, hash_seed: int) -> RewardPool:
        """The same rewards in processes whose hashes are salted otherwise, and one worker more."""
        twin = RewardPool(
            self.specs, self.weights, self.kwargs, self.num_workers + 1, self.timeout_s, self.memory_bytes,
            folder=self.folder, hash_seed=hash_seed,
        )  # fmt: skip
        twin._learned = self._learned
        return twin

    @property
    def learned(self) -> frozenset[str]:
        """Names of the rewards that are a model's opinion: there is no full mark, and one batch rounds otherwise than another."""
        return frozenset(name for name, spec in zip(self.names, self.specs, strict=True) if split_learned(spec))

    @property
    def opinions(self) -> dict[str, LearnedReward]:
        """Those of `learned` that are loaded, by name."""
        return {self.names[place]: reward for place, reward in self._learned.items()}

    @property
    def rounding(self) -> dict[str, float]:
        """How far two scores of one completion may lie apart, by reward; those that are not named give the same each time."""
        return {name: reward.rounding for name, reward in self.opinions.items()}

    def __enter__(self) -> RewardPool:
        """Load the models, start the workers and wait until each has loaded the functions. Raises: ConfigError, ModelError."""
        try:
            for place, spec in enumerate(self.specs):
                if split_learned(spec) and place not in self._learned:
                    if self._load is None:
                        raise ConfigError(f"{spec}: a model's opinion cannot be asked here; expected functions")
                    self._learned[place] = self._load(spec, self.folder, self.kwargs.get(self.names[place], {}))
            while len(self._workers) < self.num_workers * (len(self._learned) < len(self.specs)):
                self._workers.append(self._start())
            for worker in self._workers:
                self._await_ready(worker.process)  # at once for those that are
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for reward in self._learned.values() if self._load else ():
            reward.close()
        self._workers, self._learned = [], {}

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        max_unscored: float = 1.0,
        ask_models: bool = True,
    ) -> list[RewardBreakdown]:
        """One breakdown per completion, in order; without the opinions of models where they are not to be asked.

        A returned None counts as 0 in the weighted sum where another reward did score (as in TRL); a reward that *failed*
        leaves the whole completion unscored. Raises: RewardError for a wrong count or a missing column, and when more than
        the share `max_unscored` is unscored: as soon as that is known.
        """
        num, columns = len(completions), columns or {}
        for name, column in {"prompts": prompts, **columns}.items():
            assert len(column) == num, f"{name} has {len(column)} rows for {num} completions"
        call = _ScoreCall(
            self.names, prompts, completions, columns, [[None] * num for _ in self.specs], [[None] * num for _ in self.specs],
            max_unscored, self._answered, [{} for _ in range(num)], [{} for _ in range(num)], self._reads,
        )  # fmt: skip
        for start in range(0, num, CHUNK_SIZE):
            items = tuple(range(start, min(start + CHUNK_SIZE, num)))
            for function, spec in enumerate(self.specs):
                if split_learned(spec):
                    continue
                alone = spec in REWARDS and REWARDS[spec].alone
                call.queue.extend(_Task(function, part) for part in (((i,) for i in items) if alone else (items,)))
        with self._lock:
            self.__enter__()
            self._run(call)
            for function, reward in self._learned.items() if ask_models else ():
                call.ask(function, reward)
        breakdowns = [self._breakdown(call, item) for item in range(num)]
        errors = [b.error or "every reward returned None" for b in breakdowns if b.total is None]
        refuse_unscored(errors, num, max_unscored)
        return breakdowns

    # --- processes -------------------------------------------------------------------------------------------------

    def _start(self) -> _PoolWorker:
        setup = {
            "specs": list(self.specs), "kwargs": self.kwargs, "folder": str(self.folder.resolve()) if self.folder else None,
            "memory_bytes": self.memory_bytes, "timeout_s": self.timeout_s,
        }  # fmt: skip
        return _PoolWorker(AskedProcess(_ENTRY, "the reward process", _SCRATCH, setup, self._hash_seed))

    def _await_ready(self, process: AskedProcess) -> None:
        while not process.ready:
            wait_for([process])
            self._look_at_start(process)

    def _look_at_start(self, process: AskedProcess) -> None:
        """Raises: ConfigError."""
        answer = process.look_at_start("the rewards", "move slow work out of the file's top level")
        if answer is not None:
            self._reads.update({int(place): reads for place, reads in answer["reads"].items()})

    def _replace(self, worker: _PoolWorker) -> None:
        """By one that gets work when it has loaded the rewards; the others work on meanwhile."""
        worker.process.kill()
        self._workers[self._workers.index(worker)] = self._start()

    def _run(self, call: _ScoreCall) -> None:
        try:
            while call.queue or any(worker.task for worker in self._workers):
                self._hand_out(call)
                self._collect(call)
        except BaseException:
            # A worker still at this call would answer into the next one.
            for worker in [worker for worker in self._workers if worker.task is not None]:
                self._workers.remove(worker)
                worker.process.kill()
            raise

    def _hand_out(self, call: _ScoreCall) -> None:
        for worker in [worker for worker in self._workers if worker.process.ready and worker.task is None]:
            if not call.queue:
                return
            process, task = worker.process, call.queue.popleft()
            process.trim_log()
            process.start_clock(self.timeout_s)
            if process.is_idle() and process.ask(call.request(task)):
                worker.task = task
            else:
                reason = process.ended() if process.has_ended() else "the reward process does not read its requests"
                self._replace(worker)
                call.not_begun(task, reason)

    def _collect(self, call: _ScoreCall) -> None:
        """Wait for the next answer or deadline, and deal with all that have come."""
        waiting = [worker for worker in self._workers if worker.task is not None or not worker.process.ready]
        wait_for([worker.process for worker in waiting])
        for worker in waiting:
            if worker.process.ready:
                self._look_at(worker, call)
            else:
                self._look_at_start(worker.process)

    def _look_at(self, worker: _PoolWorker, call: _ScoreCall) -> None:
        late = worker.process.is_late()
        try:
            answer = worker.process.receive()  # after the look at the clock: what was given in time counts
        except EOFError:
            reason = worker.process.ended()
        except ScribbledError:
            reason = "wrote into the pipe that carries the scores; it was killed"
        else:
            if answer is not None:
                call.answered(worker.taken(), answer)
            elif late:
                task = worker.taken()
                self._replace(worker)
                call.timed_out(task, self.timeout_s)
            return
        task = worker.taken()
        self._replace(worker)
        call.failed(task, reason)

    def _breakdown(self, call: _ScoreCall, item: int) -> RewardBreakdown:
        parts = {name: call.values[f][item] for f, name in enumerate(self.names)}
        errors = [reason for reasons in call.reasons if (reason := reasons[item])]
        scored = [
            weight * value for weight, value in zip(self.weights, parts.values(), strict=True) if value is not None
        ]
        total = sum(scored) if scored and not errors else None
        return RewardBreakdown(total, parts, "; ".join(errors) or None, call.counts[item], call.steps[item])


def refuse_unscored(errors: Sequence[str], num: int, limit: float, already: str = "") -> None:
    """Raises: RewardError when more than `limit` of `num` completions are unscored, with the first reasons."""
    if len(errors) <= limit * num:
        return
    raise RewardError(
        f"{len(errors)} of {num} completions are unscored{already}; at most {limit:.0%} may be. "
        f"First reasons: {' | '.join(list(dict.fromkeys(errors))[:3])}. Fix the reward, or raise reward_timeout_s if it is slow"
    )
