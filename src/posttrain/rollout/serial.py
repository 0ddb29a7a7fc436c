"""An engine of this process that several threads use: one call after the other, in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from posttrain.protocols import Engine, Weights
from posttrain.types import Completion, EngineInfo, Moved, Request, SamplingParams


class SerialEngine:
    """`engine`, whose calls wait for each other. So an update waits for what is being sampled, and comes before what is asked later.

    Who takes completions holds the engine until the last one, or until their iterator is closed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed, self._waiting = threading.Condition(), deque[object]()

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    def describe(self) -> EngineInfo:
        return self._engine.describe()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        return self._completions(self._engine.generate(requests, params))

    def _completions(self, found: Iterator[Completion]) -> Iterator[Completion]:
        with self._turn():
            yield from found

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        with self._turn():
            return self._engine.score(sequences, temperature)

    def update(self, weights: Weights, version: int) -> Moved:
        with self._turn():
            return self._engine.update(weights, version)

    def rest(self) -> None:
        """Threads may ask it at any time."""

    def close(self) -> None:
        with self._turn():
            self._engine.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        mine = object()
        with self._changed:
            self._waiting.append(mine)
            self._changed.wait_for(lambda: self._waiting[0] is mine)
        try:
            yield
        finally:
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
