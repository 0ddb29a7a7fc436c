"""Rewards in worker processes with deadlines: a completion that hangs or crashes a reward costs that completion only.

A failure is *unscored*, with its reason, and never 0. Results do not depend on the number of workers, because the
completions are cut into chunks of a fixed size; a reward must score each completion by itself.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.library import REWARDS
from posttrain.rewards.resolve import check_spec, options_by_name, reward_digest, reward_names
from posttrain.types import RewardBreakdown

CHUNK_SIZE = 16
"""Completions per call of a reward function."""
_START_TIMEOUT_S = 120.0
_MAX_LOG_BYTES = 1 << 20
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    "import sys; root = sys.argv[1]; root in sys.path or sys.path.append(root); "
    "from posttrain.rewards.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True)
class _Task:
    """One call: a function on some of the completions."""

    function: int
    items: tuple[int, ...]


class _Worker:
    """One process, its two pipes and the task it works on."""

    def __init__(self, setup: bytes, hash_seed: int) -> None:
        request_read, self.request_fd = os.pipe()
        self.answer_fd, answer_write = os.pipe()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-P", "-c", _BOOT, _PACKAGE_ROOT, str(request_read), str(answer_write)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=environment,
            pass_fds=(request_read, answer_write), start_new_session=True,
        )  # fmt: skip
        os.close(request_read)
        os.close(answer_write)
        os.set_blocking(self.request_fd, False)
        os.set_blocking(self.answer_fd, False)
        self.task: _Task | None = None
        self.ready = False
        self.buffer = b""
        self.deadline = time.monotonic() + _START_TIMEOUT_S
        self.send(setup)

    def send(self, payload: bytes) -> bool:
        """False when the process is gone or does not read before its deadline."""
        data = memoryview(struct.pack("<Q", len(payload)) + payload)
        while data:
            try:
                data = data[os.write(self.request_fd, data) :]
            except BlockingIOError:
                left = self.deadline - time.monotonic()
                if left <= 0 or not select.select([], [self.request_fd], [], left)[1]:
                    return False
            except BrokenPipeError:
                return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The answer once it is complete. Raises: EOFError when the process is gone."""
        try:
            data = os.read(self.answer_fd, 1 << 20)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        self.buffer += data
        if not self.buffer.endswith(b"\n"):
            return None
        line, self.buffer = self.buffer, b""
        return json.loads(line)

    def ended(self) -> str:
        """How the process ended, in words, with the last line it wrote."""
        code = self.process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 2000))
        lines = self.log.read().decode("utf-8", "replace").strip().splitlines()
        return f"the reward process died ({how})" + (f": {lines[-1][:200]}" if lines else "")

    def trim_log(self) -> None:
        if os.fstat(self.log.fileno()).st_size > _MAX_LOG_BYTES:
            os.ftruncate(self.log.fileno(), 0)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for descriptor in (self.request_fd, self.answer_fd):
            os.close(descriptor)
        self.log.close()


