"""Requests that were let in: one after the other through the thread that computes, and their results for whoever asks again.

A request's id follows from its model and number, so one that is sent twice is one request. Knows nothing of what they do.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import ConfigError, DataError, PosttrainError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RequestResult:
    """A record, or the bytes of a protobuf message; or why there is neither."""

    record: Mapping[str, Any] | None = None
    message: bytes = b""
    failure: str = ""
    is_users: bool = False
    """Whether the client can do something about the failure."""


@dataclass(eq=False)
class ComputeJob:
    """`work` is done in the thread that computes. Of those with one `together`, what was `asked` is handed to `join` at once."""

    request_id: str
    work: Callable[[], RequestResult]
    done: Callable[[RequestResult], None] = lambda outcome: None
    together: Hashable = None
    join: Callable[[Sequence[Any]], Sequence[RequestResult]] | None = None
    asked: Any = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: RequestResult | None = None


class ComputeQueue:
    """In the order in which requests came; `max_bytes` of messages are kept after that."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting: deque[ComputeJob] = deque()
        self._running: Sequence[ComputeJob] = ()
        self._jobs: OrderedDict[str, ComputeJob] = OrderedDict()
        self._kept_bytes = 0
        self._thread = ThreadPoolExecutor(1, "tinker")
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def find(self, request_id: str) -> ComputeJob | None:
        return self._jobs.get(request_id)

    def note(self, job: ComputeJob) -> None:
        """It is known from here on, and waits for `submit`."""
        self._jobs[job.request_id] = job

    def submit(self, job: ComputeJob) -> None:
        self._waiting.append(job)
        self._wake.set()

    def end(self, job: ComputeJob, outcome: RequestResult) -> None:
        try:
            job.done(outcome)
        except (
            OSError
        ) as error:  # of a full disk: what is in no journal is not acknowledged, and the next request is computed
            log.exception("%s could not be noted", job.request_id)
            outcome = RequestResult(failure=f"request {job.request_id} was computed, but could not be noted: {error}")
        job.outcome = outcome
        job.work, job.join, job.asked = RequestResult, None, None  # a body is larger than what is kept of it
        job.ended.set()
        self._kept_bytes += len(outcome.message)
        while self._kept_bytes > self._max_bytes and (oldest := self._oldest_ended(job)) is not None:
            assert oldest.outcome is not None, "only what has ended is forgotten"
            self._kept_bytes -= len(oldest.outcome.message)
            del self._jobs[oldest.request_id]

    def _oldest_ended(self, but: ComputeJob) -> ComputeJob | None:
        return next((job for job in self._jobs.values() if job.outcome is not None and job is not but), None)

    @property
    def num_open(self) -> int:
        return len(self._waiting) + len(self._running)

    async def settle(self, within_s: float) -> None:
        """Until nothing waits, or so long."""
        deadline = asyncio.get_running_loop().time() + within_s
        while self.num_open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(cancel_futures=True)

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            jobs = self._running = self._next()
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, _compute, jobs)
            self._running = ()
            for job, outcome in zip(jobs, outcomes, strict=True):
                self.end(job, outcome)

    def _next(self) -> Sequence[ComputeJob]:
        first = self._waiting.popleft()
        if first.join is None:
            return [first]
        jobs = [first, *(job for job in self._waiting if job.together == first.together)]
        self._waiting = deque(job for job in self._waiting if job not in jobs)
        return jobs


def _compute(jobs: Sequence[ComputeJob]) -> Sequence[RequestResult]:
    try:
        return [jobs[0].work()] if jobs[0].join is None else jobs[0].join([job.asked for job in jobs])
    except (DataError, ConfigError) as error:
        outcome = RequestResult(failure=str(error), is_users=True)
    except PosttrainError as error:
        outcome = RequestResult(failure=str(error))
    except Exception as error:  # told to the client that asked; the next request is computed
        log.exception("%s failed", jobs[0].request_id)
        outcome = RequestResult(failure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return [outcome] * len(jobs)