@dataclass
class _Call:
    """One `score` call: what is asked, and what came back per function and completion."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]
    values: list[list[float | None]]
    reasons: list[list[str | None]]
    queue: deque[_Task] = field(default_factory=deque)

    def payload(self, task: _Task) -> bytes:
        items = task.items
        request = {
            "function": task.function,
            "prompts": [self.prompts[i] for i in items],
            "completions": [self.completions[i] for i in items],
            "columns": {name: [column[i] for i in items] for name, column in self.columns.items()},
        }
        return pickle.dumps(request)

    def failed(self, task: _Task, reason: str) -> None:
        """A failed batch is retried item by item; a failed item is unscored."""
        *others, last = task.items
        if others:
            self.queue.extendleft(_Task(task.function, (item,)) for item in reversed(task.items))
        else:
            self.reasons[task.function][last] = reason

    def answered(self, task: _Task, answer: Mapping[str, Any]) -> None:
        if broken := answer.get("column") or answer.get("count"):
            raise RewardError(broken)
        if "failed" in answer:
            self.failed(task, answer["failed"])
            return
        for item, value, reason in zip(task.items, answer["values"], answer["reasons"], strict=True):
            self.values[task.function][item] = value
            self.reasons[task.function][item] = reason


class RewardPool:
    """Reward functions behind worker processes: `with RewardPool(specs) as pool: pool.score(...)`.

    `timeout_s` is the deadline of one completion, and of one batch call before it is retried item by item.
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
    ) -> None:
        self.specs, self.folder, self.timeout_s = tuple(specs), folder, timeout_s
        self.names = reward_names(specs)
        self.weights = [float(w) for w in weights] if weights is not None else [1.0] * len(specs)
        self.kwargs = options_by_name(kwargs)
        if not specs or len(self.weights) != len(specs):
            raise ConfigError(
                f"reward_weights has {len(self.weights)} entries for {len(specs)} reward_funcs; give one each"
            )
        if unknown := sorted(set(self.kwargs) - set(self.names)):
            raise ConfigError(f"reward_kwargs: no reward {unknown[0]!r}; reward_funcs are {', '.join(self.names)}")
        for spec in specs:
            check_spec(spec, folder)
        self.num_workers, self.memory_bytes, self._hash_seed = num_workers, memory_bytes, hash_seed
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    @property
    def digest(self) -> str:
        """Digest of the rewards, their options and weights, as the certificate is bound to."""
        return reward_digest(self.specs, self.kwargs, self.weights, self.folder)

    def twin(self, hash_seed: int) -> RewardPool:
        """The same rewards in processes whose hashes are salted otherwise, and one worker more."""
        return RewardPool(
            self.specs, self.weights, self.kwargs, self.num_workers + 1, self.timeout_s, self.memory_bytes,
            folder=self.folder, hash_seed=hash_seed,
        )  # fmt: skip

    def __enter__(self) -> RewardPool:
        """Start the workers and wait until each has loaded the rewards. Raises: ConfigError."""
        try:
            while len(self._workers) < self.num_workers:
                self._workers.append(self._start())
            for worker in self._workers:
                self._await_ready(worker)  # at once for those that are
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
            worker.kill()
        self._workers = []

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[RewardBreakdown]:
        """One breakdown per completion, in order.

        A returned None counts as 0 in the weighted sum where another reward did score (as in TRL); a reward that *failed*
        leaves the whole completion unscored. Raises: RewardError for a wrong count or a missing column.
        """
        num, columns = len(completions), columns or {}
        for name, column in {"prompts": prompts, **columns}.items():
            assert len(column) == num, f"{name} has {len(column)} rows for {num} completions"
        call = _Call(
            prompts, completions, columns, [[None] * num for _ in self.specs], [[None] * num for _ in self.specs]
        )
        for start in range(0, num, CHUNK_SIZE):
            items = tuple(range(start, min(start + CHUNK_SIZE, num)))
            for function, spec in enumerate(self.specs):
                alone = spec in REWARDS and REWARDS[spec].alone
                call.queue.extend(_Task(function, part) for part in (((i,) for i in items) if alone else (items,)))
        with self._lock:
            self.__enter__()
            self._run(call)
        return [self._breakdown(call, item) for item in range(num)]

    # --- processes -------------------------------------------------------------------------------------------------

    def _start(self) -> _Worker:
        setup = {
            "specs": list(self.specs), "kwargs": self.kwargs, "folder": str(self.folder.resolve()) if self.folder else None,
            "memory_bytes": self.memory_bytes, "timeout_s": self.timeout_s, "from_main_thread": threading.current_thread() is threading.main_thread(),
        }  # fmt: skip
        return _Worker(pickle.dumps(setup), self._hash_seed)

    def _await_ready(self, worker: _Worker) -> None:
        while not worker.ready:
            readable = select.select([worker.answer_fd], [], [], max(0.0, worker.deadline - time.monotonic()))[0]
            if not readable:
                raise ConfigError(
                    f"loading the rewards took over {_START_TIMEOUT_S:.0f} s; move slow work out of the file's top level"
                )
            try:
                self._became_ready(worker, worker.receive())
            except EOFError:
                raise ConfigError(f"while loading the rewards, {worker.ended()}") from None

    @staticmethod
    def _became_ready(worker: _Worker, answer: Mapping[str, Any] | None) -> None:
        if answer is None:
            return
        if "error" in answer:
            raise ConfigError(answer["error"])
        worker.ready = True

    def _replace(self, worker: _Worker) -> None:
        index = self._workers.index(worker)
        worker.kill()
        self._workers[index] = self._start()
        self._await_ready(self._workers[index])

    def _run(self, call: _Call) -> None:
        try:
            while call.queue or any(worker.task for worker in self._workers):
                self._hand_out(call)
                self._collect(call)
        except BaseException:
            # A worker still at this call would answer into the next one.
            for worker in [worker for worker in self._workers if worker.task is not None]:
                self._workers.remove(worker)
                worker.kill()
            raise

    def _hand_out(self, call: _Call) -> None:
        for worker in list(self._workers):
            if worker.task is None and call.queue:
                task = call.queue.popleft()
                worker.trim_log()
                worker.deadline = time.monotonic() + self.timeout_s
                if worker.send(call.payload(task)):
                    worker.task = task
                else:
                    call.failed(
                        task,
                        worker.ended() if worker.process.poll() is not None else "the reward process does not read",
                    )
                    self._replace(worker)

    def _collect(self, call: _Call) -> None:
        """Wait for the next answer or deadline, and deal with all that have come."""
        busy = [worker for worker in self._workers if worker.task is not None]
        if not busy:
            return
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.answer_fd, selectors.EVENT_READ, worker)
            wait_s = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            readable = [key.data for key, _ in selector.select(wait_s)]
        for worker in busy:
            task = worker.task
            assert task is not None
            try:
                answer = worker.receive() if worker in readable else None
            except EOFError:
                worker.task = None
                call.failed(task, worker.ended())
                self._replace(worker)
                continue
            if answer is not None:
                worker.task = None
                call.answered(task, answer)
            elif time.monotonic() >= worker.deadline:
                worker.task = None
                call.failed(task, f"took longer than {self.timeout_s:g} s and was killed")
                self._replace(worker)

    def _breakdown(self, call: _Call, item: int) -> RewardBreakdown:
        parts = {name: call.values[f][item] for f, name in enumerate(self.names)}
        errors = [f"{name}: {reason}" for f, name in enumerate(self.names) if (reason := call.reasons[f][item])]
        scored = [
            weight * value for weight, value in zip(self.weights, parts.values(), strict=True) if value is not None
        ]
        total = sum(scored) if scored and not errors else None
        return RewardBreakdown(total, parts, "; ".join(errors) or None)


def check_unscored(breakdowns: Sequence[RewardBreakdown], limit: float = 0.1) -> None:
    """Raises: RewardError when more than `limit` of the completions are unscored, with the first reasons."""
    unscored = [b for b in breakdowns if b.total is None]
    if len(unscored) <= limit * len(breakdowns):
        return
    reasons = list(dict.fromkeys(b.error or "every reward returned None" for b in unscored))
    raise RewardError(
        f"{len(unscored)} of {len(breakdowns)} completions are unscored; at most {limit:.0%} may be. "
        f"First reasons: {' | '.join(reasons[:3])}. Fix the reward, or raise reward_timeout_s if it is slow"
    )
